"""The config of a model whose file does not store one: what its tensors tell, and what they do not.

Shapes tell every size. They do not tell the number of heads, whether the last class row is the null
row, or the sides of a grid that is not square. Those come from the caller or from the training
arguments beside the weights. What is left is the published models' choice, and is returned as
assumed, or is a question in an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastdit.checkpoints.projects import ROPE
from fastdit.config import PRESETS, DiTConfig
from fastdit.errors import height_and_width
from fastdit.model import sincos_pos_embed
from fastdit.text_config import TextConfig

_PUBLISHED_CLASSES = 1000  # of ImageNet
_MATRICES = ("t_embed.0.weight", "final_linear.weight")
_BOTTLENECK = "patch_embed.reduce.weight"
_DIMENSIONS = {"pos_embed": 3, "patch_embed.proj.weight": 4} | dict.fromkeys(_MATRICES, 2)


@dataclass
class Told:
    """What is known of a model besides its tensors.

    Attributes:
        n_heads, null_class, img_size, text_tokens: options of the config, from the caller; None is
            unknown.
        arguments: the training run's arguments, where the file has them.
        assumed: gets the names of the options that nothing told.
    """

    n_heads: int | None = None
    null_class: bool | None = None
    img_size: int | tuple[int, int] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)
    text_tokens: int | None = None


def published_config(state: Mapping[str, Tensor], told: Told) -> DiTConfig:
    """Return the config of a DiT of one of `projects`, whose tensors have fastdit's names.

    A table of rotary positions (`projects.ROPE`) may be among them.

    Raises:
        ValueError: a tensor that tells the config is missing, or an option is open.
    """
    D, C, p, layers = _sizes(state, "y_embed.weight")
    bottleneck, context = state.get(_BOTTLENECK), state.get("context_pos")
    qk_norm = _qk_norm(state)
    heads = _stored_heads(state, D) or _heads(layers, D, PRESETS["DiT-XL/2"], told)
    rows = len(state["y_embed.weight"])
    null = bottleneck is not None or _null_class(rows, told)  # JiT always drops labels
    parts = state.get("blocks.0.adaLN_modulation.weight")
    return replace(
        PRESETS["DiT-XL/2"],
        norm="rms" if "blocks.0.norm1.weight" in state else "layer",
        modulation_shift=parts is None or parts.dim() != 2 or len(parts) != 4 * D,
        qk_norm=qk_norm,
        qk_norm_eps=1e-5 if qk_norm == "layer" else 1e-6,  # of torch's LayerNorm; of their RMSNorms
        # JiT, whose patches pass a bottleneck, computes its rotary positions and stores none.
        rope=ROPE[0] in state or bottleneck is not None,
        mlp="swiglu" if "blocks.0.mlp.w12.weight" in state else "gelu",
        patch_bottleneck=None if bottleneck is None else len(bottleneck),
        context_tokens=None if context is None else _context_tokens(context),
        context_start=None if context is None else _context_start(layers, D, told),
        img_size=_image_size(state["pos_embed"], p, told),
        patch_size=p,
        in_channels=C,
        hidden=D,
        n_layers=layers,
        n_heads=heads,
        num_classes=rows - null,
        null_class=null,
        t_embed_width=state["t_embed.0.weight"].shape[1],
        learn_sigma=_learns_sigma(state, C, p),
    )


def bare_config(state: Mapping[str, Tensor], told: Told) -> DiTConfig:
    """Return the config of a bare state dict of a `fastdit.DiT`.

    Activations and epsilons leave no trace in the tensors. They are assumed to be the published
    toy's, or where positions are fixed those of the published DiTs.

    Raises:
        ValueError: a tensor that tells the config is missing, or an option is open.
    """
    D, C, p, layers = _sizes(state, *(["y_embed.weight"] if "y_embed.weight" in state else []))
    fixed = _grid_of_sincos(state["pos_embed"]) is not None
    like = PRESETS["DiT-XL/2" if fixed else "toy"]
    told.assumed += ["modulation_act", "gelu", "t_embed_act", "ln_eps"]
    rows = len(state["y_embed.weight"]) if "y_embed.weight" in state else 0
    null = False
    if rows and (fixed or told.null_class is not None):
        null = _null_class(rows, told)
    elif rows:
        told.assumed.append("null_class")
    width = state["t_embed.0.weight"].shape[1]
    return replace(
        like,
        img_size=_image_size(state["pos_embed"], p, told),
        patch_size=p,
        in_channels=C,
        hidden=D,
        n_layers=layers,
        n_heads=_heads(layers, D, like, told),
        num_classes=(rows or like.num_classes) - null,
        use_class_cond=rows > 0,
        null_class=null,
        t_embed_width=None if width == D else width,
        learn_sigma=_learns_sigma(state, C, p),
    )


def _qk_norm(state: Mapping[str, Tensor]) -> Literal["none", "layer", "rms"]:
    """Return the kind of norm of the queries and keys of a state's first block."""
    if "blocks.0.attn.q_norm.weight" not in state:
        return "none"
    return "layer" if "blocks.0.attn.q_norm.bias" in state else "rms"


