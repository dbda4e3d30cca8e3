"""What several modules check of their arguments, and the wording of their errors."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# The dtypes in which weights are stored and ops compute; float8 is not among them.
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unknown_name(what: str, name: object, known: Iterable[object]) -> ValueError:
    """Return the error for an unknown name: what was expected, what came, and the closest name."""
    names = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return ValueError(f"{what}: expected one of {', '.join(names)}; got {name!r}{hint}")


def check_range(name: str, values: Tensor, limit: int) -> None:
    """Raise a ValueError unless 0 <= values < limit; on an accelerator this waits for them."""
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers, got {values.dtype}")
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < limit:
        raise ValueError(
            f"{name}: expected values in [0, {limit}), got {int(values.min())} to "
            f"{int(values.max())}"
        )


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
    while frame.f_back is not None and _is_internal(frame.f_globals):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_internal(namespace: Mapping[str, Any]) -> bool:
    """Whether a frame is fastdit's, or PyTorch's, whose decorators stand between its calls."""
    return str(namespace.get("__name__", "")).startswith(("fastdit.", "torch."))
