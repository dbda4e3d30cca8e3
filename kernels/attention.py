"""The forward of softmax attention without a mask, on packed queries, keys and values.

For one head, with c = log2(e) / sqrt(d) folded into the exponent (Vaswani et al. 2017, equation 1;
Dao 2023, "FlashAttention-2", algorithm 1):

    S = Q K^T,  P = 2^(c S - lse),  lse = log2(sum 2^(c S)) by row,  O = P V

Head dims between powers of two are held as two pieces: 72 is 64 + 16, with 8 columns masked.
Matrix instructions take at least 16 columns, and one piece of 128 would waste 44% of its columns.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels.attention_backward import attention_bwd
from fastdit.kernels.attention_common import Kind, kind_of, prepare, store, tile, unit_stride
from fastdit.kernels.attention_configs import attention_fwd_configs
from fastdit.kernels.launch import PREPARED, PreparedLaunch

__all__ = ["attention_bwd", "attention_fwd"]


@triton.jit
def attention_fwd_kernel(
    p_qkv,  # [B, N, 3, h, D] by s_b, s_n
    p_out,  # [B, N, h, D] out
    p_lse,  # [B, h, N] out, to the base 2
    s_b,
    s_n,
    N,
    n_heads,
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
    """Each program takes BM queries of a head over all keys, BN at a time, by a running softmax."""
    tiles = tl.cdiv(N, BM)
    i_bh = tl.program_id(0) // tiles
    i_m = tl.program_id(0) % tiles * BM
    i_b, i_h = (i_bh // n_heads).to(tl.int64), i_bh % n_heads
    p_q = p_qkv + i_b * s_b + i_h * D
    p_k = p_q + n_heads * D
    p_v = p_k + n_heads * D
    p_q += i_m.to(tl.int64) * s_n
    b_q0 = tile(p_q, s_n, N - i_m, 0, D0, BM, D, EVEN, DOT)
    if D1:
        b_q1 = tile(p_q, s_n, N - i_m, D0, D1, BM, D, EVEN, DOT)

    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_o0 = tl.zeros([BM, D0], tl.float32)
    b_o1 = tl.zeros([BM, D1 if D1 else 16], tl.float32)
    for i_n in range(0, N, BN):
        b_k0 = tile(p_k, s_n, N - i_n, 0, D0, BN, D, EVEN, DOT)
        b_s = tl.dot(b_q0, b_k0.T, input_precision=PRECISION)
        if D1:
            b_k1 = tile(p_k, s_n, N - i_n, D0, D1, BN, D, EVEN, DOT)
            b_s = tl.dot(b_q1, b_k1.T, b_s, input_precision=PRECISION)
        if not EVEN:
            b_s = tl.where(i_n + tl.arange(0, BN)[None, :] < N, b_s, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        # If all keys so far score -inf, -inf - -inf would be NaN, while exp2(-inf - 0) is 0.
        b_top = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2((b_s - b_top[:, None]) * scale_log2)
        b_decay = tl.exp2((b_max - b_top) * scale_log2)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_max = b_new_max
        b_v0 = tile(p_v, s_n, N - i_n, 0, D0, BN, D, EVEN, DOT)
        b_o0 = tl.dot(b_p.to(DOT), b_v0, b_o0 * b_decay[:, None], input_precision=PRECISION)
        if D1:
            b_v1 = tile(p_v, s_n, N - i_n, D0, D1, BN, D, EVEN, DOT)
            b_o1 = tl.dot(b_p.to(DOT), b_v1, b_o1 * b_decay[:, None], input_precision=PRECISION)
        p_k += BN * s_n.to(tl.int64)
        p_v += BN * s_n.to(tl.int64)

    o_m = i_m + tl.arange(0, BM)
    b_lse = b_max * scale_log2 + tl.log2(b_sum)
    tl.store(p_lse + i_bh.to(tl.int64) * N + o_m, b_lse, mask=o_m < N)
    p_out += ((i_b * N + i_m) * n_heads + i_h) * D
    b_weight = (1.0 / b_sum)[:, None]
    store(p_out, n_heads * D, N - i_m, b_o0 * b_weight, 0, D0, BM, D)
    if D1:
        store(p_out, n_heads * D, N - i_m, b_o1 * b_weight, D0, D1, BM, D)


@triton.jit
def attention_one_pass_fwd_kernel(
    p_qkv,  # [B, N, 3, h, D] by s_b, s_n
    p_out,  # [B, N, h, D] out
    p_lse,  # [B, h, N] out, to the base 2
    s_b,
    s_n,
    N,
    n_heads,
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
    """Each program takes BM queries of a head of N <= BN tokens over all its keys at once."""
    tiles = tl.cdiv(N, BM)
    i_bh = tl.program_id(0) // tiles
    i_m = tl.program_id(0) % tiles * BM
    i_b, i_h = (i_bh // n_heads).to(tl.int64), i_bh % n_heads
    p_q = p_qkv + i_b * s_b + i_h * D
    p_k = p_q + n_heads * D
    p_v = p_k + n_heads * D
    p_q += i_m.to(tl.int64) * s_n
    b_q0 = tile(p_q, s_n, N - i_m, 0, D0, BM, D, EVEN, DOT)
    b_k0 = tile(p_k, s_n, N, 0, D0, BN, D, EVEN, DOT)
    b_s = tl.dot(b_q0, b_k0.T, input_precision=PRECISION)
    if D1:
        b_q1 = tile(p_q, s_n, N - i_m, D0, D1, BM, D, EVEN, DOT)
        b_k1 = tile(p_k, s_n, N, D0, D1, BN, D, EVEN, DOT)
        b_s = tl.dot(b_q1, b_k1.T, b_s, input_precision=PRECISION)
    if not EVEN:
        b_s = tl.where(tl.arange(0, BN)[None, :] < N, b_s, float("-inf"))
    b_max = tl.max(b_s, 1)
    b_p = tl.exp2((b_s - b_max[:, None]) * scale_log2)
    b_sum = tl.sum(b_p, 1)

    o_m = i_m + tl.arange(0, BM)
    b_lse = b_max * scale_log2 + tl.log2(b_sum)
    tl.store(p_lse + i_bh.to(tl.int64) * N + o_m, b_lse, mask=o_m < N)
    p_out += ((i_b * N + i_m) * n_heads + i_h) * D
    b_weight = (1.0 / b_sum)[:, None]
    b_v0 = tile(p_v, s_n, N, 0, D0, BN, D, EVEN, DOT)
    b_o0 = tl.dot(b_p.to(DOT), b_v0, input_precision=PRECISION) * b_weight
    store(p_out, n_heads * D, N - i_m, b_o0, 0, D0, BM, D)
    if D1:
        b_v1 = tile(p_v, s_n, N, D0, D1, BN, D, EVEN, DOT)
        b_o1 = tl.dot(b_p.to(DOT), b_v1, input_precision=PRECISION) * b_weight
        store(p_out, n_heads * D, N - i_m, b_o1, D0, D1, BM, D)


def attention_fwd(
    qkv: Tensor, n_heads: int, config: triton.Config | None = None
) -> tuple[Tensor, Tensor]:
    """Launch the forward.

    Args:
        qkv: [B, N, 3 * n_heads * d], d up to 128.
        config: one of `attention_fwd_configs`; None for the default.

    Returns:
        (out [B, N, n_heads * d] in qkv's dtype, lse [B, n_heads, N] float32, to the base 2).
    """
    qkv, s_b, s_n = unit_stride(qkv)
    B, N, width = qkv.shape
    out = qkv.new_empty((B, N, width // 3))
    lse = qkv.new_empty((B, n_heads, N), dtype=torch.float32)
    if out.numel():
        launch, scale = _forward(qkv.shape, n_heads, kind_of(qkv), config)
        launch((qkv, out, lse), s_b, s_n, N, n_heads, scale * math.log2(math.e))
    return out, lse


@functools.lru_cache(PREPARED)
def _forward(
    shape: torch.Size, n_heads: int, kind: Kind, config: triton.Config | None
) -> tuple[PreparedLaunch, float]:
    N, (dtype, target, _) = shape[1], kind
    config = config or attention_fwd_configs(N, dtype, target)[0]
    one_pass = N <= config.kwargs["BN"]
    kernel = attention_one_pass_fwd_kernel if one_pass else attention_fwd_kernel
    return prepare(kernel, "BM", shape, n_heads, kind, config)
