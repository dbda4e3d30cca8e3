"""The statistics by which a model's latents are normalised, read from a file.

LightningDiT writes them beside its latents, as `latents_stats.pt`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdit.checkpoints.native import read_safetensors
from fastdit.checkpoints.pickles import is_pickle, read_pickle
from fastdit.data.latents import LatentStats

_NAMES = ("mean", "std")


def read_latent_stats(path: str | os.PathLike[str]) -> LatentStats:
    """Return the statistics in a file of PyTorch or safetensors.

    It holds `mean` and `std`, of one value for each channel, and may hold a `multiplier`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or does not hold such statistics.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    content = read_pickle(path) if is_pickle(path) else read_safetensors(path)[0]
    if not isinstance(content, Mapping) or not all(name in content for name in _NAMES):
        got = list(content)[:4] if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path}: expected mean and std, as of latents_stats.pt, got {got}")
    mean, std = (_values(path, name, content[name]) for name in _NAMES)
    multiplier = _values(path, "multiplier", content.get("multiplier", 1.0))
    if len(multiplier) != 1:
        raise ValueError(f"{path}: multiplier: expected one number, got {len(multiplier)}")
    try:
        return LatentStats(mean, std, *multiplier)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _values(path: Path, name: str, value: Any) -> tuple[float, ...]:
    """Return the numbers of a tensor of which one dimension at most is longer than 1."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = torch.tensor(float(value), dtype=torch.float64)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta:
        raise ValueError(f"{path}: {name}: expected float values, got {type(value).__name__}")
    if sum(side > 1 for side in value.shape) > 1:
        raise ValueError(f"{path}: {name}: expected one a channel, got {list(value.shape)}")
    return tuple(value.flatten().tolist())
