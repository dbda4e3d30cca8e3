"""A DiT's weights in one piece: what a whole sampling loop takes as one argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit.config import MLP_RATIO, DiTConfig


class Layer(NamedTuple):
    """A block's weights but for its modulation; matrices as `nn.Linear` has them, [out, in]."""

    qkv: Tensor  # [3D, D]
    qkv_bias: Tensor
    proj: Tensor  # [D, D]
    proj_bias: Tensor
    fc1: Tensor  # [4D, D]
    fc1_bias: Tensor
    fc2: Tensor  # [D, 4D]
    fc2_bias: Tensor


class Parts(NamedTuple):
    """What there is besides modulation; F = p*p*C features a token."""

    embed: Tensor  # [D, F], as patch tokens lie
    position: Tensor  # [N, D], the patch embedding's bias added
    layers: list[Layer]
    final: Tensor  # [F or 2F, D]
    final_bias: Tensor


@dataclass(frozen=True)
class PackedDiT:
    """The weights of a `DiT`, without those that make its modulation.

    Attributes:
        cfg: the model's.
        weights: [n] float: the tensors of `Parts` one after another, those of a `Layer` layer by
            layer in its place, each contiguous.
    """

    cfg: DiTConfig
    weights: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any) -> PackedDiT:
        """Copy the weights of a `DiT` as they are now."""
        patch, final = model.patch_embed.proj, model.final_linear
        tensors = [patch.weight.permute(0, 2, 3, 1), model.pos_embed[0] + patch.bias]
        for block in model.blocks:
            for linear in (block.attn.qkv, block.attn.proj, block.mlp[0], block.mlp[2]):
                tensors += [linear.weight, linear.bias]
        tensors += [final.weight, final.bias]
        return cls(model.cfg, torch.cat([t.reshape(-1) for t in tensors]))

    @property
    def features(self) -> int:
        """Of a token: p*p*C."""
        return self.cfg.patch_size**2 * self.cfg.in_channels

    @property
    def out_features(self) -> int:
        return self.cfg.patch_size**2 * self.cfg.out_channels

    @property
    def size(self) -> int:
        """How many weights a model of this config has."""
        return sum(torch.Size(shape).numel() for shape in self._shapes())

    def parts(self) -> Parts:
        """Views of the weights."""
        shapes = self._shapes()
        pieces = self.weights.split([torch.Size(shape).numel() for shape in shapes])
        views = iter([piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)])
        embed, position = next(views), next(views)
        layers = [Layer(*(next(views) for _ in Layer._fields)) for _ in range(self.cfg.n_layers)]
        return Parts(embed, position, layers, *views)

    def _shapes(self) -> list[tuple[int, ...]]:
        D, N, M = self.cfg.hidden, self.cfg.n_tokens, MLP_RATIO * self.cfg.hidden
        layer = [(3 * D, D), (3 * D,), (D, D), (D,), (M, D), (M,), (D, M), (D,)]
        shapes = [(D, self.features), (N, D), *layer * self.cfg.n_layers]
        return [*shapes, (self.out_features, D), (self.out_features,)]
