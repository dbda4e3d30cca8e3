"""LayerNorm and RMSNorm with adaLN modulation, alone and fused with the gated residual before it.

Forward, for each token of sample b (Peebles & Xie 2023, figure 3; Ba et al. 2016):

    r = x + gate_b * y                      # gated only; else r = x
    n = (r - mean(r)) * rstd(r),  rstd = 1 / sqrt(mean((r - mean(r))^2) + eps)
    h = n * (1 + scale_b) + shift_b         # shift_b may be missing

RMSNorm subtracts no mean, and its weight w multiplies 1 + scale_b (Zhang & Sennrich 2019):

    n = r * rstd(r),  rstd = 1 / sqrt(mean(r^2) + eps)
    h = n * (1 + scale_b) * w + shift_b

Backward, from dh and, in the gated op, dr; the sums run over the tokens of a sample:

    dn = dh * (1 + scale_b),  dx = rstd * (dn - mean(dn) - n * mean(dn * n)) + dr
    dy = gate_b * dx,  dgate_b = sum dx * y,  dscale_b = sum dh * n,  dshift_b = sum dh

For RMSNorm dn has the factor w too, and mean(dn) is left out. With g_b = sum dh * n, dscale_b is
w * g_b, and dw is the sum of (1 + scale_b) * g_b over samples.

A row of D channels is held as two power-of-two pieces, of which the second is masked. D = 1152 is
1024 + 128 and leaves no lane idle, and neither do 64, 72, 96, 384, 768 and 1024. The worst case is
D just past three quarters of a power of two, where almost a quarter of the lanes are idle.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels import adaln_configs as configs
from fastdit.kernels.common import arch, power_of_two_pieces
from fastdit.kernels.launch import PREPARED, PreparedLaunch
from fastdit.kernels.tensors import contiguous, rows_of

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
def _factor(p_scale, p_weight, o, m, RMS: tl.constexpr):
    b_factor = 1 + _load(p_scale, o, m)
    if RMS:
        b_factor *= _load(p_weight, o, m)
    return b_factor


@triton.jit
def _modulate(b_n, p_scale, p_shift, p_weight, o, m, RMS: tl.constexpr, SHIFTED: tl.constexpr):
    b_h = b_n * _factor(p_scale, p_weight, o, m, RMS)
    if SHIFTED:
        b_h += _load(p_shift, o, m)
    return b_h


@triton.jit
def norm_modulate_fwd_kernel(
    p_x,  # [B, N, D]
    p_y,  # [B, N, D], gated only
    p_gate,  # [B, D] by s_gate, gated only
    p_scale,  # [B, D] by s_scale
    p_shift,  # [B, D] by s_shift, where SHIFTED
    p_weight,  # [D], RMS only
    p_r,  # [B, N, D] out, gated only
    p_h,  # [B, N, D] out
    p_mean,  # [B, N] out, LayerNorm only
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
    RMS: tl.constexpr,
    SHIFTED: tl.constexpr,
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

    if not RMS:
        b_mean = _mean(b_r0, b_r1, D)
        b_r0 = tl.where(m_0, b_r0 - b_mean[:, None], 0.0)
        b_r1 = tl.where(m_1, b_r1 - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(_mean(b_r0 * b_r0, b_r1 * b_r1, D) + eps)
    if not RMS:
        tl.store(p_mean + o_row, b_mean, mask=m_n)
    tl.store(p_rstd + o_row, b_rstd, mask=m_n)

    p_scale += i_b * s_scale
    if SHIFTED:
        p_shift += i_b * s_shift
    b_rstd = b_rstd[:, None]
    b_h0 = _modulate(b_r0 * b_rstd, p_scale, p_shift, p_weight, o_d0, m_d0, RMS, SHIFTED)
    b_h1 = _modulate(b_r1 * b_rstd, p_scale, p_shift, p_weight, o_d1, m_d1, RMS, SHIFTED)
    _store(p_h, o_0, o_1, b_h0, b_h1, m_0, m_1)


@triton.jit
def norm_modulate_bwd_kernel(
    p_dh,  # [B, N, D]
    p_dr,  # [B, N, D], where HAS_DR
    p_r,  # [B, N, D]
    p_y,  # [B, N, D], gated only
    p_gate,  # [B, D] by s_gate, gated only
    p_scale,  # [B, D] by s_scale
    p_weight,  # [D], RMS only
    p_mean,  # [B, N], LayerNorm only
    p_rstd,  # [B, N]
    p_dx,  # [B, N, D] out
    p_dy,  # [B, N, D] out, gated only
    p_partial,  # [B, chunks, 3, D] out: g, dshift, dgate of a chunk
    s_gate,
    s_scale,
    N,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    GATED: tl.constexpr,
    HAS_DR: tl.constexpr,
    RMS: tl.constexpr,
    SHIFTED: tl.constexpr,
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
    b_factor0 = _factor(p_scale + i_b * s_scale, p_weight, o_d0, m_d0, RMS)
    b_factor1 = _factor(p_scale + i_b * s_scale, p_weight, o_d1, m_d1, RMS)
    if GATED:
        b_gate0 = _load(p_gate + i_b * s_gate, o_d0, m_d0)
        b_gate1 = _load(p_gate + i_b * s_gate, o_d1, m_d1)

    # The sums stay element-wise until the end: threads reduce once per program, not per tile.
    b_g0, b_g1 = tl.zeros([ROWS, D0], tl.float32), tl.zeros([ROWS, D1], tl.float32)
    b_dshift0, b_dshift1 = tl.zeros([ROWS, D0], tl.float32), tl.zeros([ROWS, D1], tl.float32)
    b_dgate0, b_dgate1 = tl.zeros([ROWS, D0], tl.float32), tl.zeros([ROWS, D1], tl.float32)
    for i_n in range(start, tl.minimum(start + TOKENS, N), ROWS):
        o_n = i_n + tl.arange(0, ROWS)
        m_n = o_n < N
        m_0, m_1 = m_n[:, None] & m_d0, m_n[:, None] & m_d1
        o_row = i_b * N + o_n
        o_0, o_1 = o_row[:, None] * D + o_d0, o_row[:, None] * D + o_d1
        if not RMS:
            b_mean = tl.load(p_mean + o_row, mask=m_n, other=0.0)[:, None]
        b_rstd = tl.load(p_rstd + o_row, mask=m_n, other=0.0)[:, None]
        b_dh0, b_dh1 = _load(p_dh, o_0, m_0), _load(p_dh, o_1, m_1)
        if RMS:
            b_n0, b_n1 = _load(p_r, o_0, m_0) * b_rstd, _load(p_r, o_1, m_1) * b_rstd
        else:
            b_n0 = (_load(p_r, o_0, m_0) - b_mean) * b_rstd
            b_n1 = (_load(p_r, o_1, m_1) - b_mean) * b_rstd
        b_g0 += b_dh0 * b_n0
        b_g1 += b_dh1 * b_n1
        if SHIFTED:
            b_dshift0 += b_dh0
            b_dshift1 += b_dh1

        b_dn0, b_dn1 = b_dh0 * b_factor0, b_dh1 * b_factor1
        if not RMS:
            b_mean_dn = _mean(b_dn0, b_dn1, D)[:, None]
        b_mean_dn_n = _mean(b_dn0 * b_n0, b_dn1 * b_n1, D)[:, None]
        if RMS:
            b_dx0 = b_rstd * (b_dn0 - b_n0 * b_mean_dn_n)
            b_dx1 = b_rstd * (b_dn1 - b_n1 * b_mean_dn_n)
        else:
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
    tl.store(p_partial + o_d0, tl.sum(b_g0, 0)[None, :], mask=m_d0)
    tl.store(p_partial + o_d1, tl.sum(b_g1, 0)[None, :], mask=m_d1)
    if SHIFTED:
        tl.store(p_partial + D + o_d0, tl.sum(b_dshift0, 0)[None, :], mask=m_d0)
        tl.store(p_partial + D + o_d1, tl.sum(b_dshift1, 0)[None, :], mask=m_d1)
    if GATED:
        tl.store(p_partial + 2 * D + o_d0, tl.sum(b_dgate0, 0)[None, :], mask=m_d0)
        tl.store(p_partial + 2 * D + o_d1, tl.sum(b_dgate1, 0)[None, :], mask=m_d1)


@triton.jit
def sum_partials_kernel(
    p_partial,  # [B, chunks, 3, D]
    p_scale,  # [B, D] by s_scale, RMS only
    p_weight,  # [D], RMS only
    p_dscale,  # [B, D] out
    p_dshift,  # [B, D] out, where SHIFTED
    p_dgate,  # [B, D] out, gated only
    p_dweight,  # [B, D] float32 out, RMS only: each sample's part
    s_scale,  # None for LayerNorm
    chunks,
    D: tl.constexpr,
    GATED: tl.constexpr,
    RMS: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the partial sums in a fixed order, so that every run gives the same bits."""
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < D
    p_partial += i_b * chunks * 3 * D + o_d
    b_g = tl.zeros([BLOCK], tl.float32)
    b_dshift = tl.zeros([BLOCK], tl.float32)
    b_dgate = tl.zeros([BLOCK], tl.float32)
    for _ in range(chunks):
        b_g += tl.load(p_partial, mask=m_d, other=0.0)
        if SHIFTED:
            b_dshift += tl.load(p_partial + D, mask=m_d, other=0.0)
        if GATED:
            b_dgate += tl.load(p_partial + 2 * D, mask=m_d, other=0.0)
        p_partial += 3 * D
    o_out = i_b * D + o_d
    if RMS:
        b_scale = 1 + _load(p_scale + i_b * s_scale, o_d, m_d)
        tl.store(p_dweight + o_out, b_scale * b_g, mask=m_d)
        b_g *= _load(p_weight, o_d, m_d)
    tl.store(p_dscale + o_out, b_g.to(p_dscale.dtype.element_ty), mask=m_d)
    if SHIFTED:
        tl.store(p_dshift + o_out, b_dshift.to(p_dshift.dtype.element_ty), mask=m_d)
    if GATED:
        tl.store(p_dgate + o_out, b_dgate.to(p_dgate.dtype.element_ty), mask=m_d)


