"""Folders of diffusers: a transformer's config and weights, or a pipeline's that holds one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


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
