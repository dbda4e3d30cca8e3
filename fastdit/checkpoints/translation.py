"""Translation of other projects' DiT checkpoints, names and rows, to fastdit's layout and back.

The other projects store modulation as (shift, scale, gate) and fastdit as (scale, shift, gate).
The rows are permuted here, so that the model needs to know one order only; where there are no
shifts, both are (scale, gate). No value of a weight changes, and translating back gives the same
bits.

SiT, LightningDiT, REPA and JiT extend the names of facebookresearch/DiT (`projects`), and are
translated as it is.

diffusers stores queries, keys and values separately, computes its position embedding, and has
embedders in every block; those of a model that was trained elsewhere are copies. Its network also
differs from the published one in numbers: the timestep frequencies' exponents are divided by half
the width less one, and the LayerNorms before the MLPs have an epsilon of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdit.checkpoints.inference import Told, check_patches_and_layers, published_config
from fastdit.checkpoints.options import check_choices, check_out_channels, float_of, size_of
from fastdit.checkpoints.projects import (
    DIT,
    JIT,
    LIGHTNING,
    check_expressible,
    projects_of,
    rope_tensors,
    take_rope,
    without_legacy_names,
)
from fastdit.checkpoints.text_originals import text_project_of
from fastdit.config import PRESETS, DiTConfig
from fastdit.model import sincos_pos_embed

# Every checkpoint of a layout has a key with this prefix, and no checkpoint of another has one.
PREFIXES = {
    "patch_embed.": "fastdit",
    "x_embedder.": DIT,
    "transformer_blocks.": "diffusers",
}

# Pairs of parts of names, the project's and fastdit's, which are replaced in this order.
_AFTER_PATCHES = (
    ("t_embedder.mlp.", "t_embed."),
    ("y_embedder.embedding_table.", "y_embed."),
    (".mlp.fc1.", ".mlp.0."),
    (".mlp.fc2.", ".mlp.2."),
    ("final_layer.adaLN_modulation.1.", "final_mod."),
    ("final_layer.linear.", "final_linear."),
    ("final_layer.norm_final.", "final_norm."),
    (".adaLN_modulation.1.", ".adaLN_modulation."),
    ("in_context_posemb", "context_pos"),
)
_FACEBOOK = (("x_embedder.", "patch_embed."), *_AFTER_PATCHES)
_JIT = (
    ("x_embedder.proj1.", "patch_embed.reduce."),
    ("x_embedder.proj2.", "patch_embed.proj."),
    *_AFTER_PATCHES,
)
_DIFFUSERS = (
    ("pos_embed.proj.", "patch_embed.proj."),
    ("transformer_blocks.", "blocks."),
    (".norm1.linear.", ".adaLN_modulation."),
    (".attn1.to_out.0.", ".attn.proj."),
    (".ff.net.0.proj.", ".mlp.0."),
    (".ff.net.2.", ".mlp.2."),
    ("proj_out_1.", "final_mod."),
    ("proj_out_2.", "final_linear."),
)
_DIFFUSERS_EMBEDDER = (
    ("timestep_embedder.linear_1.", "t_embed.0."),
    ("timestep_embedder.linear_2.", "t_embed.2."),
    ("class_embedder.embedding_table.", "y_embed."),
)
# The options of diffusers' DiT that are choices.
_CHOICES = {
    "_class_name": ("DiTTransformer2DModel", "Transformer2DModel"),
    "norm_type": ("ada_norm_zero",),
    "activation_fn": ("gelu-approximate", "gelu"),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
}
_SWAPS = {2: (1, 0), 6: (1, 0, 2, 4, 3, 5)}  # orders of a modulation's parts
_MODULATION = re.compile(r"(blocks\.\d+\.adaLN_modulation|final_mod)\.(weight|bias)")


def layout_of(keys: Iterable[str]) -> str | None:
    """Return the name of the layout that a checkpoint's keys belong to, or None.

    A SiT's keys are those of facebookresearch/DiT.
    """
    keys = list(keys)
    found = (name for key in keys for start, name in PREFIXES.items() if key.startswith(start))
    layout = next(found, None)
    if layout != DIT:
        return layout
    return text_project_of(keys) or next(iter(projects_of(keys)), DIT)


def from_facebook(tensors: Mapping[str, Tensor], told: Told) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Return the config and fastdit's state dict for one of `projects`.

    Args:
        tensors: the project's state dict.
        told: what is known of the model besides its tensors; it gets what was assumed.

    Raises:
        ValueError: a tensor that the config is inferred from is missing, an option of the config
            is open, or stored rotary positions are not those of the config.
    """
    names = _JIT if JIT in projects_of(tensors) else _FACEBOOK
    parts = _block_parts(tensors.get("blocks.0.adaLN_modulation.1.weight"))
    state: dict[str, Tensor] = {}
    for name, t in without_legacy_names(tensors).items():
        _add(state, _renamed(name, names), t, parts)
    cfg = published_config(state, told)
    take_rope(state, cfg)
    return cfg, state


