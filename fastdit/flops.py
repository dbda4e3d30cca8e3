"""FLOP and bytes that a sampling step, without the conditioning, and a training step need."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch

from fastdit.config import DiTConfig


class Product(NamedTuple):
    """A matrix product [rows, inner] @ [inner, columns] that a forward computes `times` times."""

    name: str
    rows: int
    inner: int
    columns: int
    times: int

    @property
    def flop(self) -> int:
        """FLOP of one such product."""
        return 2 * self.rows * self.inner * self.columns


def products(cfg: DiTConfig, rows: int) -> list[Product]:
    """Return the matrix products of a forward of `rows` images, without the conditioning's."""
    M, D, L = rows * cfg.n_tokens, cfg.hidden, cfg.n_layers
    width, features, r = cfg.mlp_hidden, cfg.patch_size**2 * cfg.in_channels, cfg.patch_bottleneck
    patch = [Product("patch", M, r or features, D, 1)]
    if r is not None:
        patch.insert(0, Product("reduce", M, features, r, 1))
    return [
        *patch,
        Product("qkv", M, D, 3 * D, L),
        Product("proj", M, D, D, L),
        Product("fc1", M, D, width * (2 if cfg.mlp == "swiglu" else 1), L),
        Product("fc2", M, width, D, L),
        Product("final", M, D, cfg.patch_size**2 * cfg.out_channels, 1),
    ]


def attention_work(cfg: DiTConfig, rows: int, itemsize: int) -> tuple[int, int]:
    """Return (FLOP, bytes) of a forward's attention: QK^T and PV; qkv read, the output written."""
    residual = rows * cfg.n_tokens * cfg.hidden
    return cfg.n_layers * 4 * cfg.n_tokens * residual, cfg.n_layers * 4 * residual * itemsize


def pass_bytes(cfg: DiTConfig, rows: int, itemsize: int) -> int:
    """Return the bytes of a forward's fused LayerNorm passes.

    Each pass moves four tensors, but the first one two and the last one three, since it need not
    write its residual.
    """
    return (cfg.n_layers * 2 * 4 + 2 - 1) * rows * cfg.n_tokens * cfg.hidden * itemsize


def flop(cfg: DiTConfig, rows: int) -> int:
    """Return the FLOP of a forward of `rows` images, without the conditioning's."""
    own = sum(product.times * product.flop for product in products(cfg, rows))
    return own + attention_work(cfg, rows, 1)[0]


def floor_seconds(
    cfg: DiTConfig, rows: int, itemsize: int, flop_rate: float, byte_rate: float
) -> float:
    """Return the least time of a forward, in seconds, on a device of known rates.

    It is the sum over the matrix products, attention and the LayerNorm passes. A product takes the
    time to compute it or to read its weights once, whichever is longer, and attention likewise.

    Args:
        cfg: the model's config.
        rows: number of images, counted twice under guidance.
        itemsize: bytes per element.
        flop_rate: FLOP per second of matrix products.
        byte_rate: bytes per second that a copy reads and writes together.
    """
    attention_flop, attention_bytes = attention_work(cfg, rows, itemsize)
    passes = pass_bytes(cfg, rows, itemsize) / byte_rate
    attention = max(attention_flop / flop_rate, attention_bytes / byte_rate)
    matrices = sum(
        p.times * max(p.flop / flop_rate, p.inner * p.columns * itemsize / byte_rate)
        for p in products(cfg, rows)
    )
    return attention + passes + matrices


def training_flop(cfg: DiTConfig, images: int) -> int:
    """Return the FLOP of a training step's forward and backward, including the conditioning's.

    The backward has two products for each one of the forward. What activation checkpointing
    recomputes is not counted.

    Source: Chowdhery et al. 2022 (PaLM), appendix B, model FLOPs utilisation.
    """
    D, width = cfg.hidden, cfg.t_embed_width or cfg.hidden
    embedders = cfg.n_layers if cfg.embedders == "block" else 1
    embedding = embedders * (width * D + D * D)
    conditioning = 2 * images * (embedding + D * (cfg.block_parts * cfg.n_layers + 2) * D)
    return 3 * (flop(cfg, images) + conditioning)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP per second of a large square matrix product, the best of a few."""
    side = 8192 if device.type == "cuda" else 1024
    own = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=own).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = math.inf

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(6):  # the first one warms up
        wait()
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