def _stored_heads(state: Mapping[str, Tensor], width: int) -> int | None:
    """Return the number of heads if a tensor is as wide as a head."""
    for name in ("blocks.0.attn.q_norm.weight", ROPE[0]):
        if name in state:
            shape = list(state[name].shape)
            if not shape or not shape[-1] or width % shape[-1]:
                expected = f"as many values as a head, which divide the width {width}"
                raise ValueError(f"{name}: expected {expected}, got shape {shape}")
            return width // shape[-1]
    return None


def _context_tokens(positions: Tensor) -> int:
    if positions.dim() != 3 or not positions.shape[1]:
        got = list(positions.shape)
        raise ValueError(f"context_pos: expected shape [1, tokens, width], got {got}")
    return positions.shape[1]


def _context_start(layers: int, width: int, told: Told) -> int | None:
    """Return the number of blocks before the context tokens: as told, or a third as published."""
    given = told.arguments.get("context_start", "unknown")
    if given is None or (type(given) is int and given >= 0):
        return given or None
    published = {(c.n_layers, c.hidden): c.context_start for c in PRESETS.values()}
    if (known := published.get((layers, width))) is not None:
        return known
    told.assumed.append("context_start")
    return layers // 3 or None


def _heads(layers: int, width: int, like: DiTConfig, told: Told) -> int:
    """Return the number of heads: as told, as of the published size, or as of the toy."""
    heads = told.n_heads or _integer(told.arguments.get("n_heads"))
    if heads is not None:
        return heads
    known = {(c.n_layers, c.hidden): c.n_heads for c in PRESETS.values() if c.null_class}
    heads = known.get((layers, width))
    if heads is None and like.null_class:
        size = (
            f"{layers} layers of width {width}; pass n_heads= (--n-heads, also of fastdit convert)"
        )
        raise ValueError(f"n_heads: shapes do not tell it, and no published DiT has {size}")
    heads = heads or like.n_heads
    if width % heads:
        raise ValueError(
            f"n_heads: shapes do not tell it, and {heads}, the toy's, does not divide the width "
            f"{width}; pass n_heads="
        )
    if not like.null_class:
        told.assumed.append("n_heads")
    return heads


def count_layers(names: Iterable[str]) -> int:
    """Return the number of different blocks among the names of tensors."""
    found = (re.match(r"(?:transformer_|joint_)?blocks\.(\d{1,6})\.", name) for name in names)
    return len({m[1] for m in found if m})


def check_patches_and_layers(tensors: Mapping[str, Tensor], cfg: DiTConfig | TextConfig) -> Tensor:
    """Check that diffusers' tensors have the patches and the blocks that their config says.

    This is done before anything is allocated by the config, whose sizes cannot be trusted.

    Returns:
        The weight of the patches.

    Raises:
        ValueError: they differ.
    """
    patch, layers = tensors.get("pos_embed.proj.weight"), count_layers(tensors)
    wanted = [cfg.hidden, cfg.in_channels, cfg.patch_size, cfg.patch_size]
    if patch is None or list(patch.shape) != wanted or layers != cfg.n_layers:
        says = f"{cfg.n_layers} blocks and pos_embed.proj.weight of {wanted}"
        got = f"{layers} blocks and {'none' if patch is None else list(patch.shape)}"
        raise ValueError(f"config: says {says}, but the tensors have {got}")
    return patch


