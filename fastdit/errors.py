"""What several modules check of their arguments, and the wording of their errors."""

from __future__ import annotations

import difflib
import functools
import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

T = TypeVar("T")

# The dtypes in which weights are stored and ops compute; float8 is not among them.
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_NAMES_SHOWN = 40  # of those that are known, such as ImageNet's two thousand


def unknown_name(what: str, name: object, known: Iterable[object]) -> ValueError:
    """Return the error for an unknown name: what was expected, what came, and the closest name."""
    names = [str(k) for k in known]
    by_lower = {k.lower(): k for k in reversed(names)}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    hint = f"; did you mean {by_lower[close[0]]!r}?" if close else ""
    more = len(names) - _NAMES_SHOWN
    if more > 1:
        names = [*names[:_NAMES_SHOWN], f"{more} more"]
    return ValueError(f"{what}: expected one of {', '.join(names)}; got {name!r}{hint}")


def first_few(names: Sequence[str], shown: int) -> str:
    """Return the first names as text, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def check_range(name: str, values: Tensor, limit: int) -> None:
    """Raise a ValueError unless 0 <= values < limit; on an accelerator this waits for them."""
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers, got {values.dtype}")
    if not values.numel():
        return
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= limit:
        raise ValueError(f"{name}: expected values in [0, {limit}), got {low} to {high}")


def check_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if a tensor holds a NaN or an infinity, which would spoil every pixel.

    Where all values are finite, this takes one reduction per tensor and one synchronization.
    """
    if not tensors:
        return
    # A sum is finite only if all its values are. It may also overflow, so the values decide below.
    sums = torch.stack([t.sum(dtype=torch.float32) for t in tensors.values()])
    if sums.isfinite().all():
        return
    for name, t in tensors.items():
        if not t.isfinite().all():
            raise ValueError(f"{what}: expected finite values, but {name} holds NaN or Inf")


def check_positive(name: str, value: Any) -> None:
    """Raise a ValueError unless a value is an integer of at least 1, and not True."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def height_and_width(name: str, size: Any, unit: int = 1) -> tuple[int, int]:
    """Return a size as (height, width): it is an integer for a square, or already a pair.

    Raises:
        ValueError: it is neither, or a side is not a positive multiple of `unit`.
    """
    pair = tuple(size) if isinstance(size, tuple | list) else (size, size)
    integers = all(isinstance(side, int) and not isinstance(side, bool) for side in pair)
    if integers and len(pair) == 2 and all(side > 0 and side % unit == 0 for side in pair):
        return pair
    kind = "positive integer" if unit == 1 else f"multiple of {unit}"
    expected = f"a {kind}"
    if isinstance(size, tuple | list):
        expected = f"(height, width), each a {kind}"
    raise ValueError(f"{name}: expected {expected}, got {size!r}")


@functools.cache  # evaluating them takes a millisecond, for each of the presets
def _annotations(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def check_fields(options: Any, *names: str) -> None:
    """Check the named fields of a dataclass, or all of them, against their annotations.

    Integers and floats must be positive. Only bool, int, float, Literal and sizes are known, and
    None beside int and float.
    """
    hints = _annotations(type(options))  # type: ignore[arg-type]  # a class can be hashed
    for name in names or hints:
        value, hint = getattr(options, name), hints[name]
        if value is None and hint in (float | None, int | None):
            continue
        if hint is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{name}: expected True or False, got {value!r}")
        elif hint in (float, float | None):
            if not (isinstance(value, float) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a positive float, got {value!r}")
        elif hint in (int, int | None):
            check_positive(name, value)
        elif hint == int | tuple[int, int]:
            height_and_width(name, value)
        elif value not in get_args(hint) or type(value) not in map(type, get_args(hint)):
            raise unknown_name(name, value, get_args(hint))


def from_options(cls: type[T], options: Any, complete: bool = False) -> T:
    """Return an instance of the dataclass `cls`; an unknown option is a ValueError.

    With `complete` a missing option is one too: where the options were read from a file, a default
    must not stand in for what its writer meant.
    """
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    if not isinstance(options, dict):
        raise ValueError(f"{cls.__name__}: expected a dict of options, got {options!r}")
    missing = [name for name in known if name not in options]
    if complete and missing:
        raise ValueError(f"{cls.__name__}: expected every option, {', '.join(missing)} missing")
    for name in options:
        if name not in known:
            raise unknown_name(f"{cls.__name__} option", name, known)
    return cls(**options)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn where the user's code called the package, however deep the call is by now."""
    frame, level = sys._getframe(1), 2
    # Decorators of PyTorch and contexts of contextlib stand between the package's own calls.
    internal = ("fastdit.", "torch.", "contextlib")
    while frame.f_back and str(frame.f_globals.get("__name__")).startswith(internal):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
