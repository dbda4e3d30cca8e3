"""The forward of a small DiT on the tokens of one image, within one program.

Activations stay in registers. Weights, laid out as `fastdit.kernels.shape` says, and modulation are
read from the cache where they are needed. LayerNorm, softmax, GELU and all sums of products are in
float32, and operands of products are in DOT.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdit.kernels import shape

layer_weights = triton.constexpr_function(shape.layer_weights)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_TANH_GELU = tl.constexpr(-1.5957691216057308)  # -2 sqrt(2 / pi)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _vector(p, WIDTH: tl.constexpr):
    return tl.load(p + tl.arange(0, WIDTH)).to(tl.float32)


@triton.jit
def _product(b_a, p_w, b_sum, STRIDE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """b_sum [N, out] + b_a [N, in] times a Linear's weights at p_w, whose rows are STRIDE apart."""
    o_out, o_in = tl.arange(0, b_sum.shape[1])[:, None], tl.arange(0, b_a.shape[1])[None, :]
    b_w = tl.load(p_w + o_out * STRIDE + o_in).to(DOT)
    return tl.dot(b_a.to(DOT), b_w.T, b_sum, input_precision=PRECISION)


@triton.jit
def _linear(b_a, p_w, p_bias, OUT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Apply OUT rows of a Linear and of its bias to b_a [N, in]: [N, OUT]."""
    b_zero = tl.zeros([b_a.shape[0], OUT], tl.float32)
    return _product(b_a, p_w, b_zero, b_a.shape[1], DOT, PRECISION) + _vector(p_bias, OUT)[None, :]


@triton.jit
def modulation(p_step, p_label, o, WIDTH: tl.constexpr, SPLIT: tl.constexpr):
    """WIDTH columns of a row of modulation, from o on: [1, WIDTH]."""
    b = _vector(p_step + o, WIDTH)
    if SPLIT:
        b += _vector(p_label + o, WIDTH)
    return b[None, :]


@triton.jit
def layer_norm_modulate(b_h, b_scale, b_shift, eps):
    D: tl.constexpr = b_h.shape[1]
    b_c = b_h - (tl.sum(b_h, 1) * (1.0 / D))[:, None]
    b_rstd = tl.rsqrt(tl.sum(b_c * b_c, 1) * (1.0 / D) + eps)
    return b_c * b_rstd[:, None] * (1.0 + b_scale) + b_shift


@triton.jit
def _by_head(b, HEAD: tl.constexpr):
    """[N, heads * HEAD] -> [heads, N, HEAD]"""
    N: tl.constexpr = b.shape[0]
    return b.reshape([N, b.shape[1] // HEAD, HEAD]).permute(1, 0, 2)


@triton.jit
def _heads(
    b_a,  # [N, D]
    p_w,  # qkv, its bias
    i,  # the heads' first column in D
    HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Softmax attention of HEADS heads: [N, HEADS * HEAD]."""
    N: tl.constexpr = b_a.shape[0]
    D: tl.constexpr = b_a.shape[1]
    WIDTH: tl.constexpr = HEADS * HEAD
    C: tl.constexpr = HEAD**-0.5 * _LOG2_E
    p_bias = p_w + 3 * D * D + i
    p_w += i * D
    b_q = _linear(b_a, p_w, p_bias, WIDTH, DOT, PRECISION).to(DOT)
    b_k = _linear(b_a, p_w + D * D, p_bias + D, WIDTH, DOT, PRECISION).to(DOT)
    b_v = _linear(b_a, p_w + 2 * D * D, p_bias + 2 * D, WIDTH, DOT, PRECISION).to(DOT)
    if HEADS == 1:
        b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)
        b_p = tl.exp2((b_s - tl.max(b_s, 1)[:, None]) * C)  # the exponent is exactly 0 at the max
        b_o = tl.dot(b_p.to(DOT), b_v, input_precision=PRECISION)
        return b_o * (1.0 / tl.sum(b_p, 1))[:, None]
    else:
        b_k = _by_head(b_k, HEAD).permute(0, 2, 1)
        b_s = tl.dot(_by_head(b_q, HEAD), b_k, input_precision=PRECISION)  # [HEADS, N, N]
        b_p = tl.exp2((b_s - tl.max(b_s, 2)[:, :, None]) * C)
        b_o = tl.dot(b_p.to(DOT), _by_head(b_v, HEAD), input_precision=PRECISION)
        b_o *= (1.0 / tl.sum(b_p, 2))[:, :, None]
        return b_o.to(DOT).permute(1, 0, 2).reshape([N, WIDTH])


