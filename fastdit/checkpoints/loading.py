"""Loading models from fastdit's files, from training runs, and from other projects' checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdit.checkpoints import diffusions
from fastdit.checkpoints.adaptation import adapted
from fastdit.checkpoints.digests import check_digests
from fastdit.checkpoints.inference import Told
from fastdit.checkpoints.matching import (
    MODELS,
    Model,
    check_keys,
    check_layers,
    empty_model,
    without_extras,
)
from fastdit.checkpoints.native import CheckpointInfo, read_safetensors
from fastdit.checkpoints.pickles import check_records, is_pickle
from fastdit.checkpoints.resolving import check_text_options, resolve
from fastdit.checkpoints.sources import read_source
from fastdit.config import DiTConfig
from fastdit.errors import FLOAT_DTYPES, check_positive, warn
from fastdit.model import DiT


def load(
    source: str | os.PathLike[str] | Mapping[str, Any] | nn.Module,
    *,
    n_heads: int | None = None,
    null_class: bool | None = None,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    diffusion: Mapping[str, Any] | str | None = None,
    weights: str | None = None,
    text_tokens: int | None = None,
) -> Model:
    """Load a model to the CPU in its stored dtype; the layout is recognised by the keys.

    What a checkpoint does not tell is answered by `n_heads`, `null_class`, `img_size`,
    `text_tokens` and `diffusion`. To fine-tune a model on other data, `num_classes`, `img_size` and
    `in_channels` fit it to them (`fastdit.checkpoints.adaptation`): the parts that depend on them
    are made anew, and a warning names them.

    Args:
        source: a file that `fastdit.save` wrote; the folder of a run of `fastdit train`, or one of
            its checkpoints; a checkpoint of facebookresearch/DiT, SiT, LightningDiT, REPA or JiT,
            which is a .pt, .ckpt or safetensors file, or what it holds; a bare state dict
            of a `fastdit.DiT`; a folder of diffusers' DiT or of a pipeline with one; or a live
            module of any of these projects. Likewise a PixArt or a Stable Diffusion 3: a folder, a
            file of its own project, or a live module. Prefixes of wrappers ("module.",
            "_orig_mod.") and entries that hold the weights are removed in all of them.
        n_heads: number of attention heads, where the file does not tell it.
        null_class: whether the last class row is that of "no label", where shapes do not tell it.
        num_classes: number of classes to fit the model to.
        img_size: size of the images, or (height, width); for a grid of patches that the file does
            not tell, or else to fit the model to.
        in_channels: number of channels to fit the model to.
        diffusion: "flow" or "ddpm", where the file leaves it open, as a SiT's and a DiT's tensors
            do; or options of the `FlowMatching` or the `DiffusionScheduler` that the model was
            trained with, such as `{"T": 1000, "schedule": "linear"}`, which override what is told.
        weights: the entry of a training checkpoint to take: "ema", "model" or another name, or
            several joined by dots. None prefers averaged weights.
        text_tokens: the most tokens of a prompt, where a model of text is not in the folder of its
            pipeline, which tells it: 120 of PixArt-alpha, 300 of Sigma.

    Returns:
        A fastdit.DiT, a PixArt or an MMDiT with its own copy of the weights. `model.cfg` is the
            config that was read or inferred, `model.diffusion` the options of the diffusion or the
            flow that the file tells or that are given, or None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the source is truncated or damaged, holds code, is no model of a known layout,
            or leaves a question open; the message says what it looks like, or how to answer.
    Warns:
        UserWarning: something was assumed, left out or made anew; the message says what.
    """
    told = _told(n_heads, null_class, img_size, text_tokens)
    found = read_source(source, weights, told)
    if found.header is not None:
        check_digests(found.name, found.content, found.header)
    elif found.pickle is not None:
        check_records(found.pickle)
    info, tensors = resolve(found, told, weights, diffusion, lenient=True)
    fitting = {"num_classes": num_classes, "img_size": told.img_size, "in_channels": in_channels}
    check_text_options(found.name, info.config, fitting)
    check_layers(found.name, info.config, tensors)
    model = empty_model(found.name, info.config)
    if found.header is None and found.config is None:
        kind = type(model).__name__
        tensors = without_extras(found.name, model.state_dict(), tensors, kind)
    check_keys(found.name, model.state_dict(), tensors)
    for key, t in tensors.items():
        if t.dtype not in FLOAT_DTYPES or t.layout != torch.strided or t.is_meta:
            kind = "a meta tensor" if t.is_meta else f"{t.dtype}, {t.layout}"
            raise ValueError(f"{found.name}: expected float weights, but {key} is {kind}")
        # Copied, since the file may change, tensors may share a storage, and a live model goes on.
        tensors[key] = t.detach().cpu().clone(memory_format=torch.contiguous_format)
    model.load_state_dict(tensors, assign=True)
    _say_assumed(found.name, info)
    if isinstance(model, DiT):
        model.pos_embed.requires_grad_(model.cfg.pos_embed == "learned")
        model, made = adapted(
            model, num_classes=num_classes, img_size=img_size, in_channels=in_channels
        )
        if made:
            warn(f"{found.name}: made anew for other data: {', '.join(made)}")
    model.diffusion = None if "diffusion" in info.assumed else info.diffusion
    return model


def inspect(
    path: str | os.PathLike[str],
    *,
    n_heads: int | None = None,
    null_class: bool | None = None,
    img_size: int | tuple[int, int] | None = None,
    diffusion: Mapping[str, Any] | str | None = None,
    weights: str | None = None,
    text_tokens: int | None = None,
) -> CheckpointInfo:
    """Return what a checkpoint holds besides its weights, stored or inferred from its tensors.

    The path is of a file or a folder that `load` reads. The options and errors are as for `load`;
    digests are not checked.
    """
    told = _told(n_heads, null_class, img_size, text_tokens)
    info, _ = resolve(read_source(path, weights, told), told, weights, diffusion)
    if told.img_size not in (None, info.config.img_size):
        raise ValueError(f"img_size: {path} says {info.config.img_size}, got {img_size}")
    return info


def verify(path: str | os.PathLike[str]) -> bool:
    """Return whether a file has checksums, and raise a ValueError if its content does not fit them.

    fastdit's own files have digests, except those of release 0.1.0, and PyTorch's have a CRC-32
    for each record.
    """
    if not Path(path).is_file():
        return False
    if is_pickle(path):
        return check_records(path)
    tensors, header = read_safetensors(path)
    return header is not None and check_digests(str(path), tensors, header)


def _told(
    n_heads: int | None, null_class: bool | None, img_size: Any, text_tokens: int | None
) -> Told:
    for name, number in (("n_heads", n_heads), ("text_tokens", text_tokens)):
        if number is not None:
            check_positive(name, number)
    if null_class is not None and not isinstance(null_class, bool):
        raise ValueError(f"null_class: expected True or False, got {null_class!r}")
    if img_size is not None:
        img_size = DiTConfig(img_size=img_size, patch_size=1).img_size
    return Told(n_heads, null_class, img_size, text_tokens=text_tokens)


def _say_assumed(name: str, info: CheckpointInfo) -> None:
    """Warn of what a checkpoint does not tell."""
    if not info.assumed:
        return
    values = info.config.to_dict()
    if info.diffusion is not None:
        values["diffusion"] = diffusions.in_words(info.diffusion)
    said = ", ".join(f"{option} {values.get(option)}" for option in info.assumed)
    advice = "pass what differs to load, or by options such as --diffusion"
    if not {"gelu", "context_start", "position_scale"}.isdisjoint(info.assumed):
        kind = MODELS[type(info.config)].__name__
        advice += (
            f", or build fastdit.{kind} with its options, call load_state_dict and fastdit.save"
        )
    warn(f"{name}: what it does not tell is assumed: {said}; {advice}")