class _Kind(NamedTuple):
    GATED: bool
    RMS: bool
    SHIFTED: bool


def norm_modulate_fwd(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    weight: Tensor | None = None,
    residual: tuple[Tensor, Tensor] | None = None,
    config: triton.Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Launch the forward: RMSNorm if there is a weight, else LayerNorm.

    Args:
        x: [B, N, D].
        scale: [B, D], like shift, which may be None.
        weight: [D].
        residual: (y [B, N, D], gate [B, D]) of the gated op.
        config: one of `norm_modulate_fwd_configs`; None for the default.

    Returns:
        (r [B, N, D], h [B, N, D], mean [B, N], rstd [B, N]): r is x itself without a gate, h has
        scale's dtype, and the statistics are float32; RMSNorm's mean is None.
    """
    B, N, D = x.shape
    y, gate = residual or (None, None)
    x, y, weight = x.contiguous(), contiguous(y), contiguous(weight)
    (gate, s_gate), (scale, s_scale), (shift, s_shift) = map(rows_of, (gate, scale, shift))
    r = x if gate is None else torch.empty_like(x)
    h = torch.empty_like(x, dtype=scale.dtype)
    rstd = x.new_empty((B, N), dtype=torch.float32)
    mean = torch.empty_like(rstd) if weight is None else None
    if x.numel():
        kind = _Kind(gate is not None, weight is not None, shift is not None)
        launch = _prepare_fwd(B, N, D, kind, config)
        tensors = (x, y, gate, scale, shift, weight, r, h, mean, rstd)
        launch(tensors, s_gate, s_scale, s_shift, N, float(eps))
    return r, h, mean, rstd


@functools.lru_cache(PREPARED)
def _prepare_fwd(
    B: int, N: int, D: int, kind: _Kind, config: triton.Config | None
) -> PreparedLaunch:
    config = config or configs.norm_modulate_fwd_configs(D)[0]
    D0, D1 = power_of_two_pieces(D)
    grid = (B * triton.cdiv(N, config.kwargs["ROWS"]),)
    constants = dict(D=D, D0=D0, D1=D1) | kind._asdict()
    return PreparedLaunch(norm_modulate_fwd_kernel, grid, **constants, **config.all_kwargs())


def norm_modulate_bwd(
    dh: Tensor,
    r: Tensor,
    scale: Tensor,
    statistics: tuple[Tensor | None, Tensor],
    weight: Tensor | None = None,
    residual: tuple[Tensor | None, Tensor, Tensor] | None = None,
    shifted: bool = True,
    config: triton.Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Launch the backward, from the gradient of h, and what the forward took and returned.

    Args:
        statistics: (mean, rstd).
        residual: (dr or None, y, gate) of the gated op.
        shifted: whether there was a shift.
        config: one of `norm_modulate_bwd_configs`; None for the default.

    Returns:
        (dx, dy, dgate, dscale, dshift, dweight) in the dtypes of r, y, gate, scale, scale and
        weight; each is None where the forward had no such input.
    """
    (B, N, D), (mean, rstd) = r.shape, statistics
    dr, y, gate = residual or (None, None, None)
    dh, r, dr, y, weight = dh.contiguous(), r.contiguous(), *map(contiguous, (dr, y, weight))
    (gate, s_gate), (scale, s_scale) = rows_of(gate), rows_of(scale)
    dx = torch.empty_like(r)
    dy = None if y is None else torch.empty_like(y)
    dscale = scale.new_empty(B, D)
    dshift = torch.empty_like(dscale) if shifted else None
    dgate = None if gate is None else gate.new_empty(B, D)
    parts = None if weight is None else r.new_empty((B, D), dtype=torch.float32)
    sums = (dscale, dshift, dgate, parts)
    if r.numel():
        partial = r.new_empty((B, triton.cdiv(N, configs.TOKENS), 3, D), dtype=torch.float32)
        kind = _Kind(gate is not None, weight is not None, shifted)
        rms_on = None if weight is None else arch(r.device)
        over_rows, over_chunks = _prepare_bwd(r.shape, kind, dr is not None, rms_on, config)
        tensors = (dh, dr, r, y, gate, scale, weight, mean, rstd, dx, dy, partial)
        over_rows(tensors, s_gate, s_scale, N)
        own, s_own = ((None, None), None) if weight is None else ((scale, weight), s_scale)
        over_chunks((partial, *own, *sums), s_own, partial.shape[1])
    else:
        for t in filter(torch.is_tensor, sums):
            t.zero_()
    dweight = None if parts is None or weight is None else parts.sum(0).to(weight.dtype)
    return dx, dy, dgate, dscale, dshift, dweight


@functools.lru_cache(PREPARED)
def _prepare_bwd(
    shape: torch.Size, kind: _Kind, has_dr: bool, rms_on: str | None, config: triton.Config | None
) -> tuple[PreparedLaunch, PreparedLaunch]:
    """Return the launches of the pass over the rows and of the sum of its partial sums."""
    B, N, D = shape
    config = config or configs.norm_modulate_bwd_configs(D, rms_on)[0]
    D0, D1 = power_of_two_pieces(D)
    grid = (B * triton.cdiv(N, configs.TOKENS),)
    constants = dict(D=D, D0=D0, D1=D1, HAS_DR=has_dr, TOKENS=configs.TOKENS) | kind._asdict()
    constants |= config.all_kwargs()
    rows = PreparedLaunch(norm_modulate_bwd_kernel, grid, **constants)
    grid, constants = (B, triton.cdiv(D, _SUMS)), dict(D=D, BLOCK=_SUMS) | kind._asdict()
    return rows, PreparedLaunch(sum_partials_kernel, grid, **constants, num_warps=1)
