"""Finding out what a source's tensors are: config, diffusion, and fastdit's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdit.checkpoints import diffusions, folders, text_models, translation
from fastdit.checkpoints.diffusions import PUBLISHED_DIFFUSION
from fastdit.checkpoints.entries import check_plain, find_weights, pickled_attribute
from fastdit.checkpoints.inference import Told, bare_config
from fastdit.checkpoints.lora import adapters_of, check_no_adapter
from fastdit.checkpoints.matching import ModelConfig, describe_layout, kind_of
from fastdit.checkpoints.native import CheckpointInfo, info_of
from fastdit.checkpoints.projects import PROJECTS
from fastdit.checkpoints.runs import run_weights
from fastdit.checkpoints.sources import Source
from fastdit.checkpoints.text_inference import mmdit_config, pixart_config
from fastdit.checkpoints.text_originals import TEXT_PROJECTS, from_original
from fastdit.config import DiTConfig
from fastdit.errors import warn
from fastdit.text.layers import published_diffusion
from fastdit.text_config import MMDiTConfig, PixArtConfig

# The toy was published with 200 linear steps.
_TOY_DIFFUSION = PUBLISHED_DIFFUSION | {"T": 200}


def resolve(
    found: Source,
    told: Told,
    weights: str | None,
    diffusion: Mapping[str, Any] | str | None,
    lenient: bool = False,
) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """Return what a source is, and its tensors under fastdit's names.

    With `lenient` a stored diffusion that fastdit does not have is a warning, since the weights do
    not need it.
    """
    if found.header is not None:
        info = info_of(found.name, found.header)
        tensors = _own_tensors(found, weights)
    elif isinstance(found.config, ModelConfig):
        info, tensors = CheckpointInfo(found.config), dict(found.content)
        check_plain(tensors)
    else:
        info, tensors = _translate(found, told, weights)
        # A given diffusion replaces the stored one, which fastdit may not have.
        if found.folder is not None and diffusion is None:
            info = _with_stored_diffusion(info, found.folder, lenient)
    check_text_options(found.name, info.config, {"null_class": told.null_class})
    info = _with_text_tokens(info, found, told.text_tokens)
    for name in ("n_heads", "null_class"):
        given, own = getattr(told, name), getattr(info.config, name, None)
        if given not in (None, own):
            raise ValueError(f"{name}: {found.name} says {own}, got {given}")
    if diffusion is not None:
        info = replace(
            info,
            diffusion=diffusions.checked(diffusion, info.diffusion),
            assumed=tuple(name for name in info.assumed if name != "diffusion"),
            by_name=(),
        )
    return info, tensors


def check_text_options(name: str, config: ModelConfig, given: Mapping[str, Any]) -> None:
    """Raise a ValueError that names an option which makes no sense for a text-to-image model."""
    if isinstance(config, DiTConfig):
        return
    kind = kind_of(config)
    for option, value in given.items():
        if option == "img_size" and value not in (None, config.img_size):
            expected = f"{config.img_size}, as {name} says; a Sampler takes other sizes"
            raise ValueError(f"img_size: expected {expected}; got {value}")
        if option != "img_size" and value is not None:
            expected = f"None, since {name} is {kind}, which is not conditioned on classes"
            if option == "in_channels":
                expected = f"None, since {name} is {kind}, which is not fitted to other data"
            raise ValueError(f"{option}: expected {expected}; got {value}")


def _with_text_tokens(info: CheckpointInfo, found: Source, given: int | None) -> CheckpointInfo:
    """Return the info with a given limit of prompts, where the source does not tell another."""
    config = info.config
    if given is None:
        return info
    if isinstance(config, DiTConfig):
        expected = f"None, since {found.name} is a DiT, which takes no prompts"
        raise ValueError(f"text_tokens: expected {expected}; got {given}")
    bare = isinstance(found.config, Mapping) and found.pipeline not in text_models.PIPELINE_TOKENS
    if given != config.text_tokens and not (bare or "text_tokens" in info.assumed):
        raise ValueError(f"text_tokens: {found.name} says {config.text_tokens}, got {given}")
    assumed = tuple(name for name in info.assumed if name != "text_tokens")
    return replace(info, config=replace(config, text_tokens=given), assumed=assumed)


def _with_stored_diffusion(info: CheckpointInfo, folder: Path, lenient: bool) -> CheckpointInfo:
    """Return the info with the diffusion of a pipeline's folder, if it has one."""
    try:
        stored = folders.folder_diffusion(folder, flows=not isinstance(info.config, DiTConfig))
    except ValueError as error:
        if not lenient:
            raise
        warn(f"{error}; the weights are loaded without it")
        stored = None
    else:
        if stored is None:
            return info
    assumed = tuple(name for name in info.assumed if name != "diffusion")
    return replace(info, diffusion=stored, assumed=assumed)


