"""The sampling loop of a small DiT as one op: its arguments, and the loop in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.config import MLP_RATIO, DiTConfig
from fastdit.noise import normal
from fastdit.reference import attention, layer_norm_modulate, sampler_update
from fastdit.update import Guidance


class Layer(NamedTuple):
    """The weights of a block without its modulation; matrices are [out, in], as in `nn.Linear`."""

    qkv: Tensor  # [3D, D]
    qkv_bias: Tensor
    proj: Tensor  # [D, D]
    proj_bias: Tensor
    fc1: Tensor  # [4D, D]
    fc1_bias: Tensor
    fc2: Tensor  # [D, 4D]
    fc2_bias: Tensor


class Parts(NamedTuple):
    """All weights besides modulation; F = p*p*C is the number of features of a token."""

    embed: Tensor  # [D, F], in the order of a token's features
    position: Tensor  # [N, D], with the patch embedding's bias added
    layers: list[Layer]
    final: Tensor  # [F or 2F, D]
    final_bias: Tensor


@dataclass(frozen=True)
class PackedDiT:
    """The weights of a `DiT` in one tensor, without those that make its modulation.

    Attributes:
        cfg: the model's config.
        weights: [n] float: the tensors of `Parts` one after another, with each `Layer`'s in its
            place, all contiguous.
    """

    cfg: DiTConfig
    weights: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any) -> PackedDiT:
        """Copy the present weights of a `DiT`."""
        patch, final = model.patch_embed.proj, model.final_linear
        tensors = [patch.weight.permute(0, 2, 3, 1), model.pos_embed[0] + patch.bias]
        for block in model.blocks:
            for linear in (block.attn.qkv, block.attn.proj, block.mlp[0], block.mlp[2]):
                tensors += [linear.weight, linear.bias]
        tensors += [final.weight, final.bias]
        return cls(model.cfg, torch.cat([t.reshape(-1) for t in tensors]))

    @property
    def size(self) -> int:
        """The number of packed weights."""
        return sum(torch.Size(shape).numel() for shape in self._shapes())

    def parts(self) -> Parts:
        """Return views of the weights."""
        shapes = self._shapes()
        pieces = self.weights.split([torch.Size(shape).numel() for shape in shapes])
        views = iter([piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)])
        embed, position = next(views), next(views)
        layers = [Layer(*(next(views) for _ in Layer._fields)) for _ in range(self.cfg.n_layers)]
        return Parts(embed, position, layers, *views)

    def _shapes(self) -> list[tuple[int, ...]]:
        (N, features, out_features, *_), _ = kernel_shape(self.cfg)
        D, M = self.cfg.hidden, MLP_RATIO * self.cfg.hidden
        layer = [(3 * D, D), (3 * D,), (D, D), (D,), (M, D), (M,), (D, M), (D,)]
        shapes = [(D, features), (N, D), *layer * self.cfg.n_layers]
        return [*shapes, (out_features, D), (out_features,)]


def kernel_shape(cfg: DiTConfig) -> tuple[list[int], list[float]]:
    """Return the integers and the floats of `fastdit.kernels.shape.Shape`, in its order."""
    patch = cfg.patch_size**2
    sizes = [cfg.n_tokens, patch * cfg.in_channels, patch * cfg.out_channels, cfg.in_channels]
    sizes += [cfg.hidden, cfg.n_layers, cfg.n_heads, int(cfg.gelu == "tanh")]
    return sizes, [cfg.ln_eps, cfg.mlp_ln_eps or cfg.ln_eps]


class Modulation(NamedTuple):
    """The modulation of K steps of a loop, laid out as `fastdit.DiT.modulation` says.

    At step k image i has `by_step[k, 0] + by_label[rows[i]]`, or `by_step[k, rows[i]]` where
    by_label is None.
    """

    by_step: Tensor  # [K, 1 or R, (6 n_layers + 2) D]
    by_label: Tensor | None  # [R, (6 n_layers + 2) D]
    rows: Tensor  # [B] int64; with guidance [2B], the null label's rows last

    def at(self, k: int) -> Tensor:
        """Return the modulation of step k: [B or 2B, (6 n_layers + 2) D]."""
        table = self.by_step[k] if self.by_label is None else self.by_step[k] + self.by_label
        return table.index_select(0, self.rows)


def denoise(packed: PackedDiT, tokens: Tensor, modulation: Tensor) -> Tensor:
    """As `fastdit.DiT.denoise`, from packed weights: tokens [B, N, F] -> [B, N, F or 2F]."""
    cfg, parts = packed.cfg, packed.parts()
    m = modulation.split(cfg.hidden, dim=-1)  # each [B, D]
    h = F.linear(tokens, parts.embed) + parts.position
    for i, layer in enumerate(parts.layers):
        scale1, shift1, gate1, scale2, shift2, gate2 = m[6 * i : 6 * i + 6]
        y = layer_norm_modulate(h, scale1, shift1, cfg.ln_eps)
        y = attention(F.linear(y, layer.qkv, layer.qkv_bias), cfg.n_heads)
        h = h + gate1[:, None] * F.linear(y, layer.proj, layer.proj_bias)
        y = layer_norm_modulate(h, scale2, shift2, cfg.mlp_ln_eps or cfg.ln_eps)
        approximate = "tanh" if cfg.gelu == "tanh" else "none"
        y = F.gelu(F.linear(y, layer.fc1, layer.fc1_bias), approximate=approximate)
        h = h + gate2[:, None] * F.linear(y, layer.fc2, layer.fc2_bias)
    h = layer_norm_modulate(h, m[-2], m[-1], cfg.ln_eps)
    return F.linear(h, parts.final, parts.final_bias)


def plain_trajectory(
    x: Tensor,
    x0: Tensor,
    packed: PackedDiT,
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
        tokens = x.to(packed.weights.dtype).view(B, packed.cfg.n_tokens, -1)
        if guidance is not None:
            tokens = torch.cat([tokens, tokens])
        out = denoise(packed, tokens, modulation.at(k)).view(len(tokens), x.shape[1], -1)
        z = None if noise is None else noise[k]
        if seeds is not None:
            step = torch.tensor([first + k + 1], device=x.device)
            z = normal(seeds, step, x.shape[1:].numel())[0].view(x.shape)
        row = torch.tensor(k, device=x.device)
        x, x0 = sampler_update(x, out, coefficients, row, x0, noise=z, guidance=guidance)
    return x, x0
