"""Files that other projects write: PyTorch's pickles, read without running them, and folders."""

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

# What torch.load raises for a file that is torn, of another kind, or wants to run code.
_BAD_PICKLE = (
    *(pickle.UnpicklingError, struct.error, EOFError, RuntimeError, ValueError),
    *(LookupError, TypeError, AttributeError, OverflowError, AssertionError),
)


def pickled_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights in a .pt file, read without running anything in it.

    Of a training checkpoint these are "ema", else "model" or "state_dict"; the prefix of a data
    parallel wrapper goes.

    Raises:
        ValueError: the file is truncated, no dict, or holds code.
    """
    # The published training code stores its command line beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except (*_BAD_PICKLE, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that of a torn offset
                raise
            # Not PyTorch's own words, which advise to run the file.
            code = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise ValueError(
                f"{path}: expected a PyTorch file of tensors; "
                + (
                    f"it holds more than tensors ({code[1]}), which is refused and not run"
                    if code
                    else "it is truncated or damaged, or holds more than tensors, which is not run"
                )
            ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(content).__name__}")
    for key in ("ema", "model", "state_dict"):
        if isinstance(content.get(key), dict) and content[key]:
            content = content[key]
            break
    return {str(k).removeprefix("module."): t for k, t in content.items() if isinstance(t, Tensor)}


def folder(path: Path) -> tuple[Any, Path]:
    """The config and the file of weights in a folder of diffusers, or of a pipeline's transformer.

    Raises:
        ValueError: one of the two is not there, or the config is no JSON.
    """
    if (path / "transformer").is_dir() and not (path / "config.json").is_file():
        path = path / "transformer"
    weights = next((path / n for n in FOLDER_WEIGHTS if (path / n).is_file()), None)
    if weights is None or not (path / "config.json").is_file():
        raise ValueError(
            f"{path}: expected config.json and {' or '.join(FOLDER_WEIGHTS)}, as diffusers' "
            "save_pretrained writes them"
        )
    try:
        config = json.loads((path / "config.json").read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path / 'config.json'}: expected JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.json'}: expected a JSON object, got {config!r:.40}")
    return config, weights


def weight_files(path: Path) -> list[Path]:
    """The files that a model is read from: a file, or those of a folder."""
    if path.is_file():
        return [path]
    _, weights = folder(path)
    return [weights.with_name("config.json"), weights]


def folder_labels(path: Path, num_classes: int) -> tuple[str, ...] | None:
    """The names of the classes, where a folder is of a pipeline that knows them all."""
    try:
        names = json.loads((path / "model_index.json").read_text())["id2label"]
        return tuple(str(names[str(i)]) for i in range(num_classes))
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError):
        return None
