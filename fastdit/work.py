"""What a sampling step must compute and move at the least, its conditioning hoisted."""

from __future__ import annotations

from typing import NamedTuple

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
