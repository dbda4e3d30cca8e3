"""Tensors as the launchers of both languages pass them on; it imports no Triton."""

from __future__ import annotations

from torch import Tensor


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def rows_of(modulation: Tensor | None) -> tuple[Tensor | None, int]:
    """Return [B, D] with its channels side by side, and the distance from one row to the next."""
    if modulation is None:
        return None, 0
    row, channel = modulation.stride()
    if channel == 1:
        return modulation, row
    modulation = modulation.contiguous()
    return modulation, modulation.stride(0)
