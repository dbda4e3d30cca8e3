"""What a step must compute and move at the least: of sampling, its conditioning hoisted, and of
training."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch

from fastdit.config import MLP_RATIO, DiTConfig


class Product(NamedTuple):
    """[rows, inner] @ [inner, columns], so many times a forward."""

    name: str
    rows: int
    inner: int
    columns: int
    times: int

    @property
    def flop(self) -> int:
        """Of one of them."""
        return 2 * self.rows * self.inner * self.columns


def products(cfg: DiTConfig, rows: int) -> list[Product]:
    """The matrix products of a forward of so many images, without the conditioning's."""
    M, D, L = rows * cfg.n_tokens, cfg.hidden, cfg.n_layers
    p2 = cfg.patch_size**2
    return [
        Product("patch", M, p2 * cfg.in_channels, D, 1),
        Product("qkv", M, D, 3 * D, L),
        Product("proj", M, D, D, L),
        Product("fc1", M, D, MLP_RATIO * D, L),
        Product("fc2", M, MLP_RATIO * D, D, L),
        Product("final", M, D, p2 * cfg.out_channels, 1),
    ]


def attention_work(cfg: DiTConfig, rows: int, itemsize: int) -> tuple[int, int]:
    """(FLOP, bytes) of a forward's attention: QK^T and PV; qkv read, the output written."""
    residual = rows * cfg.n_tokens * cfg.hidden
    return cfg.n_layers * 4 * cfg.n_tokens * residual, cfg.n_layers * 4 * residual * itemsize


def pass_bytes(cfg: DiTConfig, rows: int, itemsize: int) -> int:
    """Bytes of a forward's fused LayerNorm passes: four tensors each, two for the first.

    The last need not write its residual.
    """
    return (cfg.n_layers * 2 * 4 + 2 - 1) * rows * cfg.n_tokens * cfg.hidden * itemsize


def flop(cfg: DiTConfig, rows: int) -> int:
    """Of a forward, without the conditioning's."""
    own = sum(product.times * product.flop for product in products(cfg, rows))
    return own + attention_work(cfg, rows, 1)[0]


def floor_seconds(
    cfg: DiTConfig, rows: int, itemsize: int, flop_rate: float, byte_rate: float
) -> float:
    """The least time of a forward on a device of known rates.

    Args:
        cfg: the model's.
        rows: images, twice as many under guidance.
        itemsize: bytes of an element.
        flop_rate: FLOP a second in matrix products.
        byte_rate: bytes a second, read and written, in a copy.

    Returns:
        The time of the matrix products, which read each weight once, whichever of computing and
        reading takes longer, of attention by the same rule, and of the passes between them.
    """
    attention_flop, attention_bytes = attention_work(cfg, rows, itemsize)
    passes = pass_bytes(cfg, rows, itemsize) / byte_rate
    attention = max(attention_flop / flop_rate, attention_bytes / byte_rate)
    return (
        attention
        + passes
        + sum(
            p.times * max(p.flop / flop_rate, p.inner * p.columns * itemsize / byte_rate)
            for p in products(cfg, rows)
        )
    )


def training_flop(cfg: DiTConfig, images: int) -> int:
    """FLOP of a training step's forward and backward, the conditioning's included.

    A backward is two products for each of the forward's. What activation checkpointing computes a
    second time does not count: it is no progress.

    Source: Chowdhery et al. 2022 (PaLM), appendix B, model FLOPs utilisation.
    """
    D, width = cfg.hidden, cfg.t_embed_width or cfg.hidden
    conditioning = 2 * images * (width * D + D * D + D * (6 * cfg.n_layers + 2) * D)
    return 3 * (flop(cfg, images) + conditioning)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a large square matrix product: measured, the best of a few, in a moment."""
    side = 8192 if device.type == "cuda" else 1024
    own = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=own).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = math.inf
    for _ in range(6):  # the first warms up
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
