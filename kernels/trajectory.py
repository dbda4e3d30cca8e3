"""The sampling loop of a small DiT in one launch: one program, one image, K steps.

With m the modulation of step k and of the image's label, six vectors a layer and two at the end,
and h = embed x + position (Peebles & Xie 2023, section 3.2, "adaLN-Zero"):

    h = h + gate1 * proj(attention(qkv(LN(h) * (1 + scale1) + shift1)))       # every layer
    h = h + gate2 * fc2(gelu(fc1(LN(h) * (1 + scale2) + shift2)))
    eps, v = final(LN(h) * (1 + scale) + shift)
    x, x0 = the update of `fastdit.kernels.sampling`

A step costs no launch, and its activations stay in registers. Weights and modulation are read anew
at every step, from the cache: that is what bounds the models and batches this is good for.
LayerNorm, softmax, GELU and the update are in float32, as are all sums of products; operands of
products are in the weights' dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels.attention_configs import family_of
from fastdit.kernels.common import INTERPRET, arch
from fastdit.kernels.sampling import philox_normals
from fastdit.kernels.shape import Shape

_DOT_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_TANH_GELU = tl.constexpr(-1.5957691216057308)  # -2 sqrt(2 / pi)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _vector(p, WIDTH: tl.constexpr):
    return tl.load(p + tl.arange(0, WIDTH)).to(tl.float32)


@triton.jit
def _product(b_a, p_w, b_sum, STRIDE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """b_sum [N, out] plus b_a [N, in] times the weights of a Linear, rows of STRIDE at p_w."""
    o_out, o_in = tl.arange(0, b_sum.shape[1])[:, None], tl.arange(0, b_a.shape[1])[None, :]
    b_w = tl.load(p_w + o_out * STRIDE + o_in).to(DOT)
    return tl.dot(b_a.to(DOT), b_w.T, b_sum, input_precision=PRECISION)


@triton.jit
def _linear(b_a, p_w, p_bias, OUT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """b_a [N, in], OUT rows of a Linear and of its bias -> [N, OUT]."""
    b_zero = tl.zeros([b_a.shape[0], OUT], tl.float32)
    return _product(b_a, p_w, b_zero, b_a.shape[1], DOT, PRECISION) + _vector(p_bias, OUT)[None, :]


@triton.jit
def _modulation(p_step, p_label, o, WIDTH: tl.constexpr, SPLIT: tl.constexpr):
    """Columns from o on of a row of modulation: [1, WIDTH]."""
    b = _vector(p_step + o, WIDTH)
    if SPLIT:
        b += _vector(p_label + o, WIDTH)
    return b[None, :]


@triton.jit
def _layer_norm_modulate(b_h, b_scale, b_shift, eps):
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
    i,  # first column of the heads in D
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
        b_p = tl.exp2(b_s * C - (tl.max(b_s, 1) * C)[:, None])
        b_o = tl.dot(b_p.to(DOT), b_v, input_precision=PRECISION)
        return b_o * (1.0 / tl.sum(b_p, 1))[:, None]
    else:
        b_k = _by_head(b_k, HEAD).permute(0, 2, 1)
        b_s = tl.dot(_by_head(b_q, HEAD), b_k, input_precision=PRECISION)  # [HEADS, N, N]
        b_p = tl.exp2(b_s * C - (tl.max(b_s, 2) * C)[:, :, None])
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
    p_park,  # [2, N, D] float32, this program's own
    p_step,
    p_label,
    o_gate,  # in a row of modulation
    SPLIT: tl.constexpr,
    HEAD: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """b_h + gate * attention, where registers cannot hold b_h and the sum beside a head's scores.

    Both wait in memory, which the cache holds; barriers order what threads write and others read.
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
        b_gate = _modulation(p_step, p_label, o_gate + i, HEAD, SPLIT)
        b_out = _linear(b_o, p_proj + i * D, p_proj + D * D + i, HEAD, DOT, PRECISION)
        p_out = p_park + i + o_n + o_i
        tl.store(p_out, tl.load(p_out) + b_gate * b_out)
    tl.debug_barrier()
    return tl.load(p_h)


