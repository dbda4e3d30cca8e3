"""The command line: `app` gathers the commands, and each module holds one or a few of them."""
