"""Comparing a file's tensors with those that a model has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.checkpoints import translation
from fastdit.config import DiTConfig
from fastdit.errors import first_few, warn
from fastdit.model import DiT, config_of
from fastdit.text import MMDiT, PixArt, TextModel
from fastdit.text_config import MMDiTConfig, PixArtConfig, TextConfig

Model = DiT | PixArt | MMDiT
ModelConfig = DiTConfig | TextConfig
MODELS: dict[Any, Any] = {DiTConfig: DiT, PixArtConfig: PixArt, MMDiTConfig: MMDiT}

_SHOWN_KEYS = 4
# Top-level names of tensors that take part in a forward that a {kind} does not have.
_OTHER_NETWORK = ("rope", "freqs", "norm", "embed", "blocks", "final", "context", "token")


def model_config(model: nn.Module) -> ModelConfig | None:
    """Return the config of a DiT, a PixArt or an MMDiT; None for other models."""
    return model.cfg if isinstance(model, TextModel) else config_of(model)


def kind_of(config: ModelConfig) -> str:
    """Return what a config's model is in a sentence, such as "an MMDiT"."""
    name = MODELS[type(config)].__name__
    return f"an {name}" if name == "MMDiT" else f"a {name}"


def dit_config(source: object, config: ModelConfig) -> DiTConfig:
    """Return a DiT's config as it is; that of a text-to-image model is a ValueError."""
    if not isinstance(config, DiTConfig):
        got = f"{kind_of(config)} of prompts"
        raise ValueError(f"{source}: expected a DiT, which takes labels, got {got}")
    return config


def empty_model(source: str, config: ModelConfig) -> Model:
    """Build the config's model without allocating memory or drawing random numbers."""
    try:
        with torch.device("meta"):
            return MODELS[type(config)].from_config(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"{source}: a model of this config cannot be built ({error})") from error


def check_layers(source: str, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for more layers than tensors, before so many layers are built."""
    if config.n_layers > len(tensors):
        got = f"{len(tensors)} tensors"
        raise ValueError(f"{source}: expected tensors of {config.n_layers} layers, got {got}")


def check_keys(source: str, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that names missing, unexpected and misshapen tensors, if there are any."""
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"missing {first_few(missing, _SHOWN_KEYS)}")
    if unexpected := [name for name in tensors if name not in expected]:
        problems.append(f"unexpected {first_few(unexpected, _SHOWN_KEYS)}")
    for name, tensor in expected.items():
        if name in tensors and tensors[name].shape != tensor.shape:
            want, got = list(tensor.shape), list(tensors[name].shape)
            problems.append(f"{name}: expected shape {want}, got {got}")
    if problems:
        said = problems[:_SHOWN_KEYS]
        if translation.layout_of(tensors) != "fastdit":
            said.append(describe_layout(tensors))
        what = "the tensors do not fit the config (in fastdit's names)"
        raise ValueError(f"{source}: {what}: {'; '.join(said)}")


def without_extras(
    source: str, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], kind: str = "DiT"
) -> dict[str, Tensor]:
    """Leave out what a training run kept beside its model, such as REPA's projectors.

    Tensors whose names say that the network computes with them stay, and so become errors.

    Warns:
        UserWarning: names the parts that were left out.
    """
    extra = [name for name in tensors if name not in expected]
    extra = [n for n in extra if not any(word in n.partition(".")[0] for word in _OTHER_NETWORK)]
    if extra:
        parts = list(dict.fromkeys(name.rpartition(".")[0] or name for name in extra))
        said = first_few(parts, _SHOWN_KEYS)
        warn(f"{source}: left out {len(extra)} tensors that a {kind} does not have ({said})")
    left = set(extra)
    return {name: t for name, t in tensors.items() if name not in left}


def describe_layout(keys: Mapping[str, Any] | Sequence[str]) -> str:
    """Say what tensors with these names look like."""
    layout = translation.layout_of(keys)
    if layout is None:
        return f"the keys ({first_few(list(keys), _SHOWN_KEYS)}) are not of a known layout"
    if layout == "diffusers":
        return f"the keys look like those of {layout}: pass the folder, which has a config.json"
    return f"the keys look like those of {layout}"
