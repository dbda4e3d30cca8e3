"""The forward of cross-attention and of joint attention, on packed tensors of ragged texts.

In cross-attention an image's queries meet the keys of its text; in joint attention the queries of
both meet the keys of the image, then those of the text (Esser et al. 2024, section 4). The tensors
are read where they lie, without concatenation, and a text's rows past its length are no work. With
c = log2(e) / sqrt(d) (Vaswani et al. 2017, equation 1; Dao 2023, "FlashAttention-2", algorithm 1):

    S = Q K^T,  P = 2^(c S - lse),  lse = log2(sum 2^(c S)) by row,  O = P V

With RMSNorms of queries and keys, whose weights are u and w, and with r = 1 / sqrt(mean(x^2) + eps)
of a head x of either:

    S = (r_q Q * u * w) (r_k K)^T

The queries take both weights, anew for the keys of each stream, since their norms differ. Keys are
multiplied as they lie in memory, and r_k scales a column of scores.

The floor is the products, 4 d FLOP for each query, key and head that are no padding, or memory:
2 D (N + M) numbers in cross-attention and 4 D (N + M) in joint attention. For 1,024 tokens of an
image, 120 of a text and D = 1152 that is 0.57 GFLOP and 5.3 MB in 16 bits, 107 FLOP a byte, which
memory bounds; for 4,096, 333 and D = 1536 it is 121 GFLOP and 54 MB, 2,200 FLOP a byte, which
products bound.
"""

from __future__ import annotations

import functools
import math

import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels.attention_common import Kind, kind_of, store, tile, unit_stride
from fastdit.kernels.attention_configs import text_attention_fwd_configs
from fastdit.kernels.launch import PREPARED, PreparedLaunch
from fastdit.kernels.tensors import contiguous
from fastdit.kernels.text_attention_common import Norms, Sizes, empty_lse, length_of, prepare


