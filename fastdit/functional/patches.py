"""Images as patch tokens, and back."""

from __future__ import annotations

from torch import Tensor


def patchify(x: Tensor, p: int) -> Tensor:
    """Cut images into tokens: [B, C, h*p, w*p] -> [B, h*w, p*p*C], the channel fastest."""
    B, C, H, W = x.shape
    x = x.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)  # [B, h, w, p, p, C]
    return x.reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(x: Tensor, p: int, grid: tuple[int, int] | None = None) -> Tensor:
    """Join tokens to images; inverts `patchify`.

    Args:
        x: [B, h*w, p*p*C].
        p: side of a patch.
        grid: (h, w), the rows and columns of patches; None is a square of them.

    Returns:
        [B, C, h*p, w*p].

    Raises:
        ValueError: the grid has another number of tokens than x.
    """
    B, N, F_ = x.shape
    h, w = grid or (int(N**0.5),) * 2
    if h * w != N:
        raise ValueError(f"grid: expected (rows, columns) of {N} tokens, got {grid or 'a square'}")
    C = F_ // (p * p)
    x = x.view(B, h, w, p, p, C).permute(0, 5, 1, 3, 2, 4)  # [B, C, h, p, w, p]
    return x.reshape(B, C, h * p, w * p)
