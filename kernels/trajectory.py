"""The sampling loop of a small DiT in one launch: each program takes one image through K steps.

Modulation depends on the step and the image's label: it is six vectors for each layer and two at
the end. From h = embed x + position (Peebles & Xie 2023, section 3.2, "adaLN-Zero"):

    h = h + gate1 * proj(attention(qkv(LN(h) * (1 + scale1) + shift1)))       # every layer
    h = h + gate2 * fc2(gelu(fc1(LN(h) * (1 + scale2) + shift2)))
    eps, v = final(LN(h) * (1 + scale) + shift)
    x, x0 = the update of `fastdit.kernels.sampling`

A step needs no launch of its own, and its activations stay in registers. Every step reads weights
and modulation from the cache, which bounds the models and batches for which this pays. LayerNorm,
softmax, GELU, the update and all sums of products are in float32; operands of products are in the
weights' dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels import network
from fastdit.kernels.common import arch, dot_dtype
from fastdit.kernels.sampling import ROW, SIGMA, X0_PREV, learned_sigma, philox_normals, solve
from fastdit.kernels.shape import Shape
from fastdit.kernels.trajectory_configs import trajectory_configs


@triton.jit
def _normals(p_seeds, step, N: tl.constexpr, F: tl.constexpr, FP: tl.constexpr):
    """Return the noise of an image's elements at a step: [N, F padded]."""
    key, stream = tl.load(p_seeds), tl.load(p_seeds + 1)
    o = tl.arange(0, N)[:, None] * (F // 4) + tl.arange(0, FP // 4)[None, :]
    return philox_normals(key, step, stream, o)


@triton.jit(do_not_specialize=["first", "K", "B", "L", "S"])
def trajectory_kernel(
    p_x,  # [B, N, F] float32, in and out
    p_x0,  # [B, N, F] float32, in and out: x0 as the step before predicted it
    p_weights,  # packed as `fastdit.kernels.shape.Shape` says
    p_by_step,  # [K, S, (6 L + 2) D]
    p_by_label,  # [R, (6 L + 2) D], or None
    p_rows,  # [B or 2B] int64 rows of modulation, the null label's last
    p_coefficients,  # [K, ROW]
    p_seeds,  # [B, 2] int64 (key, stream), where NOISE is 1
    p_noise,  # [K, B, N, F], where NOISE is 2
    p_park,  # [B, 2, N, D] float32 scratch memory, or None
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
    GUIDED: tl.constexpr,  # the first GUIDED channels are guided; 0: there are no null rows
    LEARNED: tl.constexpr,
    NOISE: tl.constexpr,  # 0: none, 1: from seeds, 2: given
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,  # heads of attention at a time
    CHUNK: tl.constexpr,  # hidden features of an MLP at a time
    STAGES: tl.constexpr,  # above 1, the next layer's weights are prefetched
):
    """Each program takes all steps of one image."""
    FP: tl.constexpr = max(16, triton.next_power_of_2(F))
    SPLIT: tl.constexpr = p_by_label is not None
    PASSES: tl.constexpr = 2 if GUIDED else 1
    HALVES: tl.constexpr = 2 if LEARNED else 1  # the variance's range, then the noise
    i_b = tl.program_id(0).to(tl.int64)
    width = (6 * L + 2) * D
    o_f = tl.arange(0, FP)
    o = tl.arange(0, N)[:, None] * F + o_f[None, :]
    m_f = o_f < F
    m = m_f[None, :]
    o_eps = o_f + o_f // C * C if LEARNED else o_f
    p_blocks = p_weights + D * F + N * D
    p_final = p_blocks + L * network.layer_weights(D)
    p_bias = p_final + (2 * F if LEARNED else F) * D
    if p_park is not None:
        p_park += i_b * (2 * N * D)
    p_x += i_b * (N * F)
    p_x0 += i_b * (N * F)

    # Without disable_licm and the barrier the compiler would load once, and keep in registers, what
    # every step reads alike. The barrier also orders a step's loads after the last step's stores.
    for k in tl.range(0, K, disable_licm=True):
        b_eps = tl.zeros([N, FP], tl.float32)
        b_null, b_v = b_eps, b_eps
        for i_pass in tl.range(0, PASSES, disable_licm=True):  # the null label comes first
            tl.debug_barrier()
            b_x = tl.load(p_x + o, mask=m, other=0.0)
            b_h = network.embed(b_x, p_weights, D, F, DOT, PRECISION)
            row = tl.load(p_rows + i_b + (PASSES - 1 - i_pass) * B)
            if SPLIT:
                p_step = p_by_step + (k * S).to(tl.int64) * width
                p_label = p_by_label + row * width
            else:
                p_step = p_by_step + (k * S + row) * width
                p_label = p_step  # not read
            b_h = network.blocks(
                b_h,
                p_blocks,
                p_step,
                p_label,
                p_park,
                L,
                eps,
                mlp_eps,
                SPLIT,
                HEAD,
                TANH,
                DOT,
                PRECISION,
                HEADS,
                CHUNK,
                STAGES,
            )
            b_scale = network.modulation(p_step, p_label, 6 * L * D, D, SPLIT)
            b_shift = network.modulation(p_step, p_label, (6 * L + 1) * D, D, SPLIT)
            b_h = network.layer_norm_modulate(b_h, b_scale, b_shift, eps)
            b_null = b_eps
            for i in tl.range(0, HALVES, num_stages=1, disable_licm=True):
                b_v = b_eps
                o_out = o_eps + (HALVES - 1 - i) * C
                b_eps = network.final(b_h, p_final, p_bias, o_out, m_f, DOT, PRECISION)
        if GUIDED:
            b_guided = b_null + scale * (b_eps - b_null)
            b_eps = tl.where((o_f % C < GUIDED)[None, :], b_guided, b_eps)

        b_x = tl.load(p_x + o, mask=m, other=0.0)
        b_prev = tl.load(p_x0 + o, mask=m, other=0.0)
        p_c = p_coefficients + k * ROW
        b_x0, b_next = solve(b_x, b_eps, p_c, None)
        b_next += tl.load(p_c + X0_PREV) * b_prev
        if NOISE != 0:
            sigma = tl.load(p_c + SIGMA)
            b_sigma = sigma
            if LEARNED:
                b_sigma = learned_sigma(b_v, p_c, None)
            if sigma != 0:
                if NOISE == 1:
                    b_z = _normals(p_seeds + i_b * 2, first + k + 1, N, F, FP)
                else:
                    p_z = p_noise + (k * B + i_b) * (N * F)
                    b_z = tl.load(p_z + o, mask=m, other=0.0).to(tl.float32)
                b_next += b_sigma * b_z
        tl.debug_barrier()  # all threads have read what is replaced next
        tl.store(p_x + o, b_next, mask=m)
        tl.store(p_x0 + o, b_x0, mask=m)


def obstacle(shape: Shape) -> str | None:
    """Return why the kernel cannot run a model, worded to follow its name, or None."""
    head = shape.hidden // shape.heads
    options = {
        "RMSNorms": shape.rms,
        "modulation without shifts": shape.block_parts != 6,
        "norms of queries and keys": shape.qk_norm,
        "rotary positions": shape.rope,
        "SwiGLU": shape.swiglu,
    }
    if refused := [name for name, has in options.items() if has]:
        return f"takes no {refused[0]}"
    if shape.hidden not in (64, 128):
        return f"takes a hidden size of 64 or 128, got {shape.hidden}"
    if shape.tokens not in (16, 64):
        return f"takes 16 or 64 tokens, got {shape.tokens}"
    if head not in (16, 32):
        return f"takes head dims of 16 or 32, got {head}"
    if shape.features > 64 or shape.features % 4:
        return f"takes up to 64 features of a token, a multiple of 4, got {shape.features}"
    return None


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
    """Launch K steps of a sampling loop; `fastdit.functional.trajectory` checks the arguments.

    Args:
        x: [B, P, C] float32; P * C are the elements of all tokens in order.
        weights: [n] float, packed as `Shape` says.
        by_step: [K, 1 or R, shape.width] float.
        by_label: [R, shape.width] like by_step, which then has one row a step; or None.
        rows: [B] int64 rows of the tables; with guidance [2B], the null label's last.
        x0, coefficients ... noise: as that function takes them.
        guidance: (scale, number of channels or None for all), or None.
        config: one of `trajectory_configs`; None for the default.

    Returns:
        (x, x0) after the last step, like x.

    Raises:
        ValueError: the kernel cannot run a model of this shape.
    """
    if (problem := obstacle(shape)) is not None:
        raise ValueError(f"shape: the trajectory {problem}")
    x, x0 = (t.clone(memory_format=torch.contiguous_format) for t in (x, x0))
    tensors = (weights, by_step, by_label, rows, coefficients.float(), seeds, noise)
    tensors = tuple(None if t is None else t.contiguous() for t in tensors)
    B, N, D = x.shape[0], shape.tokens, shape.hidden
    park = x.new_empty(B, 2, N, D) if N * D > 64 * 64 else None
    scale, channels = guidance or (1.0, 0)
    config = config or trajectory_configs(shape, weights.dtype, arch(x.device))[0]
    if not B:
        return x, x0
    numbers = dict(scale=float(scale), eps=shape.eps, mlp_eps=shape.mlp_eps, first=first)
    sizes = dict(K=len(coefficients), B=B, L=shape.layers, S=by_step.shape[1], N=N, D=D)
    sizes |= dict(F=shape.features, C=shape.channels, HEAD=D // shape.heads)
    kinds = dict(
        TANH=shape.tanh_gelu,
        GUIDED=shape.channels if channels is None else channels,
        LEARNED=shape.learned,
        NOISE=1 if seeds is not None else 2 if noise is not None else 0,
        DOT=dot_dtype(weights.dtype),
        PRECISION="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
    )
    constants = sizes | kinds | config.all_kwargs()
    trajectory_kernel[(B,)](x, x0, *tensors, park, **numbers, **constants)
    return x, x0
