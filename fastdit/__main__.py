"""`python -m fastdit`, and `torchrun ... -m fastdit`."""

from fastdit.cli.app import app

app()
