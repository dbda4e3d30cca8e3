"""Files of other projects: PyTorch pickles, read without running them, and diffusers' folders."""

from __future__ import annotations

import argparse
import errno
import json
import os
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# What torch.load raises for a file that is truncated, of another kind, or would run code.
_REFUSED = (pickle.UnpicklingError, struct.error, EOFError, RuntimeError, ValueError)
_DAMAGED = (LookupError, TypeError, AttributeError, OverflowError, AssertionError)


def pickled_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights in a .pt file without running anything in it.

    Where the file is a training checkpoint, the weights are its "ema", or else its "model" or
    "state_dict". The prefix of a data parallel wrapper is removed from the names.

    Raises:
        ValueError: the file is truncated, is not a dict, or holds code.
    """
    # The published training code stores its command line beside the weights, as a Namespace.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (*_REFUSED, *_DAMAGED, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # from a bad offset
                raise
            # PyTorch's own message is not passed on, since it advises to run the file.
            reason = "it is truncated or damaged, or holds more than tensors, which is not run"
            if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
                reason = f"it holds more than tensors ({code[1]}), which is refused and not run"
            raise ValueError(f"{path}: expected a PyTorch file of tensors; {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(content).__name__}")
    for key in ("ema", "model", "state_dict"):
        if isinstance(content.get(key), dict) and content[key]:
            content = content[key]
            break
    return {str(k).removeprefix("module."): t for k, t in content.items() if isinstance(t, Tensor)}


def read_folder(path: Path) -> tuple[Any, Path]:
    """Return the config and the weights' file in diffusers' folder of a transformer or a pipeline.

    Raises:
        ValueError: one of the two is missing, or the config is not a JSON object.
    """
    if (path / "transformer").is_dir() and not (path / "config.json").is_file():
        path = path / "transformer"
    source = path / "config.json"
    weights = next((path / n for n in FOLDER_WEIGHTS if (path / n).is_file()), None)
    if weights is None or not source.is_file():
        names = f"config.json and {' or '.join(FOLDER_WEIGHTS)}"
        raise ValueError(f"{path}: expected {names}, which diffusers' save_pretrained writes")
    try:
        config = json.loads(source.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: expected JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{source}: expected a JSON object, got {config!r:.40}")
    return config, weights


def weight_files(path: Path) -> list[Path]:
    """Return the files that a model at `path`, a file or a folder, is read from."""
    if path.is_file():
        return [path]
    _, weights = read_folder(path)
    return [weights.with_name("config.json"), weights]


def folder_labels(path: Path, num_classes: int) -> tuple[str, ...] | None:
    """Return the names of the classes if `path` is a pipeline's folder that has all of them."""
    try:
        names = json.loads((path / "model_index.json").read_text())["id2label"]
        return tuple(str(names[str(i)]) for i in range(num_classes))
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError):
        return None
