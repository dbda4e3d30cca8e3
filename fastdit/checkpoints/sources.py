"""Reading what a model is loaded from, before it is known what it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastdit.checkpoints import folders, text_models
from fastdit.checkpoints.entries import arguments_of
from fastdit.checkpoints.inference import Told
from fastdit.checkpoints.lora import merged_state, without_wrapper
from fastdit.checkpoints.matching import model_config
from fastdit.checkpoints.native import read_safetensors
from fastdit.checkpoints.pickles import check_records, is_pickle, read_pickle
from fastdit.checkpoints.runs import locate
from fastdit.model import unwrap


@dataclass
class Source:
    """What was read."""

    name: str
    content: Any  # tensors by name, or entries that hold them
    header: dict[str, Any] | None = None  # fastdit's
    config: Any = None  # fastdit's of a live model, or diffusers'
    labels: tuple[str, ...] | None = None
    folder: Path | None = None  # of diffusers
    pipeline: str | None = None  # the class of the pipeline that the folder holds
    is_file: bool = True
    pickle: Path | None = None  # the file, if it is one of PyTorch's


def read_source(source: Any, weights: str | None, told: Told) -> Source:
    """Read a source; a live module and training arguments add to what is told."""
    if isinstance(source, nn.Module):
        inner = without_wrapper(unwrap(source))
        if told.n_heads is None:
            told.n_heads = getattr(inner, "num_heads", None)
        embedder = getattr(inner, "y_embedder", None)
        told.arguments = {"num_classes": getattr(embedder, "num_classes", None)}
        config = model_config(inner)
        config = _live_config(inner) if config is None else config
        name = type(inner).__name__
        try:
            state = merged_state(inner)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return Source(name, state, config=config, is_file=False)
    if isinstance(source, Mapping):
        told.arguments = arguments_of(source)
        return Source("state dict", source, is_file=False)
    if not isinstance(source, str | os.PathLike):
        what = f"a path, tensors by name or a module, got {type(source).__name__}"
        raise ValueError(f"source: expected {what}")
    path = locate(source, weights)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if is_pickle(path):
        content = read_pickle(path)
        told.arguments = arguments_of(content)
        return Source(str(path), content, pickle=path)
    tensors, header = read_safetensors(path)
    return Source(str(path), tensors, header)


def _live_config(module: nn.Module) -> Any:
    """Return the config of a module of diffusers, with the name of its class."""
    config = getattr(module, "config", None)
    if not isinstance(config, Mapping):
        return config
    names = [base.__name__ for base in type(module).__mro__]  # the user's class may extend theirs
    known = [name for name in names if name in text_models.CLASSES]
    return {**config, "_class_name": known[0]} if known else config


def _read_folder(path: Path) -> Source:
    """Read a folder of diffusers, whose weights may be in several files."""
    config, files = folders.read_folder(path)
    tensors: dict[str, Tensor] = {}
    for file in files:
        if is_pickle(file):
            check_records(file)
            part = read_pickle(file)
            if not isinstance(part, Mapping):
                raise ValueError(f"{file}: expected tensors by name, got {type(part).__name__}")
        else:
            part, _ = read_safetensors(file)
        if twice := [name for name in part if name in tensors]:
            raise ValueError(f"{file}: expected other tensors than before it, got {twice[0]} again")
        tensors |= part
    classes = config.get("num_embeds_ada_norm")
    home = folders.pipeline_folder(path)
    labels = folders.folder_labels(home, classes if isinstance(classes, int) else 0)
    if text_models.class_of(config) is not None:
        labels = None  # PixArt's config counts what it never embeds
    pipeline = folders.folder_pipeline(home)
    found = Source(str(path), tensors, config=config, labels=labels, folder=home)
    return replace(found, pipeline=pipeline)
