"""The names and rows of other projects' DiT checkpoints, translated to fastdit's and back.

facebookresearch/DiT stores modulation as (shift, scale, gate) and fastdit as (scale, shift, gate):
rows are permuted here, once, so that the model has one order. Nothing else of a weight changes,
and translating back gives the same bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastdit.config import PRESETS, DiTConfig

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
    renamed = {_renamed(name, _FACEBOOK): t for name, t in tensors.items()}
    state = {name: _swapped(name, t) for name, t in renamed.items()}
    return _published_config(state, n_heads), state


def to_facebook(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under facebookresearch/DiT's names; the inverse of `from_facebook`."""
    back = [(own, theirs) for theirs, own in reversed(_FACEBOOK)]
    return {_renamed(name, back): _swapped(name, t) for name, t in state.items()}


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def _swapped(name: str, rows: Tensor) -> Tensor:
    """Modulation's rows with shift and scale exchanged: its own inverse; other tensors as is."""
    if not _MODULATION.fullmatch(name):
        return rows
    parts = 2 if name.startswith("final_mod") else 6
    pieces = list(rows.chunk(parts))
    for i in range(0, parts, 3):
        pieces[i], pieces[i + 1] = pieces[i + 1], pieces[i]
    return torch.cat(pieces)


def _published_config(state: Mapping[str, Tensor], n_heads: int | None) -> DiTConfig:
    """What shapes tell of a published DiT; its other choices are those of every preset."""
    needed = ("pos_embed", "patch_embed.proj.weight", "t_embed.0.weight", "y_embed.weight")
    missing = [name for name in (*needed, "final_linear.weight") if name not in state]
    if missing:
        raise ValueError(f"the tensors that tell the config are not there: {', '.join(missing)}")
    shapes = {name: list(state[name].shape) for name in needed}
    if [len(shape) for shape in shapes.values()] != [3, 4, 2, 2]:
        raise ValueError(f"the tensors that tell the config have other shapes: {shapes}")
    D, C, p, _ = shapes["patch_embed.proj.weight"]
    layers = {int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in state) if m}
    known = {(c.n_layers, c.hidden): c.n_heads for c in PRESETS.values() if c.null_class}
    heads = n_heads or known.get((len(layers), D))
    if heads is None:
        raise ValueError(
            f"n_heads: shapes do not tell it, and no published DiT has {len(layers)} layers of "
            f"width {D}; pass n_heads="
        )
    return replace(
        PRESETS["DiT-XL/2"],
        img_size=math.isqrt(state["pos_embed"].shape[1]) * p,
        patch_size=p,
        in_channels=C,
        hidden=D,
        n_layers=len(layers),
        n_heads=heads,
        num_classes=len(state["y_embed.weight"]) - 1,
        t_embed_width=state["t_embed.0.weight"].shape[1],
        learn_sigma=len(state["final_linear.weight"]) == 2 * C * p * p,
    )
