"""The command line: `fastdit train`, `sample`, `evaluate`, `encode`, `convert` and `info`.

`app` gathers the commands. `train`, `sample` and `evaluate` hold one each, `models` the other
three, and `common` the options and the error handling that all of them share.
"""
