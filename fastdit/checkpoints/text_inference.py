"""The config of a text-to-image model whose file does not store one, by its tensors.

Shapes tell every size but the number of heads, and positions the size of the images. What is left
is the published models' choice, and is returned as assumed, or is a question in an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastdit.checkpoints.inference import Told, count_layers
from fastdit.functional import sincos_pos_embed
from fastdit.text_config import TEXT_PRESETS, MMDiTConfig, PixArtConfig

_POSITION_SCALES = (1.0, 2.0, 4.0, 0.5)  # of the published PixArts
_LARGEST_ERROR = 0.01  # of positions in bfloat16, which are off by 0.004 near 1
_SD3_HEAD_DIM = 64
_SHAPES = {"patch_embed.proj.weight": 4, "final_linear.weight": 2, "t_embed.0.weight": 2}


def pixart_config(
    state: Mapping[str, Tensor], told: Told, text_tokens: int | None = None
) -> PixArtConfig:
    """Return the config of a PixArt by its tensors, which have fastdit's names.

    Args:
        state: the tensors; a table of positions "pos_embed" may be among them.
        told: what is known besides; it gets what was assumed.
        text_tokens: the most tokens of a prompt; None assumes those of Sigma.

    Raises:
        ValueError: a tensor that tells the config is missing, or an option is open.
    """
    width_from = "text_embed.0.weight"
    projected = width_from in state
    if not projected:
        width_from = "blocks.0.cross.kv.weight"
    _check_dimensions(state, _SHAPES | {width_from: 2, "block_tables": 3})
    D, C, p, _ = state["patch_embed.proj.weight"].shape
    layers = len(state["block_tables"])
    size, scale = _pixart_size(state.get("pos_embed"), p, told)
    if text_tokens is None:
        told.assumed.append("text_tokens")
    return PixArtConfig(
        img_size=size,
        patch_size=p,
        in_channels=C,
        hidden=D,
        n_layers=layers,
        n_heads=told.n_heads or _pixart_heads(layers, D),
        text_width=state[width_from].shape[1],
        text_tokens=text_tokens or TEXT_PRESETS["PixArt-Sigma-XL/2-1024"].text_tokens,
        text_projection=projected,
        size_conditions="size_embed.0.weight" in state,
        position_scale=scale,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        learn_sigma=len(state["final_linear.weight"]) == 2 * C * p**2,
    )


def mmdit_config(state: Mapping[str, Tensor], told: Told) -> MMDiTConfig:
    """Return the config of an MMDiT by its tensors, which have fastdit's names.

    Raises:
        ValueError: a tensor that tells the config is missing, or an option is open.
    """
    more = {"pos_embed": 3, "text_embed.weight": 2, "pooled_embed.0.weight": 2}
    _check_dimensions(state, _SHAPES | more)
    D, C, p, _ = state["patch_embed.proj.weight"].shape
    layers, side = count_layers(state), math.isqrt(state["pos_embed"].shape[1])
    norm = state.get("blocks.0.image.attn.q_norm.weight")
    dual = [i for i in range(layers) if f"blocks.{i}.image.dual.qkv.weight" in state]
    return MMDiTConfig(
        img_size=_mmdit_size(state["pos_embed"], side, p, told),
        patch_size=p,
        in_channels=C,
        hidden=D,
        n_layers=layers,
        n_heads=told.n_heads or _mmdit_heads(D, norm),
        text_width=state["text_embed.weight"].shape[1],
        pooled_width=state["pooled_embed.0.weight"].shape[1],
        position_size=side,
        qk_norm="none" if norm is None else "rms",
        dual_blocks=tuple(dual),
    )


def _check_dimensions(state: Mapping[str, Tensor], dims: Mapping[str, int]) -> None:
    """Raise a ValueError unless the tensors that tell a config are there, and not empty."""
    if missing := [name for name in dims if name not in state]:
        raise ValueError(f"tensors that tell the config are missing: {', '.join(missing)}")
    shapes = {name: list(state[name].shape) for name in dims}
    if [len(shape) for shape in shapes.values()] != list(dims.values()):
        raise ValueError(f"tensors that tell the config have unexpected dimensions: {shapes}")
    if any(0 in shape for shape in shapes.values()):
        raise ValueError(f"tensors that tell the config are empty: {shapes}")


def _pixart_heads(layers: int, width: int) -> int:
    known = {(c.n_layers, c.hidden): c.n_heads for c in TEXT_PRESETS.values()}
    if (layers, width) not in known:
        size = f"{layers} layers of width {width}; pass n_heads= (--n-heads)"
        raise ValueError(f"n_heads: shapes do not tell it, and no published PixArt has {size}")
    return known[layers, width]


def _mmdit_heads(width: int, norm: Tensor | None) -> int:
    """Return the number of heads: by a norm as wide as one, or of 64 as all published ones are."""
    head_dim = _SD3_HEAD_DIM if norm is None else norm.numel()
    if not head_dim or width % head_dim:
        expected = f"{head_dim}, the width of a head, to divide the width {width}"
        raise ValueError(f"n_heads: expected {expected}; pass n_heads= (--n-heads)")
    return width // head_dim


def _pixart_size(
    table: Tensor | None, patch: int, told: Told
) -> tuple[int | tuple[int, int], float]:
    """Return the size of the images of the training, and the scale of their positions."""
    if table is not None and table.dim() == 3:
        side = math.isqrt(table.shape[1])
        for scale in _POSITION_SCALES:
            if _is_spread(table, side, side / scale):
                return side * patch, scale
        known = ", ".join(f"{scale:g}" for scale in sorted(_POSITION_SCALES))
        expected = f"those of a square of patches, divided by one of {known}"
        raise ValueError(f"pos_embed: expected {expected}; got others")
    if told.img_size is None:
        ask = "pass img_size= (--img-size, also of fastdit convert), such as 64 for 512 pixels"
        raise ValueError(f"img_size: the tensors do not tell it; {ask}")
    told.assumed.append("position_scale")
    height = told.img_size if isinstance(told.img_size, int) else told.img_size[0]
    return told.img_size, float(max(height // 64, 1))


def _mmdit_size(table: Tensor, side: int, patch: int, told: Told) -> int | tuple[int, int]:
    """Return the size of the images of the training; the published one where nothing tells it."""
    if not table.is_meta and side > 1:
        step = math.asin(min(1.0, abs(table[0, 1, 0].item())))
        base = round(step * side)
        if 0 < base <= side and _is_spread(table, side, base):
            return base * patch
    told.assumed.append("img_size")
    return told.img_size or min(TEXT_PRESETS["SD3-medium"].sample_shape[1], side * patch)


def _is_spread(table: Tensor, side: int, span: float) -> bool:
    """Return whether positions [1, side * side, D] are spread over a span, by their edges."""
    if table.is_meta or table.shape[:2] != (1, side * side) or table.shape[2] % 4:
        return False
    grid = table[0].detach().unflatten(0, (side, side))
    for own, shape in ((grid[0], (1, side)), (grid[:, 0], (side, 1))):
        expected = sincos_pos_embed(table.shape[2], shape, span)[0]
        if not (own.cpu().to(torch.float64) - expected).abs().max() < _LARGEST_ERROR:
            return False
    return True
