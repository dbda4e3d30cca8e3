"""Norm and rotation of the queries and keys in packed qkv, one pass.

Forward, for each head x of a token's queries and keys, with its rotary angles t (Henry et al. 2020;
Su et al. 2021, equation 34); values are copied:

    n = (x - mean(x)) * rstd,  rstd = 1 / sqrt(mean((x - mean(x))^2) + eps)     LayerNorm
    n = x * rstd,              rstd = 1 / sqrt(mean(x^2) + eps)                 RMSNorm
    y = n * weight + bias
    out[2i]     = y[2i] cos(t_i) - y[2i + 1] sin(t_i)
    out[2i + 1] = y[2i + 1] cos(t_i) + y[2i] sin(t_i)

Backward, from dout; the statistics are computed again, and the sums run over all heads of a part:

    dy = dout turned by -t,  dn = dy * weight
    dx = rstd * (dn - mean(dn) - n * mean(dn * n)), without mean(dn) in RMSNorm
    dweight = sum dy * n,  dbias = sum dy

The floor is memory: the forward reads and writes 3D numbers for each token, and the backward reads
5D, since it needs no values, and writes 3D: in 16 bits 12D and 16D bytes. Angles and partial sums
are left out: the programs that run together share a token's angles, and the sums are 1% of the
rest.

A head is held in a power of two of lanes; those past its end load nothing. 72 leaves 56 of 128
idle, which costs little where memory is the floor. As two pieces, 64 + 8, it would leave none idle,
but the compiler spreads these over the threads in different ways: on sm_90 a thread of the forward
then has 45 loads, and as one piece 16.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels.launch import PREPARED, PreparedLaunch
from fastdit.kernels.tensors import contiguous

_HEADS = 128  # per program of the backward, one after another
_CHUNKS, _CHANNELS = 128, 32  # a tile of the partial sums

_NO_NORM, _RMS_NORM, _LAYER_NORM = range(3)  # how many weights the queries have


@triton.jit
def _load(p, o, m):
    return tl.load(p + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _own(i_part, p_q, p_k, o, m):
    """Load the channels of the queries' weight or of the keys'."""
    return tl.where(i_part == 0, _load(p_q, o, m), _load(p_k, o, m))


@triton.jit
def _turn(b, p_rope, o_n, m_n, N, D: tl.constexpr, LANES: tl.constexpr, SIGN: tl.constexpr):
    """Turn the pairs of heads b [ROWS, LANES] of tokens o_n [ROWS] by SIGN times their angles."""
    o_pair = tl.arange(0, LANES // 2)[None, :]
    m_pair = m_n[:, None] & (o_pair < D // 2)
    o_rope = o_n[:, None] * (D // 2) + o_pair
    b_cos = _load(p_rope, o_rope, m_pair)
    b_sin = SIGN * _load(p_rope, N * (D // 2) + o_rope, m_pair)
    b_even, b_odd = tl.split(tl.reshape(b, [b.shape[0], LANES // 2, 2]))
    b = tl.join(b_even * b_cos - b_odd * b_sin, b_odd * b_cos + b_even * b_sin)
    return tl.reshape(b, [b.shape[0], LANES])


@triton.jit
def _mean(b, D):
    return (tl.sum(b, 1) / D)[:, None]


@triton.jit
def _normed(b, m, m_n, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Return heads b [ROWS, LANES] without their mean, times rstd, and rstd [ROWS, 1]."""
    if NORM == 2:
        b = tl.where(m, b - _mean(b, D), 0.0)
    # Rows past the end must not be infinite, since the backward adds them to its sums.
    b_rstd = tl.rsqrt(tl.where(m_n[:, None], _mean(b * b, D) + eps, 1.0))
    return b * b_rstd, b_rstd