def to_facebook(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict in the names of `projects`; the inverse of `from_facebook`.

    Raises:
        ValueError: the blocks have embedders of their own, or the model has no classes.
    """
    if "t_embed.0.weight" not in state:
        raise ValueError("layout: that of facebookresearch/DiT has no embedders='block'")
    if "y_embed.weight" not in state:
        raise ValueError("layout: that of facebookresearch/DiT has class conditioning, got none")
    names = _JIT if "patch_embed.reduce.weight" in state else _FACEBOOK
    parts = _block_parts(state.get("blocks.0.adaLN_modulation.weight"))
    return {_renamed_back(name, names): _swapped(name, t, parts) for name, t in state.items()}


def to_project(project: str, cfg: DiTConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict that the model of one of `projects` loads.

    Raises:
        ValueError: the project's model cannot express the config.
    """
    theirs = to_facebook(state)
    check_expressible(project, cfg)
    if cfg.rope and project == LIGHTNING:
        dtype = state["pos_embed"].dtype
        theirs |= {name: t.to(dtype) for name, t in rope_tensors(cfg).items()}
    told = Told(cfg.n_heads, cfg.null_class, cfg.img_size, cfg.to_dict())
    stored, _ = from_facebook(theirs, told)
    _check_stored(repr(project), replace(stored, init=cfg.init), cfg)
    return theirs


def _check_stored(layout: str, stored: DiTConfig, cfg: DiTConfig) -> None:
    """Raise a ValueError that names the options which are not read back as they are."""
    kept, own = stored.to_dict(), cfg.to_dict()
    different = [name for name in own if kept[name] != own[name]]
    if different:
        only, got = (", ".join(f"{n}={o[n]!r}" for n in different) for o in (kept, own))
        raise ValueError(f"layout: {layout} can store such a DiT only as {only}; got {got}")


def from_diffusers(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Return the config and fastdit's state dict for diffusers' `DiTTransformer2DModel`.

    Args:
        tensors: its state dict.
        config: the content of its `config.json`, or a live model's `config`.

    Raises:
        ValueError: the config is another model's or does not fit the tensors.
    """
    cfg = _config_from_diffusers(config)
    patch = check_patches_and_layers(tensors, cfg)
    state: dict[str, Tensor] = {}
    embedders: dict[str, dict[str, Tensor]] = {}  # the tensors of each name, by their block
    for name, t in tensors.items():
        name = _renamed(name, _DIFFUSERS)
        if own := re.fullmatch(r"(blocks\.\d+)\.norm1\.emb\.(.+)", name):
            embedders.setdefault(_renamed(own[2], _DIFFUSERS_EMBEDDER), {})[own[1]] = t
        else:
            _add(state, name, t)
    firsts = {name: next(iter(of_blocks.values())) for name, of_blocks in embedders.items()}
    for name, of_blocks in embedders.items():
        if not all(torch.equal(firsts[name], t) for t in of_blocks.values()):
            cfg = replace(cfg, embedders="block")
    if cfg.embedders == "shared":
        state |= firsts
    else:
        state |= {f"{at}.{name}": t for name, own in embedders.items() for at, t in own.items()}
    for i in range(cfg.n_layers):
        for kind in ("weight", "bias"):
            parts = [f"blocks.{i}.attn1.to_{n}.{kind}" for n in "qkv"]
            if all(part in state for part in parts):  # if not, load() reports the other names
                state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([state.pop(p) for p in parts])
    state["pos_embed"] = sincos_pos_embed(cfg.hidden, cfg.grid).to(patch.dtype)
    return cfg, state


def to_diffusers(
    cfg: DiTConfig, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return `config.json` and the state dict for diffusers; the inverse of `from_diffusers`.

    Raises:
        ValueError: diffusers' model cannot express the config or the position embedding.
    """
    if not isinstance(cfg.img_size, int):
        expected = "that of diffusers has square images only"
        raise ValueError(f"layout: {expected}, got img_size {cfg.img_size}")
    config = diffusers_config(cfg)
    stored = replace(_config_from_diffusers(config), init=cfg.init, embedders=cfg.embedders)
    _check_stored("diffusers", stored, cfg)
    out: dict[str, Tensor] = {}
    for name, t in state.items():
        t = _swapped(name, t)
        if name == "pos_embed":
            if not torch.equal(t.cpu(), sincos_pos_embed(cfg.hidden, cfg.grid).to(t.dtype)):
                raise ValueError("pos_embed: expected the one that diffusers computes")
            continue
        if own := re.fullmatch(r"(?:blocks\.(\d+)\.)?([ty]_embed\..+)", name):
            theirs = _renamed_back(own[2], _DIFFUSERS_EMBEDDER)
            for i in range(cfg.n_layers) if own[1] is None else [own[1]]:
                out[f"transformer_blocks.{i}.norm1.emb.{theirs}"] = t.clone()
        elif ".attn.qkv." in name:
            block, _, kind = name.partition(".attn.qkv.")
            for n, part in zip("qkv", t.chunk(3), strict=True):
                out[f"transformer_{block}.attn1.to_{n}.{kind}"] = part.clone()
        else:
            out[_renamed_back(name, _DIFFUSERS)] = t
    return config, out


def diffusers_config(cfg: DiTConfig) -> dict[str, Any]:
    """Return the content of `config.json` for a config, whether diffusers can express it or not."""
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": cfg.n_heads,
        "attention_head_dim": cfg.head_dim,
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "num_layers": cfg.n_layers,
        "sample_size": cfg.img_size,
        "patch_size": cfg.patch_size,
        "activation_fn": "gelu-approximate" if cfg.gelu == "tanh" else "gelu",
        "attention_bias": True,
        "num_embeds_ada_norm": cfg.num_classes,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": cfg.mlp_ln_eps or cfg.ln_eps,
    }


def _config_from_diffusers(config: Mapping[str, Any]) -> DiTConfig:
    """Return the config of a DiT of diffusers; choices that its code fixes are filled in."""
    check_choices(config, _CHOICES)
    n_heads, channels = size_of(config, "num_attention_heads"), size_of(config, "in_channels")
    check_out_channels(config, channels)
    return replace(
        PRESETS["DiT-XL/2"],
        img_size=size_of(config, "sample_size"),
        patch_size=size_of(config, "patch_size"),
        in_channels=channels,
        hidden=n_heads * size_of(config, "attention_head_dim"),
        n_layers=size_of(config, "num_layers"),
        n_heads=n_heads,
        num_classes=size_of(config, "num_embeds_ada_norm"),
        gelu="erf" if config.get("activation_fn") == "gelu" else "tanh",
        mlp_ln_eps=float_of(config, "norm_eps", 1e-5),
        t_freq_shift=1,
        learn_sigma=config.get("out_channels") == 2 * channels,
    )


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def _renamed_back(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    return _renamed(name, [(own, theirs) for theirs, own in reversed(pairs)])


def _add(state: dict[str, Tensor], name: str, t: Tensor, block_parts: int = 6) -> None:
    if name in state:
        raise ValueError(f"two tensors have the name {name}")
    state[name] = _swapped(name, t, block_parts)


def _block_parts(weight: Tensor | None) -> int:
    """Return the number of parts of a block's modulation, whose linear has this weight."""
    whole = weight is not None and weight.dim() == 2 and weight.shape[1] > 0
    return len(weight) // weight.shape[1] if whole else 6  # type: ignore[union-attr, arg-type]


def _swapped(name: str, rows: Tensor, block_parts: int = 6) -> Tensor:
    """Return a modulation's rows with shift and scale exchanged, and any other tensor as it is."""
    parts = 2 if name.startswith("final_mod") else block_parts
    # Without shifts nothing is exchanged; a wrong shape is reported where shapes are compared.
    if not _MODULATION.fullmatch(name) or parts not in _SWAPS or not rows.dim():
        return rows
    if len(rows) % parts:
        return rows
    pieces = rows.chunk(parts)
    return torch.cat([pieces[i] for i in _SWAPS[parts]])
