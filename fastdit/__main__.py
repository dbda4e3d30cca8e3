"""`python -m fastdit`, and `torchrun ... -m fastdit`."""

from fastdit.cli import app

app()
