"""Normal noise as a pure function of (seed, step, element), in plain PyTorch.

An image's noise must not depend on its batch, the device or the backend, so it comes from a
counter-based generator instead of a stateful one: Philox4x32-10 (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3") turns a key and a counter into four uniform 32-bit words, and
Box-Muller turns those into four normals. For element e of image i at step s:

    key     = the image's 64-bit seed
    counter = (e // 4, s, the image's stream, 0)
    words   = philox4x32_10(key, counter)                          # r0 .. r3
    u       = float32(r0) * 2^-32 + 2^-33                          # in (0, 1]
    v       = float32(int32(r1)) * 2^-31                           # in [-1, 1]
    normals = sqrt(-2 ln u) * (cos(pi v), sin(pi v)), and the same from (r2, r3)

float32() rounds to nearest, so u and v have the same bits wherever they are computed, with or
without fused multiply-add; the normals agree to float32 rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF

# Counters per block: PyTorch runs fewer on one thread only, and more do not fit in the cache.
_CPU_BLOCK = 2**16


def philox4x32(counter: Sequence[Tensor], key: Tensor) -> list[Tensor]:
    """Return the four words of Philox4x32-10 for a counter and a key.

    Args:
        counter: four int64 tensors of 32-bit unsigned values, broadcastable to each other.
        key: int64, the 64-bit key, broadcastable to them.

    Returns:
        Four int64 tensors of 32-bit unsigned values.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    shape = torch.broadcast_shapes(c0.shape, c1.shape, c2.shape, c3.shape)
    return [c.expand(shape) for c in (c0, c1, c2, c3)]


def _multiply(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the high and low words of a product of two 32-bit numbers, within int64.

    Both multipliers are above 2^31, so the product with `multiplier - 2^32` fits in int64; the
    missing 2^32 * a is added to the high word.
    """
    product = a * (multiplier - 2**32)
    return (product >> 32) + a, product & _MASK


def normal(seeds: Tensor, steps: Tensor, elements: int) -> Tensor:
    """Return standard normal noise for some images at some steps.

    Args:
        seeds: [B, 2] int64, one row (key, stream) per image; 0 <= stream < 2^32.
        steps: [S] int64, 0 <= step < 2^32.
        elements: number of normals per image and step, at least 1.

    Returns:
        [S, B, elements] float32 on the device of seeds.
    """
    if elements < 1:
        raise ValueError(f"elements: expected at least 1, got {elements}")
    n_quads = -(-elements // 4)
    rows = len(steps) * len(seeds)
    step = steps[:, None].expand(-1, len(seeds)).reshape(rows, 1)
    pairs = seeds.expand(len(steps), -1, -1).reshape(rows, 2)
    key, stream = pairs[:, :1], pairs[:, 1:]
    out = torch.empty(rows, n_quads, 4, dtype=torch.float32, device=seeds.device)
    if seeds.device.type == "cpu" and not torch.compiler.is_compiling():
        block = max(1, _CPU_BLOCK // n_quads)
        for i in range(0, rows, block):
            j = slice(i, i + block)
            _fill_normal(out[j], key[j], step[j], stream[j])
    else:
        _fill_normal(out, key, step, stream)
    return out.view(len(steps), len(seeds), 4 * n_quads)[..., :elements]


def _fill_normal(out: Tensor, key: Tensor, step: Tensor, stream: Tensor) -> None:
    """Fill out [R, Q, 4] for R rows of key, step and stream, each [R, 1]."""
    # Adding zeros from a loaded tensor keeps the arange in int64: Inductor would turn a bare arange
    # into an index expression and multiply it in 32 bits.
    quads = torch.arange(out.shape[1], device=out.device) + (key & 0)
    r0, r1, r2, r3 = philox4x32((quads, step, stream, torch.zeros_like(stream)), key)
    torch.stack([*box_muller(r0, r1), *box_muller(r2, r3)], dim=-1, out=out)


def box_muller(r0: Tensor, r1: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return the two normals of two 32-bit words, int64 tensors of one shape, computed in a dtype.

    In float64 they do not depend on an element's place in the tensor, once rounded to float32, as
    those of vectorised functions in float32 do.
    """
    u = r0.float() * 2**-32 + 2**-33
    signed = r1 - ((r1 & 0x80000000) << 1)  # the same 32 bits, read as int32
    angle = (signed.float() * 2**-31).to(dtype) * math.pi
    radius = torch.sqrt(-2 * torch.log(u.to(dtype)))
    return radius * torch.cos(angle), radius * torch.sin(angle)
