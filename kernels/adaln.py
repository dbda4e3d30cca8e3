"""LayerNorm with adaLN modulation, alone and fused with the gated residual before it.

Forward, for each token of sample b (Peebles & Xie 2023, figure 3; Ba et al. 2016):

    r = x + gate_b * y                      # gated only; else r = x
    n = (r - mean(r)) * rstd(r),  rstd = 1 / sqrt(mean((r - mean(r))^2) + eps)
    h = n * (1 + scale_b) + shift_b

Backward, from dh and, in the gated op, dr; the sums run over the tokens of a sample:

    dn = dh * (1 + scale_b)
    dx = rstd * (dn - mean(dn) - n * mean(dn * n)) + dr
    dy = gate_b * dx,  dgate_b = sum dx * y,  dscale_b = sum dh * n,  dshift_b = sum dh

A row of D channels is held as two power-of-two pieces, of which the second is masked. D = 1152 is
1024 + 128 and leaves no lane idle, and neither do 64, 72, 96, 384, 768 and 1024. The worst case is
D just past three quarters of a power of two, where almost a quarter of the lanes are idle.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels.common import power_of_two_pieces
from fastdit.kernels.launch import PREPARED, PreparedLaunch
from fastdit.kernels.tensors import contiguous, rows_of

_TOKENS = 32  # per program of the backward: its three partial sums are 1/32 of a pass over the rows
_SUMS = 256  # channels per program of the second stage


@triton.jit
def _load(p, o, m):
    return tl.load(p + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _store(p, o_0, o_1, b_0, b_1, m_0, m_1):
    tl.store(p + o_0, b_0.to(p.dtype.element_ty), mask=m_0)
    tl.store(p + o_1, b_1.to(p.dtype.element_ty), mask=m_1)


@triton.jit
def _mean(b_0, b_1, D):
    return (tl.sum(b_0, 1) + tl.sum(b_1, 1)) / D


@triton.jit
def layer_norm_modulate_fwd_kernel(
    p_x,  # [B, N, D]
    p_y,  # [B, N, D], gated only
    p_gate,  # [B, D] by s_gate, gated only
    p_scale,  # [B, D] by s_scale
    p_shift,  # [B, D] by s_shift
    p_r,  # [B, N, D] out, gated only
    p_h,  # [B, N, D] out
    p_mean,  # [B, N] out
    p_rstd,  # [B, N] out
    s_gate,
    s_scale,
    s_shift,
    N,
    eps,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each program holds ROWS tokens of one sample in registers from the load to the store."""
    blocks = tl.cdiv(N, ROWS)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_n = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    m_n = o_n < N
    o_d0 = tl.arange(0, D0)[None, :]
    o_d1 = D0 + tl.arange(0, D1)[None, :]
    m_d0, m_d1 = o_d0 < D, o_d1 < D
    m_0, m_1 = m_n[:, None] & m_d0, m_n[:, None] & m_d1
    o_row = i_b * N + o_n
    o_0, o_1 = o_row[:, None] * D + o_d0, o_row[:, None] * D + o_d1

    b_r0, b_r1 = _load(p_x, o_0, m_0), _load(p_x, o_1, m_1)
    if GATED:
        p_gate += i_b * s_gate
        b_r0 += _load(p_gate, o_d0, m_d0) * _load(p_y, o_0, m_0)
        b_r1 += _load(p_gate, o_d1, m_d1) * _load(p_y, o_1, m_1)
        # The residual is rounded before its statistics are taken, as the unfused ops round it.
        b_r0, b_r1 = b_r0.to(p_r.dtype.element_ty), b_r1.to(p_r.dtype.element_ty)
        _store(p_r, o_0, o_1, b_r0, b_r1, m_0, m_1)
        b_r0, b_r1 = b_r0.to(tl.float32), b_r1.to(tl.float32)

    b_mean = _mean(b_r0, b_r1, D)
    b_r0 = tl.where(m_0, b_r0 - b_mean[:, None], 0.0)
    b_r1 = tl.where(m_1, b_r1 - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(_mean(b_r0 * b_r0, b_r1 * b_r1, D) + eps)
    tl.store(p_mean + o_row, b_mean, mask=m_n)
    tl.store(p_rstd + o_row, b_rstd, mask=m_n)

    p_scale += i_b * s_scale
    p_shift += i_b * s_shift
    b_h0 = b_r0 * b_rstd[:, None] * (1 + _load(p_scale, o_d0, m_d0)) + _load(p_shift, o_d0, m_d0)
    b_h1 = b_r1 * b_rstd[:, None] * (1 + _load(p_scale, o_d1, m_d1)) + _load(p_shift, o_d1, m_d1)
    _store(p_h, o_0, o_1, b_h0, b_h1, m_0, m_1)


@triton.jit
def layer_norm_modulate_bwd_kernel(
    p_dh,  # [B, N, D]
    p_dr,  # [B, N, D], where HAS_DR
    p_r,  # [B, N, D]
    p_y,  # [B, N, D], gated only
    p_gate,  # [B, D] by s_gate, gated only
    p_scale,  # [B, D] by s_scale
    p_mean,  # [B, N]
    p_rstd,  # [B, N]
    p_dx,  # [B, N, D] out
    p_dy,  # [B, N, D] out, gated only
    p_partial,  # [B, chunks, 3, D] out: dscale, dshift, dgate of a chunk
    s_gate,
    s_scale,
    N,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    GATED: tl.constexpr,
    HAS_DR: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each program takes TOKENS tokens of one sample, ROWS at a time, and their partial sums."""
    i_chunk = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(N, TOKENS)
    i_b = i_chunk // chunks
    start = (i_chunk % chunks).to(tl.int32) * TOKENS
    o_d0 = tl.arange(0, D0)[None, :]
    o_d1 = D0 + tl.arange(0, D1)[None, :]
    m_d0, m_d1 = o_d0 < D, o_d1 < D
    b_scale0 = 1 + _load(p_scale + i_b * s_scale, o_d0, m_d0)
    b_scale1 = 1 + _load(p_scale + i_b * s_scale, o_d1, m_d1)
    if GATED:
        b_gate0 = _load(p_gate + i_b * s_gate, o_d0, m_d0)
        b_gate1 = _load(p_gate + i_b * s_gate, o_d1, m_d1)

    # The sums stay element-wise until the end: threads reduce once per program, not per tile.
    b_dscale0, b_dscale1 = tl.zeros([ROWS, D0], tl.float32), tl.zeros([ROWS, D1], tl.float32)
    b_dshift0, b_dshift1 = tl.zeros([ROWS, D0], tl.float32), tl.zeros([ROWS, D1], tl.float32)
    b_dgate0, b_dgate1 = tl.zeros([ROWS, D0], tl.float32), tl.zeros([ROWS, D1], tl.float32)
    for i_n in range(start, tl.minimum(start + TOKENS, N), ROWS):
        o_n = i_n + tl.arange(0, ROWS)
        m_n = o_n < N
        m_0, m_1 = m_n[:, None] & m_d0, m_n[:, None] & m_d1
        o_row = i_b * N + o_n
        o_0, o_1 = o_row[:, None] * D + o_d0, o_row[:, None] * D + o_d1
        b_mean = tl.load(p_mean + o_row, mask=m_n, other=0.0)[:, None]
        b_rstd = tl.load(p_rstd + o_row, mask=m_n, other=0.0)[:, None]
        b_dh0, b_dh1 = _load(p_dh, o_0, m_0), _load(p_dh, o_1, m_1)
        b_n0 = (_load(p_r, o_0, m_0) - b_mean) * b_rstd
        b_n1 = (_load(p_r, o_1, m_1) - b_mean) * b_rstd
        b_dscale0 += b_dh0 * b_n0
        b_dscale1 += b_dh1 * b_n1
        b_dshift0 += b_dh0
        b_dshift1 += b_dh1

        b_dn0, b_dn1 = b_dh0 * b_scale0, b_dh1 * b_scale1
        b_mean_dn = _mean(b_dn0, b_dn1, D)[:, None]
        b_mean_dn_n = _mean(b_dn0 * b_n0, b_dn1 * b_n1, D)[:, None]
        b_dx0 = b_rstd * (b_dn0 - b_mean_dn - b_n0 * b_mean_dn_n)
        b_dx1 = b_rstd * (b_dn1 - b_mean_dn - b_n1 * b_mean_dn_n)
        if HAS_DR:
            b_dx0 += _load(p_dr, o_0, m_0)
            b_dx1 += _load(p_dr, o_1, m_1)
        _store(p_dx, o_0, o_1, b_dx0, b_dx1, m_0, m_1)
        if GATED:
            tl.store(p_dy + o_0, (b_gate0 * b_dx0).to(p_dy.dtype.element_ty), mask=m_0)
            tl.store(p_dy + o_1, (b_gate1 * b_dx1).to(p_dy.dtype.element_ty), mask=m_1)
            b_dgate0 += b_dx0 * _load(p_y, o_0, m_0)
            b_dgate1 += b_dx1 * _load(p_y, o_1, m_1)

    p_partial += i_chunk * 3 * D
    tl.store(p_partial + o_d0, tl.sum(b_dscale0, 0)[None, :], mask=m_d0)
    tl.store(p_partial + o_d1, tl.sum(b_dscale1, 0)[None, :], mask=m_d1)
    tl.store(p_partial + D + o_d0, tl.sum(b_dshift0, 0)[None, :], mask=m_d0)
    tl.store(p_partial + D + o_d1, tl.sum(b_dshift1, 0)[None, :], mask=m_d1)
    if GATED:
        tl.store(p_partial + 2 * D + o_d0, tl.sum(b_dgate0, 0)[None, :], mask=m_d0)
        tl.store(p_partial + 2 * D + o_d1, tl.sum(b_dgate1, 0)[None, :], mask=m_d1)


@triton.jit
def sum_partials_kernel(
    p_partial,  # [B, chunks, 3, D]
    p_dscale,  # [B, D] out
    p_dshift,  # [B, D] out
    p_dgate,  # [B, D] out, gated only
    chunks,
    D: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the partial sums in a fixed order, so that every run gives the same bits."""
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < D
    p_partial += i_b * chunks * 3 * D + o_d
    b_dscale = tl.zeros([BLOCK], tl.float32)
    b_dshift = tl.zeros([BLOCK], tl.float32)
    b_dgate = tl.zeros([BLOCK], tl.float32)
    for _ in range(chunks):
        b_dscale += tl.load(p_partial, mask=m_d, other=0.0)
        b_dshift += tl.load(p_partial + D, mask=m_d, other=0.0)
        if GATED:
            b_dgate += tl.load(p_partial + 2 * D, mask=m_d, other=0.0)
        p_partial += 3 * D
    o_out = i_b * D + o_d
    tl.store(p_dscale + o_out, b_dscale.to(p_dscale.dtype.element_ty), mask=m_d)
    tl.store(p_dshift + o_out, b_dshift.to(p_dshift.dtype.element_ty), mask=m_d)
    if GATED:
        tl.store(p_dgate + o_out, b_dgate.to(p_dgate.dtype.element_ty), mask=m_d)


def layer_norm_modulate_fwd_configs(D: int) -> list[triton.Config]:
    """Return the launch configurations for D channels, the default first."""
    width = sum(power_of_two_pieces(D))
    warps = min(16, _power_of_two_below(width // 2048))
    # A warp owns whole rows, so that no sum crosses warps; 2048 channels are 64 registers a thread.
    rows = _power_of_two_below(min(16, 2048 // width))
    sizes = [(rows, warps), (max(1, rows // 2), warps), (4 * rows, 4 * warps)]
    # With two warps to a row ptxas rounds the registers down to 48 and spills (Triton 3.6).
    if rows * power_of_two_pieces(D)[0] >= 8 * 32 * 4 * warps:  # a thread loads 8 channels at once
        sizes.append((rows, 4 * warps))
    return _configs([(own, count) for own, count in sizes if count <= 16])


def layer_norm_modulate_bwd_configs(D: int) -> list[triton.Config]:
    """Return the launch configurations for D channels, the default first."""
    width = sum(power_of_two_pieces(D))
    warps = 4 if width <= 2048 else 8 if width <= 4096 else 16
    # A thread holds three sums and four inputs of its part of a tile; up to 18 channels fit.
    rows = _power_of_two_below(min(_TOKENS, 18 * 32 * warps // width))
    half = rows // 2
    wide = half * power_of_two_pieces(D)[0] >= 8 * 32 * warps  # a thread loads 8 at once
    return _configs([(rows, warps), (half, warps)] if wide else [(rows, warps)])


def layer_norm_modulate_fwd(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    config: triton.Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward, with the gated residual if y and gate are given.

    Args:
        x: [B, N, D], like y.
        scale: [B, D], like shift and gate.
        config: one of `layer_norm_modulate_fwd_configs`; None for the default.

    Returns:
        (r [B, N, D], h [B, N, D], mean [B, N], rstd [B, N]): r is x itself without a gate, h has
        scale's dtype, and the statistics are float32.
    """
    B, N, D = x.shape
    x, y = x.contiguous(), contiguous(y)
    gate, s_gate = rows_of(gate)
    (scale, s_scale), (shift, s_shift) = rows_of(scale), rows_of(shift)
    r = x if gate is None else torch.empty_like(x)
    h = torch.empty_like(x, dtype=scale.dtype)
    mean = x.new_empty((B, N), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel():
        launch = _prepare_fwd(B, N, D, gate is not None, config)
        tensors = (x, y, gate, scale, shift, r, h, mean, rstd)
        launch(tensors, s_gate, s_scale, s_shift, N, float(eps))
    return r, h, mean, rstd


@functools.lru_cache(PREPARED)
def _prepare_fwd(
    B: int, N: int, D: int, gated: bool, config: triton.Config | None
) -> PreparedLaunch:
    config = config or layer_norm_modulate_fwd_configs(D)[0]
    D0, D1 = power_of_two_pieces(D)
    grid = (B * triton.cdiv(N, config.kwargs["ROWS"]),)
    constants = dict(D=D, D0=D0, D1=D1, GATED=gated)
    return PreparedLaunch(layer_norm_modulate_fwd_kernel, grid, **constants, **config.all_kwargs())


def layer_norm_modulate_bwd(
    dh: Tensor,
    r: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual: tuple[Tensor | None, Tensor, Tensor] | None = None,
    config: triton.Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Launch the backward, from the gradient of h, and what the forward took and returned.

    Args:
        residual: (dr or None, y, gate) of the gated op.
        config: one of `layer_norm_modulate_bwd_configs`; None for the default.

    Returns:
        (dx, dy, dgate, dscale, dshift) in the dtypes of r, y, gate, scale and scale; dy and dgate
        are None without a gate.
    """
    B, N, D = r.shape
    dr, y, gate = residual if residual else (None, None, None)
    dh, r, dr, y = dh.contiguous(), r.contiguous(), contiguous(dr), contiguous(y)
    (gate, s_gate), (scale, s_scale) = rows_of(gate), rows_of(scale)
    dx = torch.empty_like(r)
    dy = None if y is None else torch.empty_like(y)
    dscale = scale.new_empty(B, D)
    dshift = torch.empty_like(dscale)
    dgate = None if gate is None else gate.new_empty(B, D)
    if not r.numel():
        for t in (dgate, dscale, dshift):
            if t is not None:
                t.zero_()
        return dx, dy, dgate, dscale, dshift
    chunks = -(-N // _TOKENS)
    partial = r.new_empty((B, chunks, 3, D), dtype=torch.float32)
    rows, sums = _prepare_bwd(B, N, D, gate is not None, dr is not None, config)
    tensors = (dh, dr, r, y, gate, scale, mean, rstd, dx, dy, partial)
    rows(tensors, s_gate, s_scale, N)
    sums((partial, dscale, dshift, dgate), chunks)
    return dx, dy, dgate, dscale, dshift


@functools.lru_cache(PREPARED)
def _prepare_bwd(
    B: int, N: int, D: int, gated: bool, has_dr: bool, config: triton.Config | None
) -> tuple[PreparedLaunch, PreparedLaunch]:
    """Return the launches of the pass over the rows and of the sum of its partial sums."""
    config = config or layer_norm_modulate_bwd_configs(D)[0]
    D0, D1 = power_of_two_pieces(D)
    grid = (B * triton.cdiv(N, _TOKENS),)
    constants = dict(D=D, D0=D0, D1=D1, GATED=gated, HAS_DR=has_dr, TOKENS=_TOKENS)
    constants |= config.all_kwargs()
    rows = PreparedLaunch(layer_norm_modulate_bwd_kernel, grid, **constants)
    grid = B, triton.cdiv(D, _SUMS)
    sums = PreparedLaunch(sum_partials_kernel, grid, D=D, GATED=gated, BLOCK=_SUMS, num_warps=1)
    return rows, sums


def _power_of_two_below(n: int) -> int:
    return 1 << max(1, n).bit_length() - 1


def _configs(sizes: list[tuple[int, int]]) -> list[triton.Config]:
    return [
        triton.Config({"ROWS": rows}, num_warps=warps, num_stages=1)
        for rows, warps in dict.fromkeys(sizes)
    ]
