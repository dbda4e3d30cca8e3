"""The sampling loop of a DiT as one op: its arguments, and the loop in plain PyTorch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.config import DiTConfig
from fastdit.noise import normal
from fastdit.reference import (
    attention,
    layer_norm_modulate,
    qk_norm_rope,
    rms_norm_modulate,
    sampler_update,
    swiglu,
)
from fastdit.update import Guidance


class Layer(NamedTuple):
    """The weights of a block without its modulation; matrices are [out, in], as in `nn.Linear`.

    M is the width of the MLP, and d the head dim. The model has not all of those that may be None.
    """

    qkv: Tensor  # [3D, D]
    qkv_bias: Tensor
    proj: Tensor  # [D, D]
    proj_bias: Tensor
    fc1: Tensor  # [M, D]; of a SwiGLU w12 [2M, D]
    fc1_bias: Tensor
    fc2: Tensor  # [D, M]; of a SwiGLU w3
    fc2_bias: Tensor
    norm1: Tensor | None = None  # [D], of the RMSNorm before attention
    norm2: Tensor | None = None  # [D], before the MLP
    q_weight: Tensor | None = None  # [d], of the norm of queries
    k_weight: Tensor | None = None  # [d], of keys
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None


class Parts(NamedTuple):
    """All weights besides modulation; F = p*p*C is the number of features of a token."""

    embed: Tensor  # [D, F], in the order of a token's features
    position: Tensor  # [N, D], with the patch embedding's bias added
    layers: list[Layer]
    final: Tensor  # [F or 2F, D]
    final_bias: Tensor
    final_norm: Tensor | None = None  # [D], of the RMSNorm before the final layer
    rope: Tensor | None = None  # [2, N, d/2]


@dataclass(frozen=True, eq=False)
class DiTWeights:
    """The weights of a `DiT`, without those that make its modulation.

    Attributes:
        cfg: the model's config, without context tokens and without a bottleneck of patches.
        tensors: those of `Parts`, with each `Layer`'s in its place, without those that the model
            does not have; float, of one dtype and device, but that a rotary table, which comes
            last, may be float32 beside any dtype.
    """

    cfg: DiTConfig
    tensors: tuple[Tensor, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any) -> DiTWeights:
        """Take the weights of a `DiT`, which are its own tensors except `embed` and `position`."""
        patch, final = model.patch_embed.proj, model.final_linear
        embed = patch.weight.permute(0, 2, 3, 1).flatten(1)
        tensors = [embed, model.pos_embed[0] + patch.bias]
        cfg, rms = model.cfg, model.cfg.norm == "rms"
        for block in model.blocks:
            attn, mlp = block.attn, block.mlp
            up, down = (mlp.w12, mlp.w3) if cfg.mlp == "swiglu" else (mlp[0], mlp[2])
            for linear in (attn.qkv, attn.proj, up, down):
                tensors += [linear.weight, linear.bias]
            tensors += [block.norm1.weight, block.norm2.weight] if rms else []
            if cfg.qk_norm != "none":
                tensors += [attn.q_norm.weight, attn.k_norm.weight]
            if cfg.qk_norm == "layer":
                tensors += [attn.q_norm.bias, attn.k_norm.bias]
        tensors += [final.weight, final.bias]
        tensors += [model.final_norm.weight] if rms else []
        tensors += [model.rope] if cfg.rope else []
        return cls(cfg, tuple(t.detach() for t in tensors))

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @functools.cached_property
    def packed(self) -> Tensor:
        """A copy of the tensors one after another, [n], for kernels that read them so.

        It is made once; later changes of the tensors do not reach it.
        """
        return torch.cat([t.reshape(-1) for t in self.tensors])

    def to(self, *args: Any) -> DiTWeights:
        """Return the weights on another device or in another dtype, as `Tensor.to` takes them.

        A rotary table keeps its dtype.
        """
        moved = [t.to(*args) for t in self.tensors]
        if self.cfg.rope:
            moved[-1] = self.tensors[-1].to(moved[0].device)
        return DiTWeights(self.cfg, tuple(moved))

    def parts(self) -> Parts:
        """Return the tensors by name."""
        embed, position, *others = self.tensors
        names = list(_layer_shapes(self.cfg))
        end = len(names) * self.cfg.n_layers
        starts = range(0, end, len(names))
        by_layer = [Layer(**dict(zip(names, others[i:], strict=False))) for i in starts]
        last = dict(zip(_last_shapes(self.cfg), others[end:], strict=True))
        return Parts(embed, position, by_layer, **last)

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes that the config tells."""
        cfg = self.cfg
        D, features = cfg.hidden, cfg.patch_size**2 * cfg.in_channels
        layers = [*_layer_shapes(cfg).values()] * cfg.n_layers
        return [(D, features), (cfg.n_tokens, D), *layers, *_last_shapes(cfg).values()]


