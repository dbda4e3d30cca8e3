"""The Typer app behind `fastdit` and `python -m fastdit`."""

import typer

from fastdit.cli.evaluate import evaluate
from fastdit.cli.models import convert, encode, info
from fastdit.cli.sample import sample
from fastdit.cli.train import train

app = typer.Typer(
    help="Train and sample Diffusion Transformers.",
    no_args_is_help=True,
    rich_markup_mode=None,  # it would read "[linear]" in a help text as markup
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (train, convert, info, encode, sample, evaluate):
    app.command()(command)