@triton.jit
def qk_norm_rope_fwd_kernel(
    p_qkv,  # [B, N, 3, H, D]
    p_q_weight,  # [D], with a norm
    p_q_bias,  # [D], with a LayerNorm
    p_k_weight,  # [D], with a norm
    p_k_bias,  # [D], with a LayerNorm
    p_rope,  # [2, N, D / 2], where ROPE
    p_out,  # [B, N, 3, H, D] out
    N,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    LANES: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each program takes ROWS heads of one sample: of the queries, the keys or the values."""
    blocks = tl.cdiv(N * H, ROWS)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    i_part = tl.program_id(1)
    o_row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    o_n, m_n = o_row // H, o_row < N * H
    o_d = tl.arange(0, LANES)[None, :]
    m_d = o_d < D
    m = m_n[:, None] & m_d
    o_head = (i_b * N + o_n) * (3 * H * D) + (i_part * H + o_row % H) * D
    o = o_head[:, None] + o_d

    b = _load(p_qkv, o, m)
    if i_part < 2:
        if NORM > 0:
            b, _ = _normed(b, m, m_n, eps, D, NORM)
            b *= _own(i_part, p_q_weight, p_k_weight, o_d, m_d)
        if NORM == 2:
            b += _own(i_part, p_q_bias, p_k_bias, o_d, m_d)
        if ROPE:
            b = _turn(b, p_rope, o_n, m_n, N, D, LANES, 1)
    tl.store(p_out + o, b.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def qk_norm_rope_bwd_kernel(
    p_dout,  # [B, N, 3, H, D]
    p_qkv,  # [B, N, 3, H, D], with a norm
    p_q_weight,  # [D], with a norm
    p_k_weight,  # [D], with a norm
    p_rope,  # [2, N, D / 2], where ROPE
    p_dqkv,  # [B, N, 3, H, D] out
    p_partial,  # [B * chunks, 2, NORM, D] out, with a norm: for q and k dweight, and dbias if any
    N,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    LANES: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each program takes HEADS heads of one sample's queries, keys or values, ROWS at a time."""
    i_chunk, i_part = tl.program_id(0), tl.program_id(1)
    chunks = tl.cdiv(N * H, HEADS)
    i_b = (i_chunk // chunks).to(tl.int64)
    start = i_chunk % chunks * HEADS
    o_d = tl.arange(0, LANES)[None, :]
    m_d = o_d < D
    # The sums stay element-wise until the end: threads reduce once per program, not per tile.
    b_dweight = tl.zeros([ROWS, LANES], tl.float32)
    b_dbias = tl.zeros([ROWS, LANES], tl.float32)
    for i_row in range(start, tl.minimum(start + HEADS, N * H), ROWS):
        o_row = i_row + tl.arange(0, ROWS)
        o_n, m_n = o_row // H, o_row < N * H
        m = m_n[:, None] & m_d
        o_head = (i_b * N + o_n) * (3 * H * D) + (i_part * H + o_row % H) * D
        o = o_head[:, None] + o_d
        b_d = _load(p_dout, o, m)
        if i_part < 2:
            if ROPE:
                b_d = _turn(b_d, p_rope, o_n, m_n, N, D, LANES, -1)
            if NORM > 0:
                b_n, b_rstd = _normed(_load(p_qkv, o, m), m, m_n, eps, D, NORM)
                b_dweight += b_d * b_n
                if NORM == 2:
                    b_dbias += b_d
                b_d *= _own(i_part, p_q_weight, p_k_weight, o_d, m_d)
                b_e = b_d - b_n * _mean(b_d * b_n, D)
                if NORM == 2:
                    b_e -= _mean(b_d, D)
                b_d = b_rstd * b_e
        tl.store(p_dqkv + o, b_d.to(p_dqkv.dtype.element_ty), mask=m)

    if NORM > 0:
        if i_part < 2:
            p_sum = p_partial + (i_chunk.to(tl.int64) * 2 + i_part) * NORM * D
            tl.store(p_sum + o_d, tl.sum(b_dweight, 0)[None, :], mask=m_d)
            if NORM == 2:
                tl.store(p_sum + D + o_d, tl.sum(b_dbias, 0)[None, :], mask=m_d)


@triton.jit
def sum_chunks_kernel(
    p_partial,  # [chunks, SIZE]
    p_sum,  # [SIZE] out
    chunks,
    SIZE: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the partial sums in a fixed order, so that every run gives the same bits."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_c = tl.arange(0, CHUNKS)
    b_sum = tl.zeros([CHUNKS, BLOCK], tl.float32)
    for i_c in range(0, chunks, CHUNKS):
        o_tile = (i_c + o_c).to(tl.int64)[:, None] * SIZE + o[None, :]
        m = (i_c + o_c < chunks)[:, None] & (o < SIZE)[None, :]
        b_sum += tl.load(p_partial + o_tile, mask=m, other=0.0)
    tl.store(p_sum + o, tl.sum(b_sum, 0), mask=o < SIZE)


def qk_norm_rope_fwd_configs(d: int) -> list[triton.Config]:
    """Return the launch configurations for a head dim, the default first."""
    # With fewer channels to a thread ptxas rounds the registers down and spills (sm_100).
    rows = 8192 // _lanes(d)
    return _configs([(rows, 8), (rows, 4)])


def qk_norm_rope_bwd_configs(d: int) -> list[triton.Config]:
    """Return the launch configurations for a head dim, the default first."""
    rows = min(_HEADS, 2048 // _lanes(d))
    return _configs([(rows, 4), (rows, 8)])


def qk_norm_rope_fwd(
    qkv: Tensor,
    n_heads: int,
    weights: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    rope: Tensor | None,
    eps: float,
    config: triton.Config | None = None,
) -> Tensor:
    """Launch the forward.

    Args:
        qkv: [B, N, 3D].
        weights: (q_weight, q_bias, k_weight, k_bias), each [d] or None.
        rope: [2, N, d/2] or None.
        config: one of `qk_norm_rope_fwd_configs`; None for the default.

    Returns:
        [B, N, 3D] in qkv's dtype.
    """
    qkv, rope = qkv.contiguous(), contiguous(rope)
    out = torch.empty_like(qkv)
    if qkv.numel():
        launch = _prepare_fwd(qkv.shape, n_heads, _norm(weights), rope is not None, config)
        launch((qkv, *map(contiguous, weights), rope, out), qkv.shape[1], float(eps))
    return out


@functools.lru_cache(PREPARED)
def _prepare_fwd(
    shape: torch.Size, n_heads: int, norm: int, rope: bool, config: triton.Config | None
) -> PreparedLaunch:
    d = shape[2] // (3 * n_heads)
    config = config or qk_norm_rope_fwd_configs(d)[0]
    grid = (shape[0] * triton.cdiv(shape[1] * n_heads, config.kwargs["ROWS"]), 3)
    constants = _constants(d, n_heads, norm, rope) | config.all_kwargs()
    return PreparedLaunch(qk_norm_rope_fwd_kernel, grid, **constants)


def qk_norm_rope_bwd(
    dout: Tensor,
    qkv: Tensor,
    n_heads: int,
    weights: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    rope: Tensor | None,
    eps: float,
    config: triton.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the backward, from the gradient of the output and what the forward took.

    Args:
        config: one of `qk_norm_rope_bwd_configs`; None for the default.

    Returns:
        (dqkv in qkv's dtype, dweights [K, d] in float32: a row for each of the K weights
        that are not None).
    """
    dout, qkv, rope = dout.contiguous(), qkv.contiguous(), contiguous(rope)
    q_weight, _, k_weight, _ = map(contiguous, weights)
    d, norm = qkv.shape[2] // (3 * n_heads), _norm(weights)
    dqkv = torch.empty_like(qkv)
    dweights = qkv.new_empty((2 * norm, d), dtype=torch.float32)
    if not qkv.numel():
        return dqkv, dweights.zero_()
    heads, sums = _prepare_bwd(qkv.shape, n_heads, norm, rope is not None, config)
    chunks = qkv.shape[0] * -(-qkv.shape[1] * n_heads // _HEADS)
    partial = qkv.new_empty((chunks, *dweights.shape), dtype=torch.float32) if norm else None
    heads((dout, qkv, q_weight, k_weight, rope, dqkv, partial), qkv.shape[1], float(eps))
    if partial is not None:
        sums((partial, dweights), chunks)
    return dqkv, dweights


@functools.lru_cache(PREPARED)
def _prepare_bwd(
    shape: torch.Size, n_heads: int, norm: int, rope: bool, config: triton.Config | None
) -> tuple[PreparedLaunch, PreparedLaunch]:
    """Return the launches of the pass over the heads and of the sum of its partial sums."""
    d = shape[2] // (3 * n_heads)
    config = config or qk_norm_rope_bwd_configs(d)[0]
    grid = (shape[0] * triton.cdiv(shape[1] * n_heads, _HEADS), 3)
    constants = _constants(d, n_heads, norm, rope) | {"HEADS": _HEADS} | config.all_kwargs()
    heads = PreparedLaunch(qk_norm_rope_bwd_kernel, grid, **constants)
    grid = (triton.cdiv(2 * norm * d, _CHANNELS),)
    tile = dict(SIZE=2 * norm * d, CHUNKS=_CHUNKS, BLOCK=_CHANNELS)
    return heads, PreparedLaunch(sum_chunks_kernel, grid, **tile, num_warps=4)


def _norm(weights: tuple[Tensor | None, ...]) -> int:
    if weights[0] is None:
        return _NO_NORM
    return _RMS_NORM if weights[1] is None else _LAYER_NORM


def _lanes(d: int) -> int:
    return triton.next_power_of_2(max(2, d))


def _constants(d: int, n_heads: int, norm: int, rope: bool) -> dict[str, int | bool]:
    return dict(H=n_heads, D=d, LANES=_lanes(d), NORM=norm, ROPE=rope)


def _configs(sizes: list[tuple[int, int]]) -> list[triton.Config]:
    return [triton.Config({"ROWS": rows}, num_warps=warps, num_stages=1) for rows, warps in sizes]
