"""`python -m fastdit.cli`, the same as `python -m fastdit`."""

from fastdit.cli.app import app

app()
