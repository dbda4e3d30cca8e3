"""What the plain text-to-image models share: patches, positions, embedders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdit.text_config import TextConfig

EMBEDDING = 256  # width of the embedding of a timestep or a size, before its MLP
FINAL_EPS = 1e-6


class PatchEmbed(nn.Module):
    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        p = cfg.patch_size
        self.proj = nn.Conv2d(cfg.in_channels, cfg.hidden, kernel_size=p, stride=p)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, N, D]


def embedder(width: int, out: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out), activation, nn.Linear(out, out))


def positions(hidden: int, grid: tuple[int, int], base: float) -> Tensor:
    """Fixed positions of (rows, columns) of patches, spread over `base`: [1, N, hidden] float64.

    Row i stands at `i / rows * base`, and columns likewise. The first half of the channels encodes
    the column, the second half the row, each as `[sin | cos]` of `position / 10000^(i / (hidden /
    4))`. (Chen et al. 2023, appendix; `pos_embed` of MAE's code.)
    """
    omega = 10000.0 ** -(torch.arange(hidden // 4, dtype=torch.float64) / (hidden // 4))
    axes = [torch.arange(side).double() / side * base for side in grid]
    row, column = torch.meshgrid(*axes, indexing="ij")
    angles = [position.flatten()[:, None] * omega for position in (column, row)]
    return torch.cat([wave for a in angles for wave in (a.sin(), a.cos())], dim=1)[None]


def unpatchify(h: Tensor, grid: tuple[int, int], p: int) -> Tensor:
    """[B, N, p*p*C] -> [B, C, H, W]."""
    B, (rows, columns) = len(h), grid
    image = torch.einsum("nhwpqc->nchpwq", h.reshape(B, rows, columns, p, p, -1))
    return image.reshape(B, -1, rows * p, columns * p)
