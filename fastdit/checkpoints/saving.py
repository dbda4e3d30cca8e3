"""Saving models, in fastdit's layout and in those of other projects."""

from __future__ import annotations

import io
import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from fastdit.checkpoints import folders, text_models, translation
from fastdit.checkpoints.diffusions import NOTE
from fastdit.checkpoints.entries import OWN
from fastdit.checkpoints.matching import (
    MODELS,
    ModelConfig,
    check_keys,
    empty_model,
    kind_of,
    model_config,
)
from fastdit.checkpoints.native import check_labels, write_tensors
from fastdit.checkpoints.projects import PROJECTS, wrapped
from fastdit.config import DiTConfig
from fastdit.data.files import atomic_path
from fastdit.errors import unknown_name
from fastdit.flow import Process
from fastdit.model import unwrap

SAVED_LAYOUTS = ("fastdit", *PROJECTS, "diffusers")


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    scheduler: Process | None = None,
    labels: Sequence[str] | None = None,
    *,
    layout: str = "fastdit",
    assumed: Sequence[str] = (),
) -> None:
    """Write a model to a file, atomically.

    Args:
        model: a `fastdit.DiT`, `PixArt` or `MMDiT`, which may be compiled or wrapped; its state
            dict and config are stored.
        path: the file to write; an older file is replaced once the new one is whole on disk. In a
            diffusers folder this holds for each file, and the config is missing in between.
        scheduler: the diffusion or flow that the model was trained with, for sampling from the
            file; None takes the model's `diffusion`, which `load` sets where it is known.
        labels: names of the classes, `num_classes` of them.
        layout: "fastdit", a safetensors file; "facebookresearch/DiT", "willisma/SiT",
            "hustvl/LightningDiT", "sihyun-yu/REPA" or "LTH14/JiT", a .pt file as that project's
            code loads it; or "diffusers", a folder for its `from_pretrained`. All but the first
            take neither scheduler nor labels, and only models that their projects can express. A
            PixArt and an MMDiT are written as "fastdit" or "diffusers".
        assumed: names of what was assumed and not known, as in `CheckpointInfo`, to be said again
            by whoever reads the file.

    Raises:
        ValueError: the model is none of these, its weights do not fit its config, the labels are
            not num_classes strings, or the layout cannot hold the model.
        OSError: the file cannot be written; an older file is left as it was.
    """
    if layout not in SAVED_LAYOUTS:
        raise unknown_name("layout", layout, SAVED_LAYOUTS)
    inner = unwrap(model)
    cfg = model_config(inner)
    if cfg is None:
        got = type(inner).__name__
        raise ValueError(f"model: expected a fastdit.DiT, PixArt or MMDiT, got {got}")
    check_labels("labels", labels, cfg)
    state = inner.state_dict()
    check_keys("model", empty_model("model", cfg).state_dict(), state)
    if layout == "fastdit":
        diffusion = scheduler.options if scheduler else inner.diffusion
        header: dict[str, Any] = {
            "config": cfg.to_dict(),
            "diffusion": diffusion,
            "labels": labels and list(labels),
        }
        if not isinstance(cfg, DiTConfig):
            header["class"] = MODELS[type(cfg)].__name__
        if assumed:
            header["assumed"] = list(assumed)
        write_tensors(path, state, header)
        return
    if scheduler or labels:
        raise ValueError(f"layout: {layout!r} stores neither scheduler nor labels")
    if layout == "diffusers":
        _save_folder(cfg, state, Path(path))
        return
    if not isinstance(cfg, DiTConfig):
        expected = f"fastdit or diffusers for {kind_of(cfg)}"
        raise ValueError(f"layout: expected {expected}, got {layout!r}")
    theirs = translation.to_project(layout, cfg, state)
    content = wrapped(layout, {name: t.detach().cpu() for name, t in theirs.items()})
    _save_pickle(content, cfg.to_dict() | {NOTE: inner.diffusion}, path)


def _save_pickle(
    content: Mapping[str, Any], note: dict[str, Any], path: str | os.PathLike[str]
) -> None:
    """Write what a project's code loads, with a note that only fastdit looks for."""
    # Modules look up their own names only in the metadata of a state dict.
    written = OrderedDict(content)
    written._metadata = {OWN: note}  # type: ignore[attr-defined]
    buffer = io.BytesIO()  # torch.save reports a full disk as an error of its own
    torch.save(written, buffer)
    with atomic_path(path) as aside:
        aside.write_bytes(buffer.getbuffer())


def _save_folder(cfg: ModelConfig, state: Mapping[str, Tensor], path: Path) -> None:
    """Write the two files that diffusers' from_pretrained reads."""
    if isinstance(cfg, DiTConfig):
        config, tensors = translation.to_diffusers(cfg, state)
    else:
        config, tensors = text_models.to_diffusers(cfg, state)
    if (path / "model_index.json").exists():
        raise ValueError(f"{path}: it is a pipeline's; save to its folder 'transformer'")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: not written, since it exists and is not a folder")
    path.mkdir(parents=True, exist_ok=True)
    # Old and new files are never read together, since a folder without a config is no checkpoint.
    (path / "config.json").unlink(missing_ok=True)
    for index in folders.indices(path):
        index.unlink()
    with atomic_path(path / folders.FOLDER_WEIGHTS) as aside:
        aside.write_bytes(serialize({n: t.detach().contiguous() for n, t in tensors.items()}))
    with atomic_path(path / "config.json") as aside:
        aside.write_text(json.dumps(config, indent=2) + "\n")
