"""Reading the options in a config of diffusers, whose values cannot be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_MAX_SIZE = 2**20


def check_choices(config: Mapping[str, Any], expected: Mapping[str, Sequence[Any]]) -> None:
    """Raise a ValueError that names an option which is none of its choices.

    Args:
        config: of diffusers.
        expected: the choices of each option; one that is missing is the first of them.
    """
    for key, known in expected.items():
        if (value := config.get(key, known[0])) not in known:
            names = ", ".join(map(str, known))
            raise ValueError(f"config: expected {key} to be one of {names}, got {value!r:.40}")


def size_of(config: Mapping[str, Any], key: str) -> int:
    """Return an option that is a size; anything else is a ValueError that names it."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _MAX_SIZE:
        raise ValueError(f"config: expected {key} to be a positive integer, got {value!r:.40}")
    return value


def check_out_channels(config: Mapping[str, Any], channels: int, most: int = 2) -> None:
    """Raise a ValueError unless a model returns its channels, or `most` times as many."""
    out = config.get("out_channels")
    if out not in (None, channels, most * channels):
        wanted = f"out_channels of {channels}" + f" or {most * channels}" * (most > 1)
        raise ValueError(f"config: expected {wanted}, got {out!r:.40}")


def float_of(config: Mapping[str, Any], key: str, default: float) -> float:
    """Return an option that is a float; anything else is a ValueError that names it."""
    value = config.get(key, default)
    if not isinstance(value, float):
        raise ValueError(f"config: expected {key} to be a float, got {value!r:.40}")
    return value
