"""Checks of `Sampler`'s arguments; each returns its argument in the form that the loop takes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastdit.config import DiTConfig
from fastdit.errors import check_finite, check_range

Labels: TypeAlias = int | np.integer | Sequence[int] | Tensor | np.ndarray
Generators: TypeAlias = torch.Generator | Sequence[torch.Generator]


def sample_shape(given: tuple[int, int, int] | None, cfg: DiTConfig | None) -> tuple[int, int, int]:
    """Return an image's (C, H, W): the DiT's own, or the given one for any other model."""
    if given is not None:
        if not isinstance(given, Sequence):
            got = type(given).__name__
            raise ValueError(f"sample_shape: expected three positive integers, got {got}")
        given = tuple(given)  # type: ignore[assignment]
    shape = cfg.sample_shape if cfg else given
    if shape is None:
        raise ValueError("sample_shape: expected (C, H, W), since the model is not a DiT, got None")
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"sample_shape: expected three positive integers, got {shape}")
    if given not in (None, shape):
        raise ValueError(f"sample_shape: expected the model's {shape}, got {given}")
    return shape


def class_labels(labels: Labels | None, cfg: DiTConfig | None) -> Tensor | None:
    """Return the labels as [B] int64 on the CPU, in range if the config is known.

    A single integer is one label.
    """
    if labels is None:
        return None
    if cfg is not None and not cfg.use_class_cond:
        raise ValueError("labels: expected None, since the model has use_class_cond=False")
    expected = "labels: expected a non-empty list of integers, one an image"
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()  # torch refuses negative strides
    try:
        y = torch.as_tensor(labels, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{expected}; got {labels!r}") from error
    if y.layout != torch.strided or y.is_meta:
        raise ValueError(f"{expected}; got {'a meta tensor' if y.is_meta else y.layout}")
    numbers = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    if y.dim() == 0 and numbers:
        y = y[None]
    if y.dim() != 1 or not numbers or not len(y):
        raise ValueError(f"{expected}; got {y.dtype} of shape {list(y.shape)}")
    y = y.to(torch.int64)
    if cfg is not None:
        check_range("labels", y, cfg.num_classes)
    return y


def from_generator(
    generator: Generators | None, seed: int | None, seeds: Sequence[int] | None
) -> tuple[int, Sequence[int] | None]:
    """Return the seed and the seeds, which a generator or several replace by their initial seeds.

    Without either, the seed is 0.
    """
    if generator is None:
        return 0 if seed is None else seed, seeds
    if seed is not None or seeds is not None:
        other = "seed" if seed is not None else "seeds"
        raise ValueError(f"generator: expected none beside {other}, which it stands for")
    found: list[object] = list(generator) if isinstance(generator, list | tuple) else [generator]
    initial = []
    for one in found:
        if not isinstance(one, torch.Generator):
            what = type(one).__name__
            raise ValueError(
                f"generator: expected a torch.Generator, or a list of them, got {what}"
            )
        initial.append(one.initial_seed())
        if initial[-1] >= 2**63:  # a negative number was its seed
            raise ValueError(f"generator: expected a seed in [0, 2^63), got {initial[-1]}")
    return (initial[0], None) if isinstance(generator, torch.Generator) else (0, initial)


def batch_size(y: Tensor | None, seeds: Sequence[int] | None, x_T: Tensor | None) -> int:
    """Return the length of the labels, or else of the seeds, or else of x_T."""
    if seeds is not None and not isinstance(seeds, Sequence | Tensor | np.ndarray):
        raise ValueError(f"seeds: expected a sequence of integers, got {type(seeds).__name__}")
    if isinstance(seeds, Tensor | np.ndarray) and seeds.ndim != 1:
        raise ValueError(f"seeds: expected a sequence of integers, got shape {list(seeds.shape)}")
    if isinstance(seeds, Tensor) and seeds.is_meta:
        raise ValueError("seeds: expected a sequence of integers, got a meta tensor")
    if x_T is not None and not isinstance(x_T, Tensor):
        raise ValueError(f"x_T: expected a float tensor, got {type(x_T).__name__}")
    given = y if y is not None else seeds if seeds is not None else x_T
    if given is None or (given is x_T and not x_T.dim()) or not len(given):
        raise ValueError(
            "labels: expected labels, or seeds or x_T to tell the batch size, got none"
        )
    return len(given)


def noise_keys(B: int, seed: int, seeds: Sequence[int] | None, first_index: int) -> Tensor:
    """Return the (key, stream) of each image's noise: [B, 2] int64."""
    if seeds is None:
        first = _integer("first_index", first_index, bits=32)
        if first + B > 2**32:
            raise ValueError(f"first_index: expected at most 2^32 - {B}, got {first}")
        key = _integer("seed", seed, bits=63)
        rows = [(key, first + i) for i in range(B)]
    elif len(seeds) != B:
        raise ValueError(f"seeds: expected {B}, one an image; got {len(seeds)}")
    elif first_index:
        raise ValueError("first_index: expected 0 where seeds names every image's key")
    else:
        rows = [(_integer("seeds", key, bits=63), 0) for key in seeds]
    return torch.tensor(rows, dtype=torch.int64)


def check_tensor(name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless a tensor is None, or finite floats of a shape."""
    if value is None:
        return
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected a float tensor, got {got}")
    if value.layout != torch.strided or value.is_meta:
        kind = "a meta tensor" if value.is_meta else str(value.layout)
        raise ValueError(f"{name}: expected values in a strided tensor, got {kind}")
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
    check_finite(name, {"it": value})


def _integer(name: str, value: int, bits: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 2**bits:
        raise ValueError(f"{name}: expected an integer in [0, 2^{bits}), got {value}")
    return number
