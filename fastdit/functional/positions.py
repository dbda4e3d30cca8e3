"""Fixed positions of patches: a sine-cosine embedding, and the angles of rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit.errors import height_and_width
from fastdit.reference import rope_table as rope_table


def sincos_pos_embed(hidden: int, grid: int | tuple[int, int]) -> Tensor:
    """Return fixed two-dimensional positions, row by row.

    The first half of the channels encodes the column, the second half the row, each as
    `[sin | cos]` of `position / 10000^(i / (hidden / 4))`.

    Args:
        hidden: number of channels, a multiple of 4.
        grid: (rows, columns) of patches; an integer is a square of them.

    Returns:
        [1, rows*columns, hidden] float64.

    Source: `get_2d_sincos_pos_embed` in the code of MAE (He et al. 2022) and of DiT.
    """
    rows, columns = height_and_width("grid", grid)
    omega = 10000.0 ** -(torch.arange(hidden // 4, dtype=torch.float64) / (hidden // 4))
    angles = torch.arange(max(rows, columns), dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [positions, D/2]
    column = axis[None, :columns].expand(rows, -1, -1)
    row = axis[:rows, None].expand(-1, columns, -1)
    return torch.cat([column, row], dim=-1).reshape(1, rows * columns, hidden)
