"""The backward of cross-attention and of joint attention; `text_attention` has the forward.

With the forward's S, P, lse and O, and c = log2(e) / sqrt(d) (Dao 2023, "FlashAttention-2",
algorithm 2):

    P = 2^(c S - lse),  delta = sum(O * dO) by row,  dS = P * (dO V^T - delta)
    dQ = dS K / sqrt(d),  dK = dS^T Q / sqrt(d),  dV = P^T dO

Nothing is summed by atomics: dQ has a pass of its own, which also writes the delta that the pass
of dK and dV reads. Both write zeros where a text is padding. With norms, the queries and keys are
normed again by `qk_norm_rope`, whose backward takes the gradients on to what was normed and to the
weights: that is 12 D (N + M) more numbers to move.

The floor is 10 d FLOP for each query, key and head that are no padding (S, dP, dQ, dK, dV; the
passes take 14 d, since both need S and dP), or memory: 4 D (N + M) numbers, joint 8 D (N + M).
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels import attention_configs
from fastdit.kernels.attention_common import Kind, kind_of, store, tile, unit_stride
from fastdit.kernels.launch import PREPARED, PreparedLaunch
from fastdit.kernels.qk_norm_rope import qk_norm_rope_bwd, qk_norm_rope_fwd
from fastdit.kernels.tensors import contiguous
from fastdit.kernels.text_attention_common import Norms, Sizes, length_of, prepare, without_padding


@triton.jit
def _over_keys(
    b_dq0,
    b_dq1,
    b_q0,
    b_q1,
    b_do0,
    b_do1,
    b_lse,
    b_delta,
    p_k,
    p_v,
    s_n,
    keys,
    scale_log2,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
):
    """Add to dQ what the keys of one stream give, BN at a time."""
    for i_n in range(0, keys, BN):
        b_k0 = tile(p_k, s_n, keys - i_n, 0, D0, BN, D, EVEN, DOT)
        b_v0 = tile(p_v, s_n, keys - i_n, 0, D0, BN, D, EVEN, DOT)
        b_s = tl.dot(b_q0, b_k0.T, input_precision=PRECISION)
        b_dp = tl.dot(b_do0, b_v0.T, input_precision=PRECISION)
        if D1:
            b_k1 = tile(p_k, s_n, keys - i_n, D0, D1, BN, D, EVEN, DOT)
            b_v1 = tile(p_v, s_n, keys - i_n, D0, D1, BN, D, EVEN, DOT)
            b_s = tl.dot(b_q1, b_k1.T, b_s, input_precision=PRECISION)
            b_dp = tl.dot(b_do1, b_v1.T, b_dp, input_precision=PRECISION)
        if not EVEN:
            b_s = tl.where(i_n + tl.arange(0, BN)[None, :] < keys, b_s, float("-inf"))
        b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(DOT)
        b_dq0 = tl.dot(b_ds, b_k0, b_dq0, input_precision=PRECISION)
        if D1:
            b_dq1 = tl.dot(b_ds, b_k1, b_dq1, input_precision=PRECISION)
        p_k, p_v = p_k + BN * s_n.to(tl.int64), p_v + BN * s_n.to(tl.int64)
    return b_dq0, b_dq1


@triton.jit
def text_attention_dq_bwd_kernel(
    p_image,  # as the forward takes it, normed; by s_ib, s_in
    p_text,  # likewise; by s_tb, s_tn
    p_lengths,  # [B], where RAGGED
    p_out,  # [B, N, h, D]
    p_out_text,  # [B, M, h, D], where JOINT
    p_dout,  # [B, N, h, D]
    p_dout_text,  # [B, M, h, D], where JOINT
    p_lse,  # [B, h, N], JOINT [B, h, N + M]
    p_delta,  # like lse, out
    p_dimage,  # like image, out
    p_dtext,  # like text, out
    s_ib,
    s_in,
    s_tb,
    s_tn,
    N,
    M,
    n_heads,
    scale,
    scale_log2,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    JOINT: tl.constexpr,
    RAGGED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Each program computes dQ and delta of BM queries of a head, of one stream, over all keys."""
    image_tiles = tl.cdiv(N, BM)
    tiles = image_tiles + (tl.cdiv(M, BM) if JOINT else 0)
    i_bh, i_m = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BM
    i_b, i_h = (i_bh // n_heads).to(tl.int64), i_bh % n_heads
    width = n_heads * D
    length = length_of(p_lengths, i_b, M, RAGGED)
    p_image, p_text = p_image + i_b * s_ib + i_h * D, p_text + i_b * s_tb + i_h * D
    o_out = (i_b * N * n_heads + i_h) * D
    p_out, p_dout = p_out + o_out, p_dout + o_out
    o_lse = i_bh.to(tl.int64) * (N + M if JOINT else N)
    s_dq = 3 * width if JOINT else width
    p_q, s_q, size, rows, p_dq = p_image, s_in, N, N, p_dimage + i_b * N * s_dq + i_h * D
    if JOINT:
        is_text = i_m >= image_tiles * BM
        i_m = tl.where(is_text, i_m - image_tiles * BM, i_m)
        p_q, s_q = tl.where(is_text, p_text, p_image), tl.where(is_text, s_tn, s_in)
        size, rows = tl.where(is_text, M, N), tl.where(is_text, length, N)
        o_text = (i_b * M * n_heads + i_h) * D
        p_out = tl.where(is_text, p_out_text + o_text, p_out)
        p_dout = tl.where(is_text, p_dout_text + o_text, p_dout)
        p_dq = tl.where(is_text, p_dtext + i_b * M * 3 * width + i_h * D, p_dq)
        o_lse += tl.where(is_text, N, 0)
    p_q += i_m.to(tl.int64) * s_q
    p_out, p_dout = p_out + i_m.to(tl.int64) * width, p_dout + i_m.to(tl.int64) * width
    p_dq += i_m.to(tl.int64) * s_dq
    b_q0 = tile(p_q, s_q, rows - i_m, 0, D0, BM, D, False, DOT)
    b_do0 = tile(p_dout, width, rows - i_m, 0, D0, BM, D, False, DOT)
    b_o0 = tile(p_out, width, rows - i_m, 0, D0, BM, D, False, DOT)
    b_delta = tl.sum(b_o0.to(tl.float32) * b_do0.to(tl.float32), 1)
    b_q1, b_do1 = b_q0, b_do0  # not used unless there is a second piece
    if D1:
        b_q1 = tile(p_q, s_q, rows - i_m, D0, D1, BM, D, False, DOT)
        b_do1 = tile(p_dout, width, rows - i_m, D0, D1, BM, D, False, DOT)
        b_o1 = tile(p_out, width, rows - i_m, D0, D1, BM, D, False, DOT)
        b_delta += tl.sum(b_o1.to(tl.float32) * b_do1.to(tl.float32), 1)
    o_m = i_m + tl.arange(0, BM)
    # Queries past the last, and padding, have no weight: 2^(0 - inf) is 0.
    b_lse = tl.load(p_lse + o_lse + o_m, mask=o_m < rows, other=float("inf"))
    tl.store(p_delta + o_lse + o_m, b_delta, mask=o_m < size)

    b_dq0 = tl.zeros([BM, D0], tl.float32)
    b_dq1 = tl.zeros([BM, D1 if D1 else 16], tl.float32)
    given = b_q0, b_q1, b_do0, b_do1, b_lse, b_delta
    if JOINT:
        p_k, keys = p_image + width, tl.where(i_m < rows, N, 0)
        b_dq0, b_dq1 = _over_keys(
            b_dq0, b_dq1, *given, p_k, p_k + width, s_in, keys, scale_log2, D, D0, D1, EVEN, DOT,
            PRECISION, BN,
        )  # fmt: skip
    p_k, keys = p_text + (width if JOINT else 0), tl.where(i_m < rows, length, 0)
    b_dq0, b_dq1 = _over_keys(
        b_dq0, b_dq1, *given, p_k, p_k + width, s_tn, keys, scale_log2, D, D0, D1, False, DOT,
        PRECISION, BN,
    )  # fmt: skip
    store(p_dq, s_dq, size - i_m, b_dq0 * scale, 0, D0, BM, D)
    if D1:
        store(p_dq, s_dq, size - i_m, b_dq1 * scale, D0, D1, BM, D)


@triton.jit
def _over_queries(
    b_dk0,
    b_dk1,
    b_dv0,
    b_dv1,
    b_k0,
    b_k1,
    b_v0,
    b_v1,
    p_q,
    s_n,
    p_dout,
    width,
    p_lse,
    p_delta,
    queries,
    scale_log2,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
):
    """Add to dK and dV what the queries of one stream give, BM at a time.

    Scores are transposed: keys are rows, and queries are columns.
    """
    for i_m in range(0, queries, BM):
        o_m = i_m + tl.arange(0, BM)
        b_q0 = tile(p_q, s_n, queries - i_m, 0, D0, BM, D, EVEN, DOT)
        b_do0 = tile(p_dout, width, queries - i_m, 0, D0, BM, D, EVEN, DOT)
        b_lse = tl.load(p_lse + o_m, mask=o_m < queries, other=float("inf"))[None, :]
        b_delta = tl.load(p_delta + o_m, mask=o_m < queries, other=0.0)[None, :]
        b_s = tl.dot(b_k0, b_q0.T, input_precision=PRECISION)
        b_dp = tl.dot(b_v0, b_do0.T, input_precision=PRECISION)
        if D1:
            b_q1 = tile(p_q, s_n, queries - i_m, D0, D1, BM, D, EVEN, DOT)
            b_do1 = tile(p_dout, width, queries - i_m, D0, D1, BM, D, EVEN, DOT)
            b_s = tl.dot(b_k1, b_q1.T, b_s, input_precision=PRECISION)
            b_dp = tl.dot(b_v1, b_do1.T, b_dp, input_precision=PRECISION)
        b_p = tl.exp2(b_s * scale_log2 - b_lse)
        b_ds = (b_p * (b_dp - b_delta)).to(DOT)
        b_dv0 = tl.dot(b_p.to(DOT), b_do0, b_dv0, input_precision=PRECISION)
        b_dk0 = tl.dot(b_ds, b_q0, b_dk0, input_precision=PRECISION)
        if D1:
            b_dv1 = tl.dot(b_p.to(DOT), b_do1, b_dv1, input_precision=PRECISION)
            b_dk1 = tl.dot(b_ds, b_q1, b_dk1, input_precision=PRECISION)
        p_q, p_dout = p_q + BM * s_n.to(tl.int64), p_dout + BM * width
    return b_dk0, b_dk1, b_dv0, b_dv1


@triton.jit
def text_attention_dkv_bwd_kernel(
    p_image,  # as the forward takes it, normed; by s_ib, s_in
    p_text,  # likewise; by s_tb, s_tn
    p_lengths,  # [B], where RAGGED
    p_dout,  # [B, N, h, D]
    p_dout_text,  # [B, M, h, D], where JOINT
    p_lse,  # [B, h, N], JOINT [B, h, N + M]
    p_delta,  # like lse
    p_dimage,  # like image, out, where JOINT
    p_dtext,  # like text, out
    s_ib,
    s_in,
    s_tb,
    s_tn,
    N,
    M,
    n_heads,
    scale,
    scale_log2,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    JOINT: tl.constexpr,
    RAGGED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Each program computes dK and dV of BN keys of a head, of one stream, over all queries."""
    image_tiles = tl.cdiv(N, BN) if JOINT else 0
    tiles = image_tiles + tl.cdiv(M, BN)
    i_bh, i_n = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BN
    i_b, i_h = (i_bh // n_heads).to(tl.int64), i_bh % n_heads
    width = n_heads * D
    length = length_of(p_lengths, i_b, M, RAGGED)
    p_image, p_text = p_image + i_b * s_ib + i_h * D, p_text + i_b * s_tb + i_h * D
    p_dout += (i_b * N * n_heads + i_h) * D
    o_lse = i_bh.to(tl.int64) * (N + M if JOINT else N)
    p_lse, p_delta = p_lse + o_lse, p_delta + o_lse
    s_dk = 3 * width if JOINT else 2 * width
    p_k, s_k, size, rows = p_text, s_tn, M, length
    p_dk = p_dtext + i_b * M * s_dk + i_h * D
    if JOINT:
        is_text = i_n >= image_tiles * BN
        i_n = tl.where(is_text, i_n - image_tiles * BN, i_n)
        p_k, s_k = tl.where(is_text, p_text, p_image) + width, tl.where(is_text, s_tn, s_in)
        size, rows = tl.where(is_text, M, N), tl.where(is_text, length, N)
        p_dk = tl.where(is_text, p_dk, p_dimage + i_b * N * s_dk + i_h * D) + width
    p_k, p_dk = p_k + i_n.to(tl.int64) * s_k, p_dk + i_n.to(tl.int64) * s_dk
    b_k0 = tile(p_k, s_k, rows - i_n, 0, D0, BN, D, False, DOT)
    b_v0 = tile(p_k + width, s_k, rows - i_n, 0, D0, BN, D, False, DOT)
    b_k1, b_v1 = b_k0, b_v0  # not used unless there is a second piece
    if D1:
        b_k1 = tile(p_k, s_k, rows - i_n, D0, D1, BN, D, False, DOT)
        b_v1 = tile(p_k + width, s_k, rows - i_n, D0, D1, BN, D, False, DOT)

    b_dk0, b_dv0 = tl.zeros([BN, D0], tl.float32), tl.zeros([BN, D0], tl.float32)
    b_dk1 = tl.zeros([BN, D1 if D1 else 16], tl.float32)
    b_dv1 = tl.zeros([BN, D1 if D1 else 16], tl.float32)
    keys, queries = (b_k0, b_k1, b_v0, b_v1), tl.where(i_n < rows, N, 0)
    b_dk0, b_dk1, b_dv0, b_dv1 = _over_queries(
        b_dk0, b_dk1, b_dv0, b_dv1, *keys, p_image, s_in, p_dout, width, p_lse, p_delta, queries,
        scale_log2, D, D0, D1, EVEN, DOT, PRECISION, BM,
    )  # fmt: skip
    if JOINT:
        p_dout_text += (i_b * M * n_heads + i_h) * D
        queries = tl.where(i_n < rows, length, 0)
        b_dk0, b_dk1, b_dv0, b_dv1 = _over_queries(
            b_dk0, b_dk1, b_dv0, b_dv1, *keys, p_text, s_tn, p_dout_text, width, p_lse + N,
            p_delta + N, queries, scale_log2, D, D0, D1, False, DOT, PRECISION, BM,
        )  # fmt: skip

    # Keys that are padding had scores of 0, which meant nothing.
    m = (i_n + tl.arange(0, BN) < rows)[:, None]
    store(p_dk, s_dk, size - i_n, tl.where(m, b_dk0 * scale, 0.0), 0, D0, BN, D)
    store(p_dk + width, s_dk, size - i_n, tl.where(m, b_dv0, 0.0), 0, D0, BN, D)
    if D1:
        store(p_dk, s_dk, size - i_n, tl.where(m, b_dk1 * scale, 0.0), D0, D1, BN, D)
        store(p_dk + width, s_dk, size - i_n, tl.where(m, b_dv1, 0.0), D0, D1, BN, D)


def cross_attention_bwd(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    n_heads: int,
    lengths: Tensor | None,
    configs: tuple[triton.Config | None, triton.Config | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """Launch the backward, from the gradient of out, and what the forward took and returned.

    Args:
        configs: one of `text_attention_dq_bwd_configs` and one of
            `text_attention_dkv_bwd_configs`; None for the default.

    Returns:
        (dq, dkv), like q and kv and contiguous.
    """
    return _launch((dout, None), (q, kv), (out, None), lse, n_heads, lengths, configs)


def joint_attention_bwd(
    douts: tuple[Tensor, Tensor],
    qkvs: tuple[Tensor, Tensor],
    outs: tuple[Tensor, Tensor],
    lse: Tensor,
    n_heads: int,
    norms: Norms,
    lengths: Tensor | None,
    eps: float,
    configs: tuple[triton.Config | None, triton.Config | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward; each pair is the image's and the text's, or `cross_attention_bwd`'s.

    Returns:
        (dqkv_image, dqkv_text, dnorms [K, d] float32: a row for each of the K = 0 or 4 weights).
    """
    if norms[0] is None:
        gradients = _launch(douts, qkvs, outs, lse, n_heads, lengths, configs)
        return *gradients, lse.new_empty((0, qkvs[0].shape[2] // (3 * n_heads)))
    weights = [(w, None, v, None) for w, v in (norms[:2], norms[2:])]
    both = list(zip((qkvs[0], without_padding(qkvs[1], lengths)), weights, strict=True))
    normed = [qk_norm_rope_fwd(qkv, n_heads, own, None, eps) for qkv, own in both]
    inner = _launch(douts, (normed[0], normed[1]), outs, lse, n_heads, lengths, configs)
    (dimage, of_image), (dtext, of_text) = (
        qk_norm_rope_bwd(d, qkv, n_heads, own, None, eps)
        for d, (qkv, own) in zip(inner, both, strict=True)
    )
    return dimage, dtext, torch.cat([of_image, of_text])


def _launch(
    douts: tuple[Tensor, Tensor | None],
    inputs: tuple[Tensor, Tensor],
    outs: tuple[Tensor, Tensor | None],
    lse: Tensor,
    n_heads: int,
    lengths: Tensor | None,
    configs: tuple[triton.Config | None, triton.Config | None],
) -> tuple[Tensor, Tensor]:
    sizes = Sizes.of(*inputs, n_heads, lengths)
    (image, *s_image), (text, *s_text) = map(unit_stride, inputs)
    dimage, dtext = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs)
    if lse.numel():
        read = image, text, contiguous(lengths)
        rest = *map(contiguous, douts), lse, torch.empty_like(lse), dimage, dtext
        scale = sizes.d**-0.5
        numbers = *s_image, *s_text, sizes.N, sizes.M, n_heads, scale, scale * math.log2(math.e)
        dq_pass, dkv_pass = _prepare(sizes, kind_of(image), *configs)
        dq_pass((*read, *outs, *rest), *numbers)
        dkv_pass((*read, *rest), *numbers)
    else:
        dimage.zero_(), dtext.zero_()
    return dimage, dtext


@functools.lru_cache(PREPARED)
def _prepare(
    sizes: Sizes, kind: Kind, dq: triton.Config | None, dkv: triton.Config | None
) -> tuple[PreparedLaunch, PreparedLaunch]:
    """Return the launches of dQ and of dK with dV."""
    on = max(sizes.N, sizes.M), *kind[:2]
    dq = dq or attention_configs.text_attention_dq_bwd_configs(*on)[0]
    dkv = dkv or attention_configs.text_attention_dkv_bwd_configs(*on)[0]
    return (
        prepare(text_attention_dq_bwd_kernel, "BM", sizes, kind, dq),
        prepare(text_attention_dkv_bwd_kernel, "BN", sizes, kind, dkv),
    )
