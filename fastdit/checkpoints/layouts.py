"""The names and rows of other projects' DiT checkpoints, translated to fastdit's and back.

Others store modulation as (shift, scale, gate) and fastdit as (scale, shift, gate): rows are
permuted here, once, so that the model has one order. No value of a weight changes, and translating
back gives the same bits.

diffusers keeps queries, keys and values apart, computes its positions, and copies the embedders
into every block. Its network differs from the published one in numbers too: timestep frequencies
divide by half the width less one, and the LayerNorm before an MLP has an epsilon of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastdit.config import PRESETS, DiTConfig
from fastdit.model import sincos_pos_embed

# A key that begins so is found in every checkpoint of the layout, and in no other's.
MARKS = {
    "patch_embed.": "fastdit",
    "x_embedder.": "facebookresearch/DiT",
    "transformer_blocks.": "diffusers",
}

# (theirs, fastdit's), parts of names; replaced in this order.
_FACEBOOK = (
    ("x_embedder.", "patch_embed."),
    ("t_embedder.mlp.", "t_embed."),
    ("y_embedder.embedding_table.", "y_embed."),
    (".mlp.fc1.", ".mlp.0."),
    (".mlp.fc2.", ".mlp.2."),
    ("final_layer.adaLN_modulation.1.", "final_mod."),
    ("final_layer.linear.", "final_linear."),
    (".adaLN_modulation.1.", ".adaLN_modulation."),
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
_MODULATION = re.compile(r"(blocks\.\d+\.adaLN_modulation|final_mod)\.(weight|bias)")


def layout_of(keys: Iterable[str]) -> str | None:
    """The name in MARKS' values that a checkpoint's keys belong to, or None."""
    keys = list(keys)
    for mark, name in MARKS.items():
        if any(key.startswith(mark) for key in keys):
            return name
    return None


def from_facebook(
    tensors: Mapping[str, Tensor], n_heads: int | None
) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Config and state dict of a facebookresearch/DiT state dict.

    Args:
        tensors: its state dict.
        n_heads: None takes that of the published model of this depth and width.

    Raises:
        ValueError: a tensor that tells the config is missing, or n_heads is not to be told.
    """
    state: dict[str, Tensor] = {}
    for name, t in tensors.items():
        _add(state, _renamed(name, _FACEBOOK), t)
    return _published_config(state, n_heads), state


