"""Guidance, solver update and noise in one pass over the state of a sampler.

For element e of image b, with row c of the coefficients (`fastdit.kernels.columns`) and guidance
scale s:

    eps    = eps_null + s (eps_cond - eps_null)                 # Ho & Salimans 2022, eq. 6
    x0     = clamp(c.x0_x x + c.x0_eps eps, -c.x0_limit, c.x0_limit)
    sigma  = c.sigma, or exp(low + (v + 1) / 2 (high - low))    # Nichol & Dhariwal 2021, eq. 15
    x_next = c.x x + c.eps eps + c.x0 x0 + c.x0_prev x0_prev + sigma z

If c.sigma is 0, z is not used. z is Philox4x32-10 (Salmon et al. 2011) and Box-Muller as
`fastdit.noise` defines them: element e takes normal e % 4 of counter (e // 4, step + 1, stream, 0),
so that one counter serves four neighbours.

The state of an image is [P, C] tokens or [C, H, W] pixels, with SPACE = 1 or H*W elements from one
channel to the next. With a learned range, each CHANNELS * SPACE elements of eps are followed by as
many of v.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels.columns import COLUMNS
from fastdit.kernels.launch import PREPARED, PreparedLaunch
from fastdit.kernels.tensors import contiguous


def _column(name: str) -> tl.constexpr:
    return tl.constexpr(COLUMNS.index(name))


# The place of each column in a row of coefficients, and the length of a row.
X0_X, X0_EPS, X0_LIMIT = _column("x0_x"), _column("x0_eps"), _column("x0_limit")
X, EPS, X0, X0_PREV = _column("x"), _column("eps"), _column("x0"), _column("x0_prev")
SIGMA, LOG_SIGMA_LOW, LOG_SIGMA_HIGH = map(_column, ("sigma", "log_sigma_low", "log_sigma_high"))
ROW = tl.constexpr(len(COLUMNS))

_MAX_ROW = 2**30  # elements of an image: offsets in its model output, twice as long, are int32


@triton.jit
def philox_words(key, step, stream, quads):
    """Return four blocks of 32-bit words; key is an int64 scalar, quads an int32 block."""
    c0 = quads.to(tl.uint32)
    zeros = c0 * 0
    # 64-bit counters would silently select another generator.
    return tl.philox(key, c0, zeros + step.to(tl.uint32), zeros + stream.to(tl.uint32), zeros)


@triton.jit
def _box_muller(r0, r1):
    u = r0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    v = r1.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10  # 2^-31
    radius = tl.sqrt_rn(-2.0 * tl.log(u))
    # v = turn / 2 + r exactly, with |r| <= 1/4; then Taylor series, with errors below half an
    # ulp. The library's cos would spill to local memory for angles that cannot occur.
    turn = tl.floor(2.0 * v + 0.5)
    r = v - 0.5 * turn
    s = r * r
    b_cos = 0.23533063 + s * -0.025806891
    b_cos = 1.0 + s * (-4.9348022 + s * (4.0587121 + s * (-1.3352628 + s * b_cos)))
    b_sin = 2.5501640 + s * (-0.59926453 + s * 0.082145887)
    b_sin = r * (3.14159265 + s * (-5.1677128 + s * b_sin))
    quadrant = turn.to(tl.int32) & 3
    m_odd = (quadrant & 1) == 1
    b_cos, b_sin = tl.where(m_odd, b_sin, b_cos), tl.where(m_odd, b_cos, b_sin)
    b_cos = tl.where((quadrant == 1) | (quadrant == 2), -b_cos, b_cos)
    b_sin = tl.where(quadrant >= 2, -b_sin, b_sin)
    return radius * b_cos, radius * b_sin


@triton.jit
def philox_normals(key, step, stream, quads):
    """Return the normals of elements 4 * quads to 4 * quads + 3, in the elements' order."""
    r0, r1, r2, r3 = philox_words(key, step, stream, quads)
    n0, n1 = _box_muller(r0, r1)
    n2, n3 = _box_muller(r2, r3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def _load(p, o, m):
    return tl.load(p + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def coefficient(p, known):
    """Load a coefficient, or NaN if the step is not in the table; known=None: it certainly is."""
    if known is None:
        return tl.load(p)
    else:
        return tl.load(p, mask=known, other=float("nan"))


@triton.jit
def solve(b_x, b_eps, p_c, known):
    """Return x0, and the next x without its terms in x0_prev and z."""
    limit = coefficient(p_c + X0_LIMIT, known)
    b_x0 = coefficient(p_c + X0_X, known) * b_x + coefficient(p_c + X0_EPS, known) * b_eps
    b_x0 = tl.where(b_x0 > limit, limit, tl.where(b_x0 < -limit, -limit, b_x0))  # NaN stays NaN
    b_next = coefficient(p_c + X, known) * b_x + coefficient(p_c + EPS, known) * b_eps
    return b_x0, b_next + coefficient(p_c + X0, known) * b_x0


@triton.jit
def learned_sigma(b_v, p_c, known):
    """Return sigma of a learned range, between its ends at v = -1 and v = 1."""
    low, high = coefficient(p_c + LOG_SIGMA_LOW, known), coefficient(p_c + LOG_SIGMA_HIGH, known)
    return tl.exp(low + (b_v + 1) * 0.5 * (high - low))


@triton.jit
def sampler_update_kernel(
    p_x,  # [B, E]
    p_model_out,  # [B or 2B, E or 2E], the null label's rows last
    p_coefficients,  # [S, ROW]
    p_step,  # [] int64
    p_x0_prev,  # [B, E], where HAS_PREV
    p_seeds,  # [B, 2] int64 (key, stream), where NOISE is 1
    p_noise,  # [B, E], where NOISE is 2
    p_x_next,  # [B, E] out; may be p_x
    p_x0,  # [B, E] out; may be p_x0_prev
    scale,
    S,
    B,
    E,
    SPACE,
    CHANNELS: tl.constexpr,
    GUIDED: tl.constexpr,  # the first GUIDED channels are guided; 0: there are no null rows
    LEARNED: tl.constexpr,
    HAS_PREV: tl.constexpr,
    NOISE: tl.constexpr,  # 0: none, 1: from seeds, 2: given
    BLOCK: tl.constexpr,
):
    """Each program updates BLOCK elements of one image."""
    blocks = tl.cdiv(E, BLOCK)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    i_block = tl.program_id(0) % blocks
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < E
    o_eps, width = o, E
    if LEARNED:
        group = CHANNELS * SPACE
        o_eps, width = o + o // group * group, 2 * E
        if NOISE != 0:
            b_v = _load(p_model_out + i_b * width, o_eps + group, m)
    b_x = _load(p_x + i_b * E, o, m)
    b_eps = _load(p_model_out + i_b * width, o_eps, m)
    if GUIDED > 0:
        b_null = _load(p_model_out + (i_b + B) * width, o_eps, m)
        b_guided = b_null + scale * (b_eps - b_null)
        b_eps = tl.where(o // SPACE % CHANNELS < GUIDED, b_guided, b_eps)

    step = tl.load(p_step)
    known = (step >= 0) & (step < S)
    p_c = p_coefficients + step * ROW
    b_x0, b_next = solve(b_x, b_eps, p_c, known)
    if HAS_PREV:
        b_next += coefficient(p_c + X0_PREV, known) * _load(p_x0_prev + i_b * E, o, m)
    if NOISE == 2:
        b_z = _load(p_noise + i_b * E, o, m)
    if NOISE != 0:
        sigma = coefficient(p_c + SIGMA, known)
        if sigma != 0:
            if NOISE == 1:
                key, stream = tl.load(p_seeds + i_b * 2), tl.load(p_seeds + i_b * 2 + 1)
                quads = i_block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
                b_z = philox_normals(key, step + 1, stream, quads)
            if LEARNED:
                b_next += learned_sigma(b_v, p_c, known) * b_z
            else:
                b_next += sigma * b_z
    tl.debug_barrier()  # all threads have read what is replaced next
    tl.store(p_x0 + i_b * E + o, b_x0.to(p_x0.dtype.element_ty), mask=m)
    tl.store(p_x_next + i_b * E + o, b_next.to(p_x_next.dtype.element_ty), mask=m)


def sampler_update_configs() -> list[triton.Config]:
    """Return the configurations, the default first: 8 elements a thread, 128 bits of bfloat16."""
    sizes = ((1024, 4), (512, 4), (2048, 8), (512, 2))
    return [triton.Config({"BLOCK": n}, num_warps=warps, num_stages=1) for n, warps in sizes]


def sampler_update(
    x: Tensor,
    model_out: Tensor,
    coefficients: Tensor,
    step: Tensor,
    x0_prev: Tensor | None = None,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    guidance: tuple[float, int | None] | None = None,
    config: triton.Config | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the update; `fastdit.functional.sampler_update` checks the arguments.

    Args:
        step: [] int64.
        guidance: (scale, number of channels or None for all) if model_out has 2B rows.
        config: one of `sampler_update_configs`; None for the default.

    Returns:
        (x_next, x0), contiguous, like x.

    Raises:
        ValueError: an image has 2^30 elements or more.
    """
    channel = 1 if x.dim() == 4 else 2
    B, E, C = x.shape[0], x.shape[1:].numel(), x.shape[channel]
    if E >= _MAX_ROW:
        raise ValueError(f"x: expected fewer than 2^30 elements an image, got {E}")
    x, model_out = x.contiguous(), model_out.contiguous()
    coefficients = coefficients.float().contiguous()
    x0_prev, seeds, noise = contiguous(x0_prev), contiguous(seeds), contiguous(noise)
    x_next, x0 = out or (torch.empty_like(x), torch.empty_like(x))
    if x.numel():
        scale, channels = guidance or (1.0, 0)
        guided, learned = C if channels is None else channels, model_out.shape[channel] == 2 * C
        kind = 1 if seeds is not None else 2 if noise is not None else 0
        launch = _prepare(B, E, config, C, guided, learned, x0_prev is not None, kind)
        space = 1 if channel == 2 else E // C
        tensors = (x, model_out, coefficients, step, x0_prev, seeds, noise, x_next, x0)
        launch(tensors, float(scale), coefficients.shape[0], B, E, space)
    return x_next, x0


@functools.lru_cache(PREPARED)
def _prepare(B: int, E: int, config: triton.Config | None, *constants: int) -> PreparedLaunch:
    config = config or sampler_update_configs()[0]
    grid = (B * triton.cdiv(E, config.kwargs["BLOCK"]),)
    names = ("CHANNELS", "GUIDED", "LEARNED", "HAS_PREV", "NOISE")
    given = dict(zip(names, constants, strict=True))
    return PreparedLaunch(sampler_update_kernel, grid, **given, **config.all_kwargs())