def _integer(value: Any) -> int | None:
    """Return a training argument if it can be a size."""
    return value if type(value) is int and value > 0 else None


def _sizes(state: Mapping[str, Tensor], *more: str) -> tuple[int, int, int, int]:
    """Return width, channels, patch size and layers, once the tensors that tell them are there."""
    dims = _DIMENSIONS | dict.fromkeys(more, 2)
    if _BOTTLENECK in state:
        dims = dims | {_BOTTLENECK: 4}
    missing = [name for name in dims if name not in state]
    if missing:
        raise ValueError(f"tensors that tell the config are missing: {', '.join(missing)}")
    shapes = {name: list(state[name].shape) for name in dims}
    if [len(shape) for shape in shapes.values()] != list(dims.values()):
        raise ValueError(f"tensors that tell the config have unexpected dimensions: {shapes}")
    D, C, p, _ = shapes["patch_embed.proj.weight"]
    if _BOTTLENECK in shapes:
        _, C, p, _ = shapes[_BOTTLENECK]
    if 0 in (D, C, p, *shapes["pos_embed"]):
        raise ValueError(f"tensors that tell the config are empty: {shapes}")
    return D, C, p, count_layers(state)


def _null_class(rows: int, told: Told) -> bool:
    """Return whether the last of the class rows is the null row."""
    if told.null_class is not None:
        return told.null_class
    classes = _integer(told.arguments.get("num_classes"))
    if classes in (rows, rows - 1):
        return classes == rows - 1
    if rows in (_PUBLISHED_CLASSES, _PUBLISHED_CLASSES + 1):
        return rows > _PUBLISHED_CLASSES
    raise ValueError(
        f"null_class: the class embedding has {rows} rows, which are {rows - 1} classes and a null "
        f"row if labels were dropped in training, and {rows} classes if not; pass null_class=True "
        "or False (--null-class or --no-null-class, also of fastdit convert)"
    )


def _learns_sigma(state: Mapping[str, Tensor], channels: int, patch: int) -> bool:
    """Return whether the final linear has rows for a variance too."""
    return len(state["final_linear.weight"]) == 2 * channels * patch**2


def _image_size(pos_embed: Tensor, patch: int, told: Told) -> int | tuple[int, int]:
    """Return the size of the images whose patches have these positions."""
    tokens = pos_embed.shape[1]
    grid = _grid_of_sincos(pos_embed)
    if grid is not None:
        return grid[0] * patch, grid[1] * patch
    for size in (told.img_size, told.arguments.get("img_size")):
        try:
            height, width = height_and_width("img_size", size, patch)
        except ValueError:
            continue  # a training argument may be anything, and the caller's is checked later
        if (height // patch) * (width // patch) == tokens:
            return height, width
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise ValueError(
            f"img_size: shapes do not tell it, and {tokens} patches are no square; pass "
            "img_size=(height, width) (--img-size HEIGHTxWIDTH, also of fastdit convert)"
        )
    told.assumed.append("img_size")
    return side * patch


def _grid_of_sincos(pos_embed: Tensor) -> tuple[int, int] | None:
    """Return the grid (rows, columns) whose sine-cosine positions these are, or None."""
    _, tokens, width = pos_embed.shape
    if pos_embed.is_meta or pos_embed.layout != torch.strided or width % 4:
        return None
    stored = pos_embed.detach().to("cpu", torch.float64)
    # The square first, since it is the usual one. A bfloat16 value near 1 is off by 0.004 at most.
    divisors = [r for r in range(1, tokens + 1) if tokens % r == 0]
    for rows in sorted(divisors, key=lambda r: abs(math.log(r * r / tokens))):
        grid = rows, tokens // rows
        if (sincos_pos_embed(width, grid) - stored).abs().max() < 0.01:
            return grid
    return None
