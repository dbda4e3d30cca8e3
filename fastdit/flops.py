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
    M, D = rows * cfg.n_tokens, cfg.hidden
    width, features, r = cfg.mlp_hidden, cfg.patch_size**2 * cfg.in_channels, cfg.patch_bottleneck
    found = [] if r is None else [Product("reduce", M, features, r, 1)]
    found.append(Product("patch", M, r or features, D, 1))
    for tokens, blocks in _blocks_by_tokens(cfg):
        found += [
            Product("qkv", rows * tokens, D, 3 * D, blocks),
            Product("proj", rows * tokens, D, D, blocks),
            Product("fc1", rows * tokens, D, width * (2 if cfg.mlp == "swiglu" else 1), blocks),
            Product("fc2", rows * tokens, width, D, blocks),
        ]
    return [*found, Product("final", M, D, cfg.patch_size**2 * cfg.out_channels, 1)]


def _blocks_by_tokens(cfg: DiTConfig) -> list[tuple[int, int]]:
    """Return (tokens, number of blocks that have so many): more once context tokens enter."""
    N, start = cfg.n_tokens, cfg.context_start or 0
    if not cfg.context_tokens:
        return [(N, cfg.n_layers)]
    both = [(N, start), (N + cfg.context_tokens, cfg.n_layers - start)]
    return both if start else both[1:]


def attention_work(cfg: DiTConfig, rows: int, itemsize: int) -> tuple[int, int]:
    """Return (FLOP, bytes) of a forward's attention: QK^T and PV; qkv read, the output written."""
    work = moved = 0
    for tokens, blocks in _blocks_by_tokens(cfg):
        residual = rows * tokens * cfg.hidden
        work += blocks * 4 * tokens * residual
        moved += blocks * 4 * residual * itemsize
    return work, moved


def pass_bytes(cfg: DiTConfig, rows: int, itemsize: int) -> int:
    """Return the bytes of a forward's norms, each fused with the residual before it.

    Each pass moves four tensors, but the first one two and the last one three, since it need not
    write its residual.
    """
    by_tokens = _blocks_by_tokens(cfg)
    of_blocks = sum(2 * 4 * tokens * blocks for tokens, blocks in by_tokens)
    tokens = of_blocks + 2 * by_tokens[0][0] - by_tokens[-1][0]
    return tokens * rows * cfg.hidden * itemsize


def flop(cfg: DiTConfig, rows: int) -> int:
    """Return the FLOP of a forward of `rows` images, without the conditioning's."""
    own = sum(product.times * product.flop for product in products(cfg, rows))
    return own + attention_work(cfg, rows, 1)[0]


def floor_seconds(
    cfg: DiTConfig, rows: int, itemsize: int, flop_rate: float, byte_rate: float
) -> float:
    """Return the least time of a forward, in seconds, on a device of known rates.

    It is the sum over the matrix products, attention and the passes of the norms. A product takes
    the time to compute it or to read its weights once, whichever is longer, and attention likewise.

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