def to_facebook(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under facebookresearch/DiT's names; the inverse of `from_facebook`."""
    back = [(own, theirs) for theirs, own in reversed(_FACEBOOK)]
    return {_renamed(name, back): _swapped(name, t) for name, t in state.items()}


def from_diffusers(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Config and state dict of diffusers' `DiTTransformer2DModel`.

    Args:
        tensors: its state dict.
        config: its `config.json`, or a live model's `config`.

    Raises:
        ValueError: the config is of another model, or its blocks' embedders differ.
    """
    cfg = _diffusers_config(config)
    # Before anything of the config's size is made: a config may say what it likes.
    patch = tensors.get("pos_embed.proj.weight")
    wanted = [cfg.hidden, cfg.in_channels, cfg.patch_size, cfg.patch_size]
    if patch is None or list(patch.shape) != wanted or _count_layers(tensors) != cfg.n_layers:
        got = "none" if patch is None else f"{list(patch.shape)}"
        raise ValueError(
            f"config: says {cfg.n_layers} blocks and pos_embed.proj.weight of {wanted}; the "
            f"tensors are of {_count_layers(tensors)} blocks and {got}"
        )
    state: dict[str, Tensor] = {}
    for name, t in tensors.items():
        name = _renamed(name, _DIFFUSERS)
        if (embedder := re.sub(r"^blocks\.\d+\.norm1\.emb\.", "", name)) != name:
            name = _renamed(embedder, _DIFFUSERS_EMBEDDER)
            if name in state and not torch.equal(state[name], t):
                raise ValueError(
                    f"the embedders of its blocks differ ({name}); a DiT has one for all"
                )
            state[name] = t
        else:
            _add(state, name, t)
    for i in range(cfg.n_layers):
        for kind in ("weight", "bias"):
            parts = [f"blocks.{i}.attn1.to_{n}.{kind}" for n in "qkv"]
            if all(part in state for part in parts):  # else the names that are left tell
                state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([state.pop(p) for p in parts])
    state["pos_embed"] = sincos_pos_embed(cfg.hidden, cfg.grid).to(patch.dtype)
    return cfg, state


def to_diffusers(
    cfg: DiTConfig, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`config.json` and state dict for diffusers; the inverse of `from_diffusers`.

    Raises:
        ValueError: diffusers' model has no such choice.
    """
    config = {
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
    told = replace(_diffusers_config(config), init=cfg.init)
    if told != cfg:
        raise ValueError(f"diffusers holds such DiTs only as {told}; got {cfg}")
    back = [(own, theirs) for theirs, own in reversed(_DIFFUSERS)]
    embedder = [(own, theirs) for theirs, own in _DIFFUSERS_EMBEDDER]
    out: dict[str, Tensor] = {}
    for name, t in state.items():
        t = _swapped(name, t)
        if name == "pos_embed":
            if not torch.equal(t.cpu(), sincos_pos_embed(cfg.hidden, cfg.grid).to(t.dtype)):
                raise ValueError("diffusers computes positions, and this model's are other ones")
            continue
        if name.startswith(("t_embed.", "y_embed.")):
            for i in range(cfg.n_layers):
                theirs = _renamed(name, embedder)
                out[f"transformer_blocks.{i}.norm1.emb.{theirs}"] = t.clone()
        elif ".attn.qkv." in name:
            block, _, kind = name.partition(".attn.qkv.")
            for n, part in zip("qkv", t.chunk(3), strict=True):
                out[f"transformer_{block}.attn1.to_{n}.{kind}"] = part.clone()
        else:
            out[_renamed(name, back)] = t
    return config, out


def _diffusers_config(config: Mapping[str, Any]) -> DiTConfig:
    """The config of a diffusers DiT, with what its code has fixed."""
    expected = {
        "_class_name": ("DiTTransformer2DModel", "Transformer2DModel"),
        "norm_type": ("ada_norm_zero",),
        "activation_fn": ("gelu-approximate", "gelu"),
        "attention_bias": (True,),
        "norm_elementwise_affine": (False,),
    }
    for key, known in expected.items():
        if config.get(key, known[0]) not in known:
            raise ValueError(
                f"config: expected {key} to be one of {', '.join(map(str, known))}, got "
                f"{config[key]!r}"
            )
    numbers = {
        key: config.get(key)
        for key in (
            *("num_attention_heads", "attention_head_dim", "in_channels", "num_layers"),
            *("sample_size", "patch_size", "num_embeds_ada_norm"),
        )
    }
    for key, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**20:
            raise ValueError(f"config: expected {key} to be a positive integer, got {value!r:.40}")
    n = SimpleNamespace(**numbers)
    out_channels, norm_eps = config.get("out_channels"), config.get("norm_eps", 1e-5)
    if out_channels not in (None, n.in_channels, 2 * n.in_channels):
        raise ValueError(
            f"config: expected out_channels of {n.in_channels} or {2 * n.in_channels}, got "
            f"{out_channels!r:.40}"
        )
    if not isinstance(norm_eps, float):
        raise ValueError(f"config: expected norm_eps to be a float, got {norm_eps!r:.40}")
    return replace(
        PRESETS["DiT-XL/2"],
        img_size=n.sample_size,
        patch_size=n.patch_size,
        in_channels=n.in_channels,
        hidden=n.num_attention_heads * n.attention_head_dim,
        n_layers=n.num_layers,
        n_heads=n.num_attention_heads,
        num_classes=n.num_embeds_ada_norm,
        gelu="erf" if config.get("activation_fn") == "gelu" else "tanh",
        mlp_ln_eps=norm_eps,
        t_freq_shift=1,
        learn_sigma=out_channels == 2 * n.in_channels,
    )


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def _add(state: dict[str, Tensor], name: str, t: Tensor) -> None:
    if name in state:
        raise ValueError(f"two of its tensors are {name}")
    state[name] = _swapped(name, t)


def _swapped(name: str, rows: Tensor) -> Tensor:
    """Modulation's rows with shift and scale exchanged: its own inverse; other tensors as is."""
    parts = 2 if name.startswith("final_mod") else 6
    if not _MODULATION.fullmatch(name) or not rows.dim() or len(rows) % parts:
        return rows  # of another shape than it should be, it is named by who compares them
    pieces = list(rows.chunk(parts))
    for i in range(0, parts, 3):
        pieces[i], pieces[i + 1] = pieces[i + 1], pieces[i]
    return torch.cat(pieces)


def _count_layers(names: Iterable[str]) -> int:
    found = (re.match(r"(?:transformer_)?blocks\.(\d{1,6})\.", name) for name in names)
    return len({m[1] for m in found if m})


def _published_config(state: Mapping[str, Tensor], n_heads: int | None) -> DiTConfig:
    """What shapes tell of a published DiT; its other choices are those of every preset."""
    needed = (
        *("pos_embed", "patch_embed.proj.weight", "t_embed.0.weight", "y_embed.weight"),
        "final_linear.weight",
    )
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"the tensors that tell the config are not there: {', '.join(missing)}")
    shapes = {name: list(state[name].shape) for name in needed}
    if [len(shape) for shape in shapes.values()] != [3, 4, 2, 2, 2]:
        raise ValueError(f"the tensors that tell the config have other shapes: {shapes}")
    D, C, p, _ = shapes["patch_embed.proj.weight"]
    layers = _count_layers(state)
    known = {(c.n_layers, c.hidden): c.n_heads for c in PRESETS.values() if c.null_class}
    heads = known.get((layers, D)) if n_heads is None else n_heads
    if heads is None:
        raise ValueError(
            f"n_heads: shapes do not tell it, and no published DiT has {layers} layers of "
            f"width {D}; pass n_heads= (fastdit convert --n-heads)"
        )
    return replace(
        PRESETS["DiT-XL/2"],
        img_size=math.isqrt(state["pos_embed"].shape[1]) * p,
        patch_size=p,
        in_channels=C,
        hidden=D,
        n_layers=layers,
        n_heads=heads,
        num_classes=len(state["y_embed.weight"]) - 1,
        t_embed_width=state["t_embed.0.weight"].shape[1],
        learn_sigma=len(state["final_linear.weight"]) == 2 * C * p * p,
    )