@triton.jit
def _mlp(
    b_h,  # [N, D]
    p_w,  # fc1, its bias, fc2, its bias
    CHUNK: tl.constexpr,  # hidden columns at a time
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
def _embed(b_x, p_w, D: tl.constexpr, F: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """b_x [N, F padded] -> [N, D]; p_w is at embed, then position."""
    N: tl.constexpr = b_x.shape[0]
    o_d, o_f = tl.arange(0, D), tl.arange(0, b_x.shape[1])
    b_w = tl.load(p_w + o_d[:, None] * F + o_f[None, :], mask=o_f[None, :] < F, other=0.0).to(DOT)
    b_position = tl.load(p_w + D * F + tl.arange(0, N)[:, None] * D + o_d[None, :]).to(tl.float32)
    return tl.dot(b_x.to(DOT), b_w.T, b_position, input_precision=PRECISION)


@triton.jit
def _final(b_h, p_w, p_bias, o_f, m_f, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Rows o_f of the final Linear, zero where not m_f: b_h [N, D] -> [N, F padded]."""
    D: tl.constexpr = b_h.shape[1]
    p_w += o_f[:, None] * D + tl.arange(0, D)[None, :]
    b_w = tl.load(p_w, mask=m_f[:, None], other=0.0).to(DOT)
    b_bias = tl.load(p_bias + o_f, mask=m_f, other=0.0).to(tl.float32)
    return tl.dot(b_h.to(DOT), b_w.T, input_precision=PRECISION) + b_bias[None, :]


@triton.jit
def _blocks(
    b_h,  # [N, D]
    p_w,  # of the first layer
    p_step,  # its modulation
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
    """All layers."""
    D: tl.constexpr = b_h.shape[1]
    for i in tl.range(0, L, num_stages=STAGES):
        p_l = p_w + i * (12 * D * D + 9 * D)
        o = 6 * i * D
        b_scale = _modulation(p_step, p_label, o, D, SPLIT)
        b_shift = _modulation(p_step, p_label, o + D, D, SPLIT)
        b_y = _layer_norm_modulate(b_h, b_scale, b_shift, eps)
        if p_park is not None:
            b_h = _parked_attention(
                *(b_h, b_y, p_l, p_park, p_step, p_label, o + 2 * D),
                *(SPLIT, HEAD, DOT, PRECISION),
            )
        else:
            b_y = _attention(b_y, p_l, HEAD, HEADS, DOT, PRECISION)
            b_h += _modulation(p_step, p_label, o + 2 * D, D, SPLIT) * b_y
        b_scale = _modulation(p_step, p_label, o + 3 * D, D, SPLIT)
        b_shift = _modulation(p_step, p_label, o + 4 * D, D, SPLIT)
        b_y = _layer_norm_modulate(b_h, b_scale, b_shift, mlp_eps)
        p_l += 4 * D * D + 4 * D
        b_y = _mlp(b_y, p_l, CHUNK, STAGES > 1, TANH, DOT, PRECISION)
        b_h += _modulation(p_step, p_label, o + 5 * D, D, SPLIT) * b_y
    return b_h


@triton.jit
def _update(b_x, b_eps, b_prev, p_c):
    """x0 and the next x without its noise, by a row of coefficients."""
    limit = tl.load(p_c + 2)
    b_x0 = tl.load(p_c) * b_x + tl.load(p_c + 1) * b_eps
    b_x0 = tl.where(b_x0 > limit, limit, tl.where(b_x0 < -limit, -limit, b_x0))  # NaN stays NaN
    b_next = tl.load(p_c + 3) * b_x + tl.load(p_c + 4) * b_eps + tl.load(p_c + 5) * b_x0
    return b_x0, b_next + tl.load(p_c + 6) * b_prev


@triton.jit
def _normals(p_seeds, step, N: tl.constexpr, F: tl.constexpr, FP: tl.constexpr):
    """Noise of an image's elements at step `step`: [N, F padded]."""
    key, stream = tl.load(p_seeds), tl.load(p_seeds + 1)
    o = tl.arange(0, N)[:, None] * (F // 4) + tl.arange(0, FP // 4)[None, :]
    return philox_normals(key, step, stream, o)


@triton.jit(do_not_specialize=["first", "K", "B", "L", "S"])
def trajectory_kernel(
    p_x,  # [B, N, F] float32, in and out
    p_x0,  # [B, N, F] float32, in and out: what the step before predicted
    p_weights,  # as `fastdit.kernels.shape.Shape` lists them
    p_by_step,  # [K, S, (6 L + 2) D]
    p_by_label,  # [R, (6 L + 2) D], or None
    p_rows,  # [B or 2B] int64: the labels' rows, then the null label's
    p_coefficients,  # [K, 10] as `sampler_update_kernel` has them
    p_seeds,  # [B, 2] int64 (key, stream), where NOISE is 1
    p_noise,  # [K, B, N, F], where NOISE is 2
    p_park,  # [B, 2, N, D] float32 to work in, or None
    scale,
    eps,
    mlp_eps,
    first,
    K,
    B,
    L,
    S,
    N: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TANH: tl.constexpr,
    GUIDED: tl.constexpr,  # how many channels, from the first, are guided; 0: no null rows
    LEARNED: tl.constexpr,
    NOISE: tl.constexpr,  # 0: none, 1: of the seeds, 2: given
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,  # of attention at a time
    CHUNK: tl.constexpr,  # hidden columns of an MLP at a time
    STAGES: tl.constexpr,  # of the layers: above 1, the next one's weights are on their way
):
    """One program: all steps of one image."""
    FP: tl.constexpr = max(16, triton.next_power_of_2(F))
    SPLIT: tl.constexpr = p_by_label is not None
    PASSES: tl.constexpr = 2 if GUIDED else 1
    i_b = tl.program_id(0).to(tl.int64)
    width = (6 * L + 2) * D
    o_f = tl.arange(0, FP)
    o = tl.arange(0, N)[:, None] * F + o_f[None, :]
    m_f = o_f < F
    m = m_f[None, :]
    o_eps = o_f + o_f // C * C if LEARNED else o_f
    p_blocks = p_weights + D * F + N * D
    p_final = p_blocks + L * (12 * D * D + 9 * D)
    p_bias = p_final + (2 * F if LEARNED else F) * D
    if p_park is not None:
        p_park += i_b * (2 * N * D)
    p_x += i_b * (N * F)
    p_x0 += i_b * (N * F)

    # Without disable_licm and the barrier, what every step reads alike would be read once and stay
    # in registers. The barrier also orders a step's loads after the stores of the one before.
    for k in tl.range(0, K, disable_licm=True):
        b_eps = tl.zeros([N, FP], tl.float32)
        b_null, b_v = b_eps, b_eps
        for i_pass in tl.range(0, PASSES, disable_licm=True):  # the null label's first
            tl.debug_barrier()
            b_x = tl.load(p_x + o, mask=m, other=0.0)
            b_h = _embed(b_x, p_weights, D, F, DOT, PRECISION)
            row = tl.load(p_rows + i_b + (PASSES - 1 - i_pass) * B)
            if SPLIT:
                p_step = p_by_step + (k * S).to(tl.int64) * width
                p_label = p_by_label + row * width
            else:
                p_step = p_by_step + (k * S + row) * width
                p_label = p_step  # not read
            b_h = _blocks(
                *(b_h, p_blocks, p_step, p_label, p_park, L, eps, mlp_eps),
                *(SPLIT, HEAD, TANH, DOT, PRECISION, HEADS, CHUNK, STAGES),
            )
            b_scale = _modulation(p_step, p_label, 6 * L * D, D, SPLIT)
            b_shift = _modulation(p_step, p_label, (6 * L + 1) * D, D, SPLIT)
            b_h = _layer_norm_modulate(b_h, b_scale, b_shift, eps)
            b_null = b_eps
            b_eps = _final(b_h, p_final, p_bias, o_eps, m_f, DOT, PRECISION)
            if LEARNED:
                b_v = _final(b_h, p_final, p_bias, o_eps + C, m_f, DOT, PRECISION)
        if GUIDED:
            b_guided = b_null + scale * (b_eps - b_null)
            b_eps = tl.where((o_f % C < GUIDED)[None, :], b_guided, b_eps)

        b_x = tl.load(p_x + o, mask=m, other=0.0)
        b_prev = tl.load(p_x0 + o, mask=m, other=0.0)
        p_c = p_coefficients + k * 10
        b_x0, b_next = _update(b_x, b_eps, b_prev, p_c)
        if NOISE != 0:
            sigma = tl.load(p_c + 7)
            if sigma != 0:
                if NOISE == 1:
                    b_z = _normals(p_seeds + i_b * 2, first + k + 1, N, F, FP)
                else:
                    p_z = p_noise + (k * B + i_b) * (N * F)
                    b_z = tl.load(p_z + o, mask=m, other=0.0).to(tl.float32)
                if LEARNED:
                    low, high = tl.load(p_c + 8), tl.load(p_c + 9)
                    b_next += tl.exp(low + (b_v + 1) * 0.5 * (high - low)) * b_z
                else:
                    b_next += sigma * b_z
        tl.debug_barrier()  # all have read what is now replaced
        tl.store(p_x + o, b_next, mask=m)
        tl.store(p_x0 + o, b_x0, mask=m)


def obstacle(shape: Shape) -> str | None:
    """Why the kernel cannot run such a model, or None."""
    head = shape.hidden // shape.heads
    for name, value, expected in (
        ("hidden", shape.hidden, (64, 128)),
        ("tokens", shape.tokens, (16, 64)),
    ):
        if value not in expected:
            return f"{name}: expected {expected[0]} or {expected[1]}, got {value}"
    if head not in (16, 32):
        return f"heads: expected 16 or 32 columns a head, got {head}"
    if shape.features > 64 or shape.features % 4:
        return f"features of a token: expected a multiple of 4 up to 64, got {shape.features}"
    return None


# (hidden columns of an MLP at a time, warps, stages of a loop, and of the layers' own) by tokens
# and hidden, the default first. Where the layers are pipelined, the next one's weights are on their
# way while one is computed, for more shared memory than two programs find on a multiprocessor.
_Sizes = dict[tuple[int, int], list[tuple[int, int, int, int]]]
_SIZES: dict[str, _Sizes] = {
    "sm_80": {
        (16, 64): [(64, 4, 2, 1), (64, 4, 1, 1)],
        (64, 64): [(32, 4, 2, 1), (32, 4, 1, 1)],
        (16, 128): [(64, 8, 2, 1), (64, 8, 1, 1)],
        (64, 128): [(32, 8, 2, 1)],
    },
    "sm_90": {
        (16, 64): [(64, 4, 2, 2), (64, 4, 2, 1), (64, 4, 1, 1)],
        (64, 64): [(64, 4, 2, 1), (64, 4, 1, 1)],
        (16, 128): [(64, 8, 2, 1), (64, 8, 1, 1)],
        (64, 128): [(32, 8, 2, 1)],
    },
    "sm_100": {
        (16, 64): [(64, 4, 2, 1), (64, 8, 2, 2)],
        (64, 64): [(32, 8, 1, 1)],
        (16, 128): [(64, 8, 2, 1)],
        (64, 128): [(32, 4, 1, 1)],
    },
    "gfx942": {
        (16, 64): [(64, 4, 1, 1), (64, 4, 2, 1)],
        (64, 64): [(32, 4, 1, 1), (64, 4, 1, 1)],
        (16, 128): [(64, 4, 1, 1)],
        (64, 128): [(32, 4, 1, 1)],
    },
}


def trajectory_configs(shape: Shape, dtype: torch.dtype, arch: str) -> list[triton.Config]:
    """Launch configurations, the default first.

    Args:
        shape: without an `obstacle`.
        dtype: of the weights.
        arch: as `fastdit.kernels.common.arch` names it.
    """
    family = family_of(arch)
    sizes = _SIZES[family][shape.tokens, shape.hidden]
    if dtype == torch.float32:  # twice the shared memory, and plain cores
        sizes = [(32, 8, 1, 1)]
    # Left alone, ptxas may spill to fit one more program on a multiprocessor.
    registers = None if family == "gfx942" else 255
    return [
        triton.Config(
            # Of 16 tokens a head's scores are too small a product for four warps.
            {"HEADS": shape.heads if shape.tokens == 16 else 1, "CHUNK": chunk, "STAGES": layers},
            num_warps=warps,
            num_stages=stages,
            maxnreg=registers,
        )
        for chunk, warps, stages, layers in sizes
    ]


def trajectory(
    x: Tensor,
    x0: Tensor,
    weights: Tensor,
    by_step: Tensor,
    by_label: Tensor | None,
    rows: Tensor,
    coefficients: Tensor,
    first: int,
    seeds: Tensor | None,
    noise: Tensor | None,
    guidance: tuple[float, int | None] | None,
    shape: Shape,
    config: triton.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch K steps of a sampling loop; arguments as `fastdit.functional.trajectory` has them.

    Args:
        x: [B, P, C] float32, P * C the elements of all tokens in order.
        x0: like x, what the step before predicted; zeros where there is none.
        weights: [n] float, as `Shape` lists them.
        by_step: [K, 1 or R, shape.width] float.
        by_label: [R, shape.width] like by_step, which then has one row a step; or None.
        rows: [B] int64, or with guidance [2B], the null label's last.
        coefficients: [K, 10], used in float32.
        first: how many steps were taken before.
        seeds: [B, 2] int64 (key, stream), or None.
        noise: [K, B, P, C], or None.
        guidance: (scale, how many channels or None for all), or None.
        config: one of `trajectory_configs`; None for the default.

    Returns:
        (x, x0) after the last step, like x.

    Raises:
        ValueError: the kernel cannot run such a model.
    """
    if (problem := obstacle(shape)) is not None:
        raise ValueError(f"trajectory: {problem}")
    x, x0 = (t.clone(memory_format=torch.contiguous_format) for t in (x, x0))
    tensors = (weights, by_step, by_label, rows, coefficients.float(), seeds, noise)
    tensors = tuple(None if t is None else t.contiguous() for t in tensors)
    B, C, N, D = x.shape[0], shape.channels, shape.tokens, shape.hidden
    park = x.new_empty(B, 2, N, D) if N * D > 64 * 64 else None
    scale, channels = guidance or (1.0, 0)
    config = config or trajectory_configs(shape, weights.dtype, arch(x.device))[0]
    if not B:
        return x, x0
    trajectory_kernel[(B,)](
        *(x, x0, *tensors, park),
        *(float(scale), shape.eps, shape.mlp_eps),
        *(first, len(coefficients), B, shape.layers, by_step.shape[1]),
        *(N, shape.features, C, D, D // shape.heads, shape.tanh_gelu),
        C if channels is None else channels,
        shape.learned,
        1 if seeds is not None else 2 if noise is not None else 0,
        tl.float32 if INTERPRET else _DOT_DTYPES[weights.dtype],
        "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        **config.all_kwargs(),
    )
    return x, x0
