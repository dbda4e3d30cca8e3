"""Fixed positions of patches: a sine-cosine embedding, and the angles of rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit.errors import height_and_width
from fastdit.reference import rope_table as rope_table


def sincos_pos_embed(hidden: int, grid: int | tuple[int, int], span: float | None = None) -> Tensor:
    """Return fixed two-dimensional positions, row by row.

    The first half of the channels encodes the column, the second half the row, each as
    `[sin | cos]` of `position / 10000^(i / (hidden / 4))`.

    Args:
        hidden: number of channels, a multiple of 4.
        grid: (rows, columns) of patches; an integer is a square of them.
        span: the length over which the rows, and the columns, are spread evenly; with None their
            positions are their numbers.

    Returns:
        [1, rows*columns, hidden] float64.

    Source: `get_2d_sincos_pos_embed` in the code of MAE (He et al. 2022) and of DiT; the span is
    that of PixArt and of Stable Diffusion 3.
    """
    rows, columns = height_and_width("grid", grid)
    omega = 10000.0 ** -(torch.arange(hidden // 4, dtype=torch.float64) / (hidden // 4))

    def axis(count: int) -> Tensor:
        step = 1.0 if span is None else span / count
        angles = (torch.arange(count, dtype=torch.float64) * step)[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # [count, hidden / 2]

    column = axis(columns)[None].expand(rows, -1, -1)
    row = axis(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([column, row], dim=-1).reshape(1, rows * columns, hidden)