def _layer_shapes(cfg: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of a `Layer` that a model has."""
    D, M, d = cfg.hidden, cfg.mlp_hidden, cfg.head_dim
    up = 2 * M if cfg.mlp == "swiglu" else M
    shapes: dict[str, tuple[int, ...]] = dict(qkv=(3 * D, D), qkv_bias=(3 * D,))
    shapes |= dict(proj=(D, D), proj_bias=(D,), fc1=(up, D), fc1_bias=(up,))
    shapes |= dict(fc2=(D, M), fc2_bias=(D,))
    if cfg.norm == "rms":
        shapes |= dict(norm1=(D,), norm2=(D,))
    if cfg.qk_norm != "none":
        shapes |= dict(q_weight=(d,), k_weight=(d,))
    if cfg.qk_norm == "layer":
        shapes |= dict(q_bias=(d,), k_bias=(d,))
    return shapes


def _last_shapes(cfg: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of `Parts` that follow the layers."""
    D, out = cfg.hidden, cfg.patch_size**2 * cfg.out_channels
    shapes: dict[str, tuple[int, ...]] = dict(final=(out, D), final_bias=(out,))
    if cfg.norm == "rms":
        shapes |= dict(final_norm=(D,))
    if cfg.rope:
        shapes |= dict(rope=(2, cfg.n_tokens, cfg.head_dim // 2))
    return shapes


def kernel_shape(cfg: DiTConfig) -> tuple[list[int], list[float]]:
    """Return the integers and the floats of `fastdit.kernels.shape.Shape`, in its order."""
    patch = cfg.patch_size**2
    sizes = [cfg.n_tokens, patch * cfg.in_channels, patch * cfg.out_channels, cfg.in_channels]
    sizes += [cfg.hidden, cfg.n_layers, cfg.n_heads, cfg.mlp_hidden, cfg.block_parts]
    kinds = [int(cfg.norm == "rms"), ("none", "layer", "rms").index(cfg.qk_norm), int(cfg.rope)]
    kinds += [int(cfg.mlp == "swiglu"), int(cfg.gelu == "tanh")]
    return sizes + kinds, [cfg.ln_eps, cfg.mlp_ln_eps or cfg.ln_eps, cfg.qk_norm_eps]


class Modulation(NamedTuple):
    """The modulation of K steps of a loop, laid out as `fastdit.DiT.modulation` says.

    At step k image i has `by_step[k, 0] + by_label[rows[i]]`, or `by_step[k, rows[i]]` where
    by_label is None.
    """

    by_step: Tensor  # [K, 1 or R, width]
    by_label: Tensor | None  # [R, width]
    rows: Tensor  # [B] int64; with guidance [2B], the null label's rows last

    def at(self, k: int) -> Tensor:
        """Return the modulation of step k: [B or 2B, width]."""
        table = self.by_step[k] if self.by_label is None else self.by_step[k] + self.by_label
        return table.index_select(0, self.rows)


def denoise(weights: DiTWeights, tokens: Tensor, modulation: Tensor) -> Tensor:
    """As `fastdit.DiT.denoise`, from weights alone: tokens [B, N, F] -> [B, N, F or 2F]."""
    cfg, parts = weights.cfg, weights.parts()
    m = modulation.split(cfg.hidden, dim=-1)  # each [B, D]
    h = F.linear(tokens, parts.embed) + parts.position
    size, half = cfg.block_parts, cfg.block_parts // 2  # half: of attention, then of the MLP
    for i, layer in enumerate(parts.layers):
        own = m[size * i : size * (i + 1)]
        (scale1, scale2), (gate1, gate2) = own[::half], own[half - 1 :: half]
        shift1, shift2 = own[1::half] if cfg.modulation_shift else (None, None)
        y = _norm_modulate(h, scale1, shift1, layer.norm1, cfg.ln_eps)
        h = h + gate1[:, None] * _attend(cfg, y, layer, parts.rope)
        y = _norm_modulate(h, scale2, shift2, layer.norm2, cfg.mlp_ln_eps or cfg.ln_eps)
        y = F.linear(y, layer.fc1, layer.fc1_bias)
        approximate = "tanh" if cfg.gelu == "tanh" else "none"
        y = swiglu(y) if cfg.mlp == "swiglu" else F.gelu(y, approximate=approximate)
        h = h + gate2[:, None] * F.linear(y, layer.fc2, layer.fc2_bias)
    h = _norm_modulate(h, m[-2], m[-1], parts.final_norm, cfg.ln_eps)
    return F.linear(h, parts.final, parts.final_bias)


def _norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor | None, eps: float
) -> Tensor:
    if weight is None:
        return layer_norm_modulate(x, scale, shift, eps)
    return rms_norm_modulate(x, scale, shift, weight, eps)


def _attend(cfg: DiTConfig, x: Tensor, layer: Layer, rope: Tensor | None) -> Tensor:
    qkv = F.linear(x, layer.qkv, layer.qkv_bias)
    q_norm, k_norm = (layer.q_weight, layer.q_bias), (layer.k_weight, layer.k_bias)
    qkv = qk_norm_rope(qkv, cfg.n_heads, *q_norm, *k_norm, rope, cfg.qk_norm_eps)
    return F.linear(attention(qkv, cfg.n_heads), layer.proj, layer.proj_bias)


def plain_trajectory(
    x: Tensor,
    x0: Tensor,
    weights: DiTWeights,
    modulation: Modulation,
    coefficients: Tensor,
    first: int = 0,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    guidance: Guidance | None = None,
) -> tuple[Tensor, Tensor]:
    """K steps of a sampling loop: as `functional.trajectory` documents it.

    x, x0 [B, P, C] -> (x, x0) after the last step.
    """
    B = len(x)
    for k in range(len(coefficients)):
        tokens = x.to(weights.dtype).view(B, weights.cfg.n_tokens, -1)
        if guidance is not None:
            tokens = torch.cat([tokens, tokens])
        out = denoise(weights, tokens, modulation.at(k)).view(len(tokens), x.shape[1], -1)
        z = None if noise is None else noise[k]
        if seeds is not None:
            step = torch.tensor([first + k + 1], device=x.device)
            z = normal(seeds, step, x.shape[1:].numel())[0].view(x.shape)
        row = torch.tensor(k, device=x.device)
        x, x0 = sampler_update(x, out, coefficients, row, x0, noise=z, guidance=guidance)
    return x, x0
