"""The checkpoints in the folder of a training run, and the weights in one of them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS_FILE = "model.safetensors"  # the newest weights to sample from
KINDS = {"model": "model.", "ema": "ema."}  # raw and averaged weights, and their tensors' prefixes


def step_files(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, file) of every checkpoint of a run, oldest first; some may be damaged."""
    found = []
    for path in (folder / "checkpoints").glob("step-*.safetensors"):
        if name := re.fullmatch(r"step-(\d+)\.safetensors", path.name):
            found.append((int(name[1]), path))
    return sorted(found)


def locate(path: str | os.PathLike[str], weights: str | None = None) -> Path:
    """Return the file to read where a path is a run's folder, and any other path as it is.

    Without a choice of weights it is the run's `model.safetensors`, which is written with every
    checkpoint; with one it is the newest checkpoint that is whole.

    Raises:
        ValueError: the run has no whole checkpoint.
    """
    folder = Path(path)
    model, steps = folder / WEIGHTS_FILE, step_files(folder)
    if not folder.is_dir() or (folder / "config.json").exists() or not (steps or model.exists()):
        return folder
    if weights is None and model.is_file():
        return model
    if newest := newest_whole(folder):
        return newest
    raise ValueError(f"{path}: none of the run's {len(steps)} checkpoints is whole")


def newest_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run that is whole, or None."""
    for _, file in reversed(step_files(folder)):
        try:
            with safe_open(file, framework="pt"):
                return file
        except (SafetensorError, OSError):
            continue  # a kill or a full disk has cut it short; an older one is whole
    return None


def run_weights(name: str, tensors: Mapping[str, Tensor], weights: str | None) -> dict[str, Tensor]:
    """Return a model's tensors from those of a run's checkpoint.

    Args:
        name: the checkpoint's, for errors.
        tensors: those of the checkpoint.
        weights: "model" for the raw weights, "ema" for the averaged ones; None prefers the latter.

    Raises:
        ValueError: there are no such weights.
    """
    has = [kind for kind, prefix in KINDS.items() if any(n.startswith(prefix) for n in tensors)]
    if weights is not None and weights not in has:
        expected = " or ".join(has) or "none"
        raise ValueError(f"weights: expected {expected}, which {name} has, got {weights!r}")
    state: dict[str, Tensor] = {}
    # Averages replace the weights; what is not trained, such as fixed positions, has no average.
    for kind in KINDS if weights is None else ("model", weights):
        prefix = KINDS[kind]
        state |= {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return state
