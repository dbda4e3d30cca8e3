"""The options by which commands answer what a checkpoint does not tell."""

from __future__ import annotations

from typing import Annotated, Any

from fastdit.checkpoints.native import PUBLISHED_DIFFUSION
from fastdit.cli.common import option
from fastdit.errors import unknown_name

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
        "The diffusion of its training, such as T=1000,schedule=linear,prediction=epsilon, in "
        "place of what is stored or assumed."
    ),
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
) -> dict[str, Any]:
    """Return these options as `fastdit.load` and `inspect` take them."""
    return {
        "n_heads": n_heads,
        "null_class": null_class,
        "img_size": None if img_size is None else parse_size("--img-size", img_size),
        "diffusion": None if diffusion is None else _parse_diffusion(diffusion),
        "weights": weights,
    }


def parse_size(flag: str, text: str) -> int | tuple[int, int]:
    """Return the size that a text such as "32" or "16x64" (height x width) stands for."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() and int(side) for side in sides):
        raise ValueError(f"{flag}: expected a size such as 32 or 16x64, got {text!r}")
    height, width = int(sides[0]), int(sides[-1])
    return height if height == width else (height, width)


def _parse_diffusion(text: str) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            raise ValueError(f"--diffusion: expected name=value, comma-separated, got {part!r}")
        if name not in PUBLISHED_DIFFUSION:
            raise unknown_name("--diffusion", name, PUBLISHED_DIFFUSION)
        if name == "T" and not value.isdecimal():
            raise ValueError(f"--diffusion: expected T to be a number of steps, got {value!r}")
        parsed[name] = int(value) if name == "T" else value
    return parsed