def _own_tensors(found: Source, weights: str | None) -> dict[str, Tensor]:
    """Return the tensors of a model's file, or the chosen ones of a run's checkpoint."""
    assert found.header is not None
    if "recipe" in found.header:
        return run_weights(found.name, found.content, weights)
    if weights is not None:
        raise ValueError(
            f"weights: {found.name} holds one set of weights, got {weights!r}; the checkpoints of "
            "a run hold raw and averaged ones"
        )
    return dict(found.content)


def _translate(
    found: Source, told: Told, weights: str | None
) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """Return what another project's tensors are, and fastdit's state dict for them."""
    diffusion: dict[str, Any] | None = dict(PUBLISHED_DIFFUSION)
    by_name = False
    config: ModelConfig
    try:
        check_no_adapter(adapters_of(found.content))
        tensors = find_weights(found.content, weights)
        layout = translation.layout_of(tensors)
        if layout in PROJECTS:
            config, state = translation.from_facebook(tensors, told)
            file = found.name if found.is_file else ""
            told_by = diffusions.told_by_file(tensors, told.arguments, file, config)
            diffusion, by_name = told_by
        elif layout in TEXT_PROJECTS:
            config, state = from_original(layout, tensors, told)
            diffusion = published_diffusion(config)
        elif layout == "diffusers" and text_models.class_of(found.config) is not None:
            config, state = text_models.from_diffusers(
                tensors, found.config, told, found.pipeline, found.is_file
            )
            diffusion = published_diffusion(config)
        elif layout == "diffusers" and isinstance(found.config, Mapping):
            config, state = translation.from_diffusers(tensors, found.config)
            told.assumed.append("diffusion")
        elif layout == "fastdit":
            config, state = _own_config(found, tensors, told), dict(tensors)
            if not isinstance(config, DiTConfig):
                diffusion = published_diffusion(config)
            elif config.pos_embed == "learned":
                diffusion = dict(_TOY_DIFFUSION)
            told.assumed.append("diffusion")
        else:
            raise ValueError(f"expected a fastdit header, got none; {describe_layout(tensors)}")
    except ValueError as error:
        raise ValueError(f"{found.name}: {error}") from error
    if not found.is_file and "diffusion" in told.assumed:
        diffusion = None
        told.assumed.remove("diffusion")
    names = ("diffusion",) * by_name
    return CheckpointInfo(config, diffusion, found.labels, tuple(told.assumed), names), state


def _own_config(found: Source, tensors: Mapping[str, Tensor], told: Told) -> ModelConfig:
    """Return the config of a model of fastdit that was not saved by `fastdit.save`."""
    stored = pickled_attribute(found.content, "cfg")  # of a model that was pickled whole
    if "block_tables" in tensors:
        if stored is not None:
            return PixArtConfig.from_saved(stored)
        told.assumed += ["gelu", "ln_eps"]  # which leave no trace
        return pixart_config(tensors, told)
    if "pooled_embed.0.weight" in tensors:
        return mmdit_config(tensors, told) if stored is None else MMDiTConfig.from_saved(stored)
    return bare_config(tensors, told) if stored is None else DiTConfig.from_saved(stored)
