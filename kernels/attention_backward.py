"""The backward of softmax attention; `fastdit.kernels.attention` has the forward.

With the forward's S, P, lse and O, and c = log2(e) / sqrt(d) (Dao 2023, "FlashAttention-2",
algorithm 2):

    P = 2^(c S - lse),  delta = sum(O * dO) by row,  dS = P * (dO V^T - delta)
    dQ = dS K / sqrt(d),  dK = dS^T Q / sqrt(d),  dV = P^T dO

Nothing is summed by atomics: dQ has a pass of its own, which also writes the delta that the pass
of dK and dV reads.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels.attention_common import Kind, kind_of, prepare, store, tile, unit_stride
from fastdit.kernels.attention_configs import attention_dkv_bwd_configs, attention_dq_bwd_configs
from fastdit.kernels.launch import PREPARED, PreparedLaunch


@triton.jit
def attention_dq_bwd_kernel(
    p_qkv,  # [B, N, 3, h, D] by s_b, s_n
    p_out,  # [B, N, h, D]
    p_dout,  # [B, N, h, D]
    p_lse,  # [B, h, N]
    p_delta,  # [B, h, N] out
    p_dqkv,  # [B, N, 3, h, D] out
    s_b,
    s_n,
    N,
    n_heads,
    scale,
    scale_log2,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Each program computes dQ and delta of BM queries of a head, over its keys BN at a time."""
    tiles = tl.cdiv(N, BM)
    i_bh = tl.program_id(0) // tiles
    i_m = tl.program_id(0) % tiles * BM
    i_b, i_h = (i_bh // n_heads).to(tl.int64), i_bh % n_heads
    width = n_heads * D
    o_out = ((i_b * N + i_m) * n_heads + i_h) * D
    p_q = p_qkv + i_b * s_b + i_h * D
    p_k = p_q + width
    p_v = p_k + width
    p_q += i_m.to(tl.int64) * s_n
    b_q0 = tile(p_q, s_n, N - i_m, 0, D0, BM, D, EVEN, DOT)
    b_do0 = tile(p_dout + o_out, width, N - i_m, 0, D0, BM, D, EVEN, DOT)
    b_o0 = tile(p_out + o_out, width, N - i_m, 0, D0, BM, D, EVEN, DOT)
    b_delta = tl.sum(b_o0.to(tl.float32) * b_do0.to(tl.float32), 1)
    if D1:
        b_q1 = tile(p_q, s_n, N - i_m, D0, D1, BM, D, EVEN, DOT)
        b_do1 = tile(p_dout + o_out, width, N - i_m, D0, D1, BM, D, EVEN, DOT)
        b_o1 = tile(p_out + o_out, width, N - i_m, D0, D1, BM, D, EVEN, DOT)
        b_delta += tl.sum(b_o1.to(tl.float32) * b_do1.to(tl.float32), 1)
    o_m = i_m + tl.arange(0, BM)
    o_lse = i_bh.to(tl.int64) * N + o_m
    b_lse = tl.load(p_lse + o_lse, mask=o_m < N, other=float("inf"))
    tl.store(p_delta + o_lse, b_delta, mask=o_m < N)

    b_dq0 = tl.zeros([BM, D0], tl.float32)
    b_dq1 = tl.zeros([BM, D1 if D1 else 16], tl.float32)
    for i_n in range(0, N, BN):
        b_k0 = tile(p_k, s_n, N - i_n, 0, D0, BN, D, EVEN, DOT)
        b_v0 = tile(p_v, s_n, N - i_n, 0, D0, BN, D, EVEN, DOT)
        b_s = tl.dot(b_q0, b_k0.T, input_precision=PRECISION)
        b_dp = tl.dot(b_do0, b_v0.T, input_precision=PRECISION)
        if D1:
            b_k1 = tile(p_k, s_n, N - i_n, D0, D1, BN, D, EVEN, DOT)
            b_v1 = tile(p_v, s_n, N - i_n, D0, D1, BN, D, EVEN, DOT)
            b_s = tl.dot(b_q1, b_k1.T, b_s, input_precision=PRECISION)
            b_dp = tl.dot(b_do1, b_v1.T, b_dp, input_precision=PRECISION)
        if not EVEN:
            b_s = tl.where(i_n + tl.arange(0, BN)[None, :] < N, b_s, float("-inf"))
        b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(DOT)
        b_dq0 = tl.dot(b_ds, b_k0, b_dq0, input_precision=PRECISION)
        if D1:
            b_dq1 = tl.dot(b_ds, b_k1, b_dq1, input_precision=PRECISION)
        p_k += BN * s_n.to(tl.int64)
        p_v += BN * s_n.to(tl.int64)

    p_dqkv += (i_b * N + i_m) * 3 * width + i_h * D
    store(p_dqkv, 3 * width, N - i_m, b_dq0 * scale, 0, D0, BM, D)
    if D1:
        store(p_dqkv, 3 * width, N - i_m, b_dq1 * scale, D0, D1, BM, D)


@triton.jit
def attention_dkv_bwd_kernel(
    p_qkv,  # [B, N, 3, h, D] by s_b, s_n
    p_dout,  # [B, N, h, D]
    p_lse,  # [B, h, N]
    p_delta,  # [B, h, N]
    p_dqkv,  # [B, N, 3, h, D] out
    s_b,
    s_n,
    N,
    n_heads,
    scale,
    scale_log2,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Each program computes dK and dV of BN keys of a head, over its queries BM at a time.

    Scores are transposed: keys are rows, and queries are columns.
    """
    tiles = tl.cdiv(N, BN)
    i_bh = tl.program_id(0) // tiles
    i_n = tl.program_id(0) % tiles * BN
    i_b, i_h = (i_bh // n_heads).to(tl.int64), i_bh % n_heads
    width = n_heads * D
    p_q = p_qkv + i_b * s_b + i_h * D
    p_k = p_q + width + i_n.to(tl.int64) * s_n
    p_v = p_k + width
    p_dout += (i_b * N * n_heads + i_h) * D
    p_lse += i_bh.to(tl.int64) * N
    p_delta += i_bh.to(tl.int64) * N
    b_k0 = tile(p_k, s_n, N - i_n, 0, D0, BN, D, EVEN, DOT)
    b_v0 = tile(p_v, s_n, N - i_n, 0, D0, BN, D, EVEN, DOT)
    if D1:
        b_k1 = tile(p_k, s_n, N - i_n, D0, D1, BN, D, EVEN, DOT)
        b_v1 = tile(p_v, s_n, N - i_n, D0, D1, BN, D, EVEN, DOT)

    b_dk0, b_dv0 = tl.zeros([BN, D0], tl.float32), tl.zeros([BN, D0], tl.float32)
    b_dk1 = tl.zeros([BN, D1 if D1 else 16], tl.float32)
    b_dv1 = tl.zeros([BN, D1 if D1 else 16], tl.float32)
    for i_m in range(0, N, BM):
        o_m = i_m + tl.arange(0, BM)
        b_q0 = tile(p_q, s_n, N - i_m, 0, D0, BM, D, EVEN, DOT)
        b_do0 = tile(p_dout, width, N - i_m, 0, D0, BM, D, EVEN, DOT)
        # Queries past the last have no weight: 2^(0 - inf) is 0.
        b_lse = tl.load(p_lse + o_m, mask=o_m < N, other=float("inf"))[None, :]
        b_delta = tl.load(p_delta + o_m, mask=o_m < N, other=0.0)[None, :]
        b_s = tl.dot(b_k0, b_q0.T, input_precision=PRECISION)
        b_dp = tl.dot(b_v0, b_do0.T, input_precision=PRECISION)
        if D1:
            b_q1 = tile(p_q, s_n, N - i_m, D0, D1, BM, D, EVEN, DOT)
            b_do1 = tile(p_dout, width, N - i_m, D0, D1, BM, D, EVEN, DOT)
            b_s = tl.dot(b_k1, b_q1.T, b_s, input_precision=PRECISION)
            b_dp = tl.dot(b_v1, b_do1.T, b_dp, input_precision=PRECISION)
        b_p = tl.exp2(b_s * scale_log2 - b_lse)
        b_ds = (b_p * (b_dp - b_delta)).to(DOT)
        b_dv0 = tl.dot(b_p.to(DOT), b_do0, b_dv0, input_precision=PRECISION)
        b_dk0 = tl.dot(b_ds, b_q0, b_dk0, input_precision=PRECISION)
        if D1:
            b_dv1 = tl.dot(b_p.to(DOT), b_do1, b_dv1, input_precision=PRECISION)
            b_dk1 = tl.dot(b_ds, b_q1, b_dk1, input_precision=PRECISION)
        p_q += BM * s_n.to(tl.int64)
        p_dout += BM * width

    p_dqkv += (i_b * N + i_n) * 3 * width + width + i_h * D
    store(p_dqkv, 3 * width, N - i_n, b_dk0 * scale, 0, D0, BN, D)
    store(p_dqkv + width, 3 * width, N - i_n, b_dv0, 0, D0, BN, D)
    if D1:
        store(p_dqkv, 3 * width, N - i_n, b_dk1 * scale, D0, D1, BN, D)
        store(p_dqkv + width, 3 * width, N - i_n, b_dv1, D0, D1, BN, D)


def attention_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    n_heads: int,
    dq: triton.Config | None = None,
    dkv: triton.Config | None = None,
) -> Tensor:
    """Launch the backward, from the gradient of out, and what the forward took and returned.

    Args:
        dq: one of `attention_dq_bwd_configs`; None for the default.
        dkv: one of `attention_dkv_bwd_configs`; None for the default.

    Returns:
        dqkv, like qkv and contiguous.
    """
    (qkv, s_b, s_n), dout = unit_stride(qkv), dout.contiguous()
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if dqkv.numel():
        delta = torch.empty_like(lse)
        dq_pass, dkv_pass, scale = _backward(qkv.shape, n_heads, kind_of(qkv), dq, dkv)
        numbers = s_b, s_n, qkv.shape[1], n_heads, scale, scale * math.log2(math.e)
        dq_pass((qkv, out, dout, lse, delta, dqkv), *numbers)
        dkv_pass((qkv, dout, lse, delta, dqkv), *numbers)
    return dqkv


@functools.lru_cache(PREPARED)
def _backward(
    shape: torch.Size, n_heads: int, kind: Kind, dq: triton.Config | None, dkv: triton.Config | None
) -> tuple[PreparedLaunch, PreparedLaunch, float]:
    """Return the launches of dQ and of dK with dV, and the scale of the scores."""
    N, d, (dtype, target, _) = shape[1], shape[2] // 3 // n_heads, kind
    dq = dq or attention_dq_bwd_configs(N, dtype, target)[0]
    dkv = dkv or attention_dkv_bwd_configs(N, d, dtype, target)[0]
    dq_pass, scale = prepare(attention_dq_bwd_kernel, "BM", shape, n_heads, kind, dq)
    dkv_pass, _ = prepare(attention_dkv_bwd_kernel, "BN", shape, n_heads, kind, dkv)
    return dq_pass, dkv_pass, scale
