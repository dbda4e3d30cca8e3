"""The options by which commands answer what a checkpoint does not tell."""

from __future__ import annotations

from typing import Annotated, Any

from fastdit.checkpoints.diffusions import parse
from fastdit.cli.common import option

Heads = Annotated[
    int | None,
    option("Attention heads, where the file does not tell them.", "--n-heads", min=1),
]
NullClass = Annotated[
    bool | None,
    option("Whether the last class row is that of no label, where the file does not tell it."),
]
ImageSize = Annotated[
    str | None,
    option("Size of the model's input, such as 32 or 16x64, where the file does not tell it."),
]
Diffusion = Annotated[
    str | None,
    option(
        "The diffusion of its training: flow, ddpm, or options in place of what is told, such as "
        "path=linear,prediction=velocity or T=1000,schedule=linear,prediction=epsilon."
    ),
]
TextTokens = Annotated[
    int | None,
    option("The most tokens of a prompt, where the file does not tell it.", min=1),
]
Weights = Annotated[
    str | None,
    option("Entry of a training checkpoint: ema, model or another.  [averaged, if there are any]"),
]


def answers(
    n_heads: int | None,
    null_class: bool | None,
    img_size: str | None,
    diffusion: str | None,
    weights: str | None,
    text_tokens: int | None,
) -> dict[str, Any]:
    """Return these options as `fastdit.load` and `inspect` take them."""
    return {
        "n_heads": n_heads,
        "null_class": null_class,
        "img_size": None if img_size is None else parse_size("--img-size", img_size),
        "diffusion": None if diffusion is None else parse(diffusion),
        "weights": weights,
        "text_tokens": text_tokens,
    }


def parse_size(flag: str, text: str) -> int | tuple[int, int]:
    """Return the size that a text such as "32" or "16x64" (height x width) stands for."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() and int(side) for side in sides):
        raise ValueError(f"{flag}: expected a size such as 32 or 16x64, got {text!r}")
    height, width = int(sides[0]), int(sides[-1])
    return height if height == width else (height, width)
