"""Layouts of tensors that the launchers of Triton and of C++ ask for; it imports no Triton."""

from __future__ import annotations

from torch import Tensor


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def rows_of(modulation: Tensor | None) -> tuple[Tensor | None, int]:
    """Return modulation [B, D] with adjacent channels, copied if need be, and its row stride."""
    if modulation is None:
        return None, 0
    row, channel = modulation.stride()
    if channel == 1:
        return modulation, row
    modulation = modulation.contiguous()
    return modulation, modulation.stride(0)
