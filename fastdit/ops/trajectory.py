"""The sampling loop of a DiT as one op: its arguments, and the loop in plain PyTorch."""

from __future__ import annotations

import functools
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


@dataclass(frozen=True, eq=False)
class DiTWeights:
    """The weights of a `DiT`, without those that make its modulation.

    Attributes:
        cfg: the model's config.
        tensors: those of `Parts`, with each `Layer`'s in its place; float, of one dtype and device.
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
        for block in model.blocks:
            for linear in (block.attn.qkv, block.attn.proj, block.mlp[0], block.mlp[2]):
                tensors += [linear.weight, linear.bias]
        tensors += [final.weight, final.bias]
        return cls(model.cfg, tuple(t.detach() for t in tensors))

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
        """Return the weights on another device or in another dtype, as `Tensor.to` takes them."""
        return DiTWeights(self.cfg, tuple(t.to(*args) for t in self.tensors))

    def parts(self) -> Parts:
        """Return the tensors by name."""
        embed, position, *layers, final, final_bias = self.tensors
        size = len(Layer._fields)
        by_layer = [Layer(*layers[i : i + size]) for i in range(0, len(layers), size)]
        return Parts(embed, position, by_layer, final, final_bias)

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes that the config tells."""
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


def denoise(weights: DiTWeights, tokens: Tensor, modulation: Tensor) -> Tensor:
    """As `fastdit.DiT.denoise`, from weights alone: tokens [B, N, F] -> [B, N, F or 2F]."""
    cfg, parts = weights.cfg, weights.parts()
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