@triton.jit
def _weights(p_own, p_other, FIRST: tl.constexpr, WIDTH: tl.constexpr, D):
    """Load the product of two norms' weights, of columns FIRST to FIRST + WIDTH."""
    o_d = FIRST + tl.arange(0, WIDTH)
    b = tl.load(p_own + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    return (b * tl.load(p_other + o_d, mask=o_d < D, other=0.0).to(tl.float32))[None, :]


@triton.jit
def _queries(
    p_q,
    s_n,
    rows,
    p_own,
    p_other,
    eps,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DOT: tl.constexpr,
    NORM: tl.constexpr,
    BM: tl.constexpr,
):
    """Load a tile of queries, normed for keys of the other weight; the second piece may be none."""
    if NORM:
        b_q0 = tile(p_q, s_n, rows, 0, D0, BM, D, False, tl.float32)
        b_mean = tl.sum(b_q0 * b_q0, 1) / D
        if D1:
            b_q1 = tile(p_q, s_n, rows, D0, D1, BM, D, False, tl.float32)
            b_mean += tl.sum(b_q1 * b_q1, 1) / D
        # Rows past the end are zero, whatever eps is.
        b_r = tl.rsqrt(tl.where(tl.arange(0, BM) < rows, b_mean + eps, 1.0))[:, None]
        b_q0 = (b_q0 * b_r * _weights(p_own, p_other, 0, D0, D)).to(DOT)
        if D1:
            b_q1 = (b_q1 * b_r * _weights(p_own, p_other, D0, D1, D)).to(DOT)
        else:
            b_q1 = b_q0
    else:
        b_q0 = tile(p_q, s_n, rows, 0, D0, BM, D, False, DOT)
        if D1:
            b_q1 = tile(p_q, s_n, rows, D0, D1, BM, D, False, DOT)
        else:
            b_q1 = b_q0
    return b_q0, b_q1


@triton.jit
def _over_keys(
    b_q0,
    b_q1,
    b_max,
    b_sum,
    b_o0,
    b_o1,
    p_k,
    p_v,
    s_n,
    keys,
    scale_log2,
    eps,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    NORM: tl.constexpr,
    BN: tl.constexpr,
):
    """Take the keys of one stream into a running softmax, BN at a time."""
    for i_n in range(0, keys, BN):
        b_k0 = tile(p_k, s_n, keys - i_n, 0, D0, BN, D, EVEN, DOT)
        b_s = tl.dot(b_q0, b_k0.T, input_precision=PRECISION)
        if NORM:
            b_mean = tl.sum(b_k0.to(tl.float32) * b_k0.to(tl.float32), 1) / D
        if D1:
            b_k1 = tile(p_k, s_n, keys - i_n, D0, D1, BN, D, EVEN, DOT)
            b_s = tl.dot(b_q1, b_k1.T, b_s, input_precision=PRECISION)
            if NORM:
                b_mean += tl.sum(b_k1.to(tl.float32) * b_k1.to(tl.float32), 1) / D
        if NORM:
            b_s *= tl.rsqrt(b_mean + eps)[None, :]
        if not EVEN:
            b_s = tl.where(i_n + tl.arange(0, BN)[None, :] < keys, b_s, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        # If all keys so far score -inf, -inf - -inf would be NaN, while exp2(-inf - 0) is 0.
        b_top = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2((b_s - b_top[:, None]) * scale_log2)
        b_decay = tl.exp2((b_max - b_top) * scale_log2)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_max = b_new_max
        b_v0 = tile(p_v, s_n, keys - i_n, 0, D0, BN, D, EVEN, DOT)
        b_o0 = tl.dot(b_p.to(DOT), b_v0, b_o0 * b_decay[:, None], input_precision=PRECISION)
        if D1:
            b_v1 = tile(p_v, s_n, keys - i_n, D0, D1, BN, D, EVEN, DOT)
            b_o1 = tl.dot(b_p.to(DOT), b_v1, b_o1 * b_decay[:, None], input_precision=PRECISION)
        p_k += BN * s_n.to(tl.int64)
        p_v += BN * s_n.to(tl.int64)
    return b_max, b_sum, b_o0, b_o1


@triton.jit
def text_attention_fwd_kernel(
    p_image,  # JOINT: [B, N, 3, h, D], otherwise queries [B, N, h, D]; by s_ib, s_in
    p_text,  # JOINT: [B, M, 3, h, D], otherwise keys and values [B, M, 2, h, D]; by s_tb, s_tn
    p_image_q,  # [D] the norms' weights, with NORM
    p_image_k,  # [D]
    p_text_q,  # [D]
    p_text_k,  # [D]
    p_lengths,  # [B], where RAGGED
    p_out,  # [B, N, h, D] out
    p_out_text,  # [B, M, h, D] out, where JOINT
    p_lse,  # [B, h, N] out, JOINT [B, h, N + M], to the base 2; infinity where there is no query
    s_ib,
    s_in,
    s_tb,
    s_tn,
    N,
    M,
    n_heads,
    scale_log2,
    eps,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    JOINT: tl.constexpr,
    RAGGED: tl.constexpr,
    NORM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Each program takes BM queries of a head, of one stream, over all keys by a running softmax.

    Where all its queries are padding it has no keys, and writes zeros.
    """
    image_tiles = tl.cdiv(N, BM)
    tiles = image_tiles + (tl.cdiv(M, BM) if JOINT else 0)
    i_bh, i_m = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BM
    i_b, i_h = (i_bh // n_heads).to(tl.int64), i_bh % n_heads
    width = n_heads * D
    length = length_of(p_lengths, i_b, M, RAGGED)
    p_image += i_b * s_ib + i_h * D
    p_text += i_b * s_tb + i_h * D
    p_out += (i_b * N * n_heads + i_h) * D
    p_lse += i_bh.to(tl.int64) * (N + M if JOINT else N)
    p_q, s_q, p_q_weight, size, rows = p_image, s_in, p_image_q, N, N
    if JOINT:
        is_text = i_m >= image_tiles * BM
        i_m = tl.where(is_text, i_m - image_tiles * BM, i_m)
        p_q, s_q = tl.where(is_text, p_text, p_image), tl.where(is_text, s_tn, s_in)
        size, rows = tl.where(is_text, M, N), tl.where(is_text, length, N)
        p_out = tl.where(is_text, p_out_text + (i_b * M * n_heads + i_h) * D, p_out)
        p_lse += tl.where(is_text, N, 0)
        if NORM:
            p_q_weight = tl.where(is_text, p_text_q, p_image_q)
    p_q += i_m.to(tl.int64) * s_q

    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_o0 = tl.zeros([BM, D0], tl.float32)
    b_o1 = tl.zeros([BM, D1 if D1 else 16], tl.float32)
    if JOINT:
        b_q0, b_q1 = _queries(
            p_q, s_q, rows - i_m, p_q_weight, p_image_k, eps, D, D0, D1, DOT, NORM, BM
        )
        state = b_q0, b_q1, b_max, b_sum, b_o0, b_o1
        p_k, keys = p_image + width, tl.where(i_m < rows, N, 0)
        b_max, b_sum, b_o0, b_o1 = _over_keys(
            *state, p_k, p_k + width, s_in, keys, scale_log2, eps, D, D0, D1, EVEN, DOT, PRECISION,
            NORM, BN,
        )  # fmt: skip
    if not JOINT or NORM:
        b_q0, b_q1 = _queries(
            p_q, s_q, rows - i_m, p_q_weight, p_text_k, eps, D, D0, D1, DOT, NORM, BM
        )
    state = b_q0, b_q1, b_max, b_sum, b_o0, b_o1
    p_k, keys = p_text + (width if JOINT else 0), tl.where(i_m < rows, length, 0)
    b_max, b_sum, b_o0, b_o1 = _over_keys(
        *state, p_k, p_k + width, s_tn, keys, scale_log2, eps, D, D0, D1, False, DOT, PRECISION,
        NORM, BN,
    )  # fmt: skip

    o_m = i_m + tl.arange(0, BM)
    b_sum = tl.where(o_m < rows, b_sum, 1.0)
    b_lse = tl.where(o_m < rows, b_max * scale_log2 + tl.log2(b_sum), float("inf"))
    tl.store(p_lse + o_m, b_lse, mask=o_m < size)
    p_out += i_m.to(tl.int64) * width
    b_weight = tl.where(o_m < rows, 1.0 / b_sum, 0.0)[:, None]
    store(p_out, width, size - i_m, b_o0 * b_weight, 0, D0, BM, D)
    if D1:
        store(p_out, width, size - i_m, b_o1 * b_weight, D0, D1, BM, D)


def cross_attention_fwd(
    q: Tensor,
    kv: Tensor,
    n_heads: int,
    lengths: Tensor | None,
    config: triton.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the forward of cross-attention.

    Args:
        q: [B, N, n_heads * d], d up to 128.
        kv: [B, M, 2 * n_heads * d].
        lengths: [B] int64 or None.
        config: one of `text_attention_fwd_configs`; None for the default.

    Returns:
        (out [B, N, n_heads * d] in q's dtype, lse [B, n_heads, N] float32, to the base 2).
    """
    out, _, lse = _launch(q, kv, n_heads, (None,) * 4, lengths, 0.0, config)
    return out, lse


def joint_attention_fwd(
    qkv_image: Tensor,
    qkv_text: Tensor,
    n_heads: int,
    norms: Norms,
    lengths: Tensor | None,
    eps: float,
    config: triton.Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward of joint attention.

    Args:
        qkv_image: [B, N, 3 * n_heads * d], d up to 128.
        qkv_text: [B, M, 3 * n_heads * d].
        norms: weights [d] of the norms of the image's queries and keys and of the text's, or None.
        lengths: [B] int64 or None.
        config: one of `text_attention_fwd_configs`; None for the default.

    Returns:
        (image [B, N, n_heads * d] and text [B, M, n_heads * d] in the tensors' dtype, lse
        [B, n_heads, N + M] float32, to the base 2).
    """
    out, out_text, lse = _launch(qkv_image, qkv_text, n_heads, norms, lengths, eps, config)
    assert out_text is not None
    return out, out_text, lse


def _launch(
    image: Tensor,
    text: Tensor,
    n_heads: int,
    norms: Norms,
    lengths: Tensor | None,
    eps: float,
    config: triton.Config | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    sizes = Sizes.of(image, text, n_heads, lengths, norms[0] is not None)
    (image, *s_image), (text, *s_text) = unit_stride(image), unit_stride(text)
    out = image.new_empty((*image.shape[:2], n_heads * sizes.d))
    out_text = text.new_empty((*text.shape[:2], n_heads * sizes.d)) if sizes.joint else None
    lse = empty_lse(image, sizes)
    if lse.numel():
        tensors = (image, text, *map(contiguous, norms), contiguous(lengths), out, out_text, lse)
        scale_log2 = sizes.d**-0.5 * math.log2(math.e)
        strides, numbers = (*s_image, *s_text), (sizes.N, sizes.M, n_heads, scale_log2, float(eps))
        _prepare(sizes, kind_of(image), config)(tensors, *strides, *numbers)
    return out, out_text, lse


@functools.lru_cache(PREPARED)
def _prepare(sizes: Sizes, kind: Kind, config: triton.Config | None) -> PreparedLaunch:
    dtype, target, _ = kind
    config = config or text_attention_fwd_configs(max(sizes.N, sizes.M), sizes.d, dtype, target)[0]
    return prepare(text_attention_fwd_kernel, "BM", sizes, kind, config, NORM=sizes.normed)