@triton.jit
def _attention(
    b_y,  # [N, D]
    p_w,  # qkv, its bias, proj, its bias
    HEAD: tl.constexpr,
    HEADS: tl.constexpr,  # at a time
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    D: tl.constexpr = b_y.shape[1]
    p_proj = p_w + 3 * D * D + 3 * D
    b_a = b_y.to(DOT)
    b_out = tl.zeros([b_y.shape[0], D], tl.float32)
    for i in range(0, D, HEADS * HEAD):
        b_o = _heads(b_a, p_w, i, HEAD, HEADS, DOT, PRECISION)
        b_out = _product(b_o, p_proj + i, b_out, D, DOT, PRECISION)
    return b_out + _vector(p_proj + D * D, D)[None, :]


@triton.jit
def _parked_attention(
    b_h,  # [N, D]
    b_y,  # [N, D]
    p_w,  # qkv, its bias, proj, its bias
    p_park,  # [2, N, D] float32, of this program
    p_step,
    p_label,
    o_gate,  # in a row of modulation
    SPLIT: tl.constexpr,
    HEAD: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """b_h + gate * attention for sizes at which registers hold a head's scores and little more.

    b_h and the heads' results are parked in memory, which the cache holds. The barriers separate
    what threads write from what other threads read.
    """
    N: tl.constexpr = b_y.shape[0]
    D: tl.constexpr = b_y.shape[1]
    p_proj = p_w + 3 * D * D + 3 * D
    o_n, o_i = tl.arange(0, N)[:, None] * D, tl.arange(0, HEAD)[None, :]
    p_h = p_park + o_n + tl.arange(0, D)[None, :]
    p_o = p_h + N * D
    b_a = b_y.to(DOT)
    tl.debug_barrier()
    tl.store(p_h, b_h)
    for i in range(0, D, HEAD):
        b_o = _heads(b_a, p_w, i, HEAD, 1, DOT, PRECISION)
        tl.store(p_park + N * D + i + o_n + o_i, b_o)
    tl.debug_barrier()
    b_o = tl.load(p_o).to(DOT)
    for i in range(0, D, HEAD):
        b_gate = modulation(p_step, p_label, o_gate + i, HEAD, SPLIT)
        b_out = _linear(b_o, p_proj + i * D, p_proj + D * D + i, HEAD, DOT, PRECISION)
        p_out = p_park + i + o_n + o_i
        tl.store(p_out, tl.load(p_out) + b_gate * b_out)
    tl.debug_barrier()
    return tl.load(p_h)


@triton.jit
def _mlp(
    b_h,  # [N, D]
    p_w,  # fc1, its bias, fc2, its bias
    CHUNK: tl.constexpr,  # hidden features at a time
    UNROLL: tl.constexpr,
    TANH: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    N: tl.constexpr = b_h.shape[0]
    D: tl.constexpr = b_h.shape[1]
    M: tl.constexpr = 4 * D
    p_bias = p_w + M * D
    p_fc2 = p_bias + M
    b_a = b_h.to(DOT)
    b_out = tl.zeros([N, D], tl.float32)
    for i in tl.range(0, M, CHUNK, loop_unroll_factor=M // CHUNK if UNROLL else 1):
        b_u = _linear(b_a, p_w + i * D, p_bias + i, CHUNK, DOT, PRECISION)
        if TANH:  # u (1 + tanh(z)) / 2 = u / (1 + exp(-2 z))
            b_u = b_u / (1.0 + tl.exp(b_u * _TANH_GELU * (1.0 + 0.044715 * b_u * b_u)))
        else:
            b_u = 0.5 * b_u * (1.0 + tl.erf(b_u * _SQRT_HALF))
        b_out = _product(b_u, p_fc2 + i, b_out, M, DOT, PRECISION)
    return b_out + _vector(p_fc2 + D * M, D)[None, :]


@triton.jit
def embed(b_x, p_w, D: tl.constexpr, F: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Embed b_x [N, F padded] and add positions: [N, D]; p_w points to embed, then position."""
    N: tl.constexpr = b_x.shape[0]
    o_d, o_f = tl.arange(0, D), tl.arange(0, b_x.shape[1])
    b_w = tl.load(p_w + o_d[:, None] * F + o_f[None, :], mask=o_f[None, :] < F, other=0.0).to(DOT)
    b_position = tl.load(p_w + D * F + tl.arange(0, N)[:, None] * D + o_d[None, :]).to(tl.float32)
    return tl.dot(b_x.to(DOT), b_w.T, b_position, input_precision=PRECISION)


@triton.jit
def final(b_h, p_w, p_bias, o_f, m_f, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Apply rows o_f of the final Linear to b_h [N, D]: [N, F padded], zero where m_f is false."""
    D: tl.constexpr = b_h.shape[1]
    p_w += o_f[:, None] * D + tl.arange(0, D)[None, :]
    b_w = tl.load(p_w, mask=m_f[:, None], other=0.0).to(DOT)
    b_bias = tl.load(p_bias + o_f, mask=m_f, other=0.0).to(tl.float32)
    return tl.dot(b_h.to(DOT), b_w.T, input_precision=PRECISION) + b_bias[None, :]


@triton.jit
def blocks(
    b_h,  # [N, D]
    p_w,  # of the first layer
    p_step,  # modulation of the first layer
    p_label,
    p_park,
    L,
    eps,
    mlp_eps,
    SPLIT: tl.constexpr,
    HEAD: tl.constexpr,
    TANH: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Run all layers."""
    D: tl.constexpr = b_h.shape[1]
    for i in tl.range(0, L, num_stages=STAGES):
        p_l = p_w + i * layer_weights(D)
        o = 6 * i * D
        b_scale = modulation(p_step, p_label, o, D, SPLIT)
        b_shift = modulation(p_step, p_label, o + D, D, SPLIT)
        b_y = layer_norm_modulate(b_h, b_scale, b_shift, eps)
        if p_park is not None:
            o_gate = o + 2 * D
            b_h = _parked_attention(
                b_h, b_y, p_l, p_park, p_step, p_label, o_gate, SPLIT, HEAD, DOT, PRECISION
            )
        else:
            b_y = _attention(b_y, p_l, HEAD, HEADS, DOT, PRECISION)
            b_h += modulation(p_step, p_label, o + 2 * D, D, SPLIT) * b_y
        b_scale = modulation(p_step, p_label, o + 3 * D, D, SPLIT)
        b_shift = modulation(p_step, p_label, o + 4 * D, D, SPLIT)
        b_y = layer_norm_modulate(b_h, b_scale, b_shift, mlp_eps)
        p_l += 4 * D * D + 4 * D
        b_y = _mlp(b_y, p_l, CHUNK, STAGES > 1, TANH, DOT, PRECISION)
        b_h += modulation(p_step, p_label, o + 5 * D, D, SPLIT) * b_y
    return b_h
