"""Steps of sampling: a solver's update, its noise, and a whole loop of a small model."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit import noise as noise_of
from fastdit import reference
from fastdit.ops import checks, definitions, registration
from fastdit.ops.dispatch import choose
from fastdit.ops.trajectory import DiTWeights, Modulation, kernel_shape, plain_trajectory
from fastdit.update import Guidance


def sampler_update(
    x: Tensor,
    model_out: Tensor,
    coefficients: Tensor,
    step: Tensor | int,
    x0_prev: Tensor | None = None,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    guidance: Guidance | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply guidance, one solver step and its noise; the solver is linear in x, eps and x0.

    With c the row `step` of the coefficients, whose columns `fastdit.update.Coefficients` names:

        x0 = clamp(c.x0_x * x + c.x0_eps * eps, -c.x0_limit, c.x0_limit)
        x_next = c.x * x + c.eps * eps + c.x0 * x0 + c.x0_prev * x0_prev + sigma * z
        sigma = c.sigma, or with a learned range exp(low + (v + 1) / 2 * (high - low))

    low and high are c.log_sigma_low and c.log_sigma_high. Where c.sigma is 0, as in a last step,
    no noise is added and they are not used. c.x0_limit = inf does not clip. The update is computed
    in at least float32.

    Args:
        x: [B, P, C] tokens (all pixels in the model's token order) or [B, C, H, W] images, any
            float dtype.
        model_out: what the model predicts, eps in the formulas though it need not be noise, like x
            but any float dtype; or, with the learned range v, [B, P, 2C] or [B, 2C, H, W], eps
            first. With guidance 2B rows: B conditional, B null.
        coefficients: [S, 10] float.
        step: [] int64 on x's device, or an int: the row. Its noise is that of step + 1, since
            x_T is the noise of step 0.
        x0_prev: like x, the x0 of the step before; None for 0.
        seeds: [B, 2] int64 (key, stream in [0, 2^32)): z is `fastdit.noise.normal` of them, with
            elements counted in the order of x's.
        noise: z itself, like x. With neither seeds nor noise z is 0.
        guidance: the scale, and the number of guided channels; its interval is not looked at.
        out: two contiguous tensors like x, to which x_next and x0 are written. They may be x and
            x0_prev, and share no other memory with the arguments. Nothing may require a gradient.
        backend: "triton", "cpp" (a float32 state on a CPU; not a default under torch.compile or
            where a gradient is required), "reference" or None.

    Returns:
        (x_next, x0), both of x's shape and dtype.

    Raises:
        ValueError: a shape, dtype, device or int step does not fit, or seeds and noise are both
            given; the message names the argument.

    Source: Ho et al. 2020, equation 11; Song et al. 2021 (DDIM), equation 12; Lu et al. 2022
    (DPM-Solver++), algorithm 2; Nichol & Dhariwal 2021, equation 15; Ho & Salimans 2022, eq. 6.
    """
    checks.check_update_tensors(x, model_out, guidance, x0_prev, noise)
    step = checks.check_update_tables(x, coefficients, step)
    checks.check_seeds(x, seeds, noise)
    tensors = [t for t in (x, model_out, x0_prev, noise) if t is not None]
    checks.check_out(out, x, tensors)
    chosen = choose("sampler_update", backend, *tensors)
    if chosen != "reference":
        scale, channels = (guidance.scale, guidance.channels) if guidance else (None, None)
        given = (x, model_out, coefficients, step, x0_prev, seeds, noise, scale, channels, chosen)
        if out is None:
            return registration.call(definitions.sampler_update, *given)
        definitions.sampler_update_out(*given, *out)
        if not torch.compiler.is_compiling():  # torch.library ops do not do it by themselves
            torch.autograd.graph.increment_version(out)
        return out
    results = reference.sampler_update(
        x, model_out, coefficients, step, x0_prev, seeds, noise, guidance
    )
    if out is None:
        return results
    for to, result in zip(out, results, strict=True):
        to.copy_(result)
    return out


def normal(seeds: Tensor, steps: Tensor, elements: int, backend: str | None = None) -> Tensor:
    """Return standard normal noise as a pure function of seed, step and element.

    Args:
        seeds: [B, 2] int64, a row (key, stream) for each image; 0 <= stream < 2^32.
        steps: [S] int64, 0 <= step < 2^32.
        elements: number of normals of an image at each step.
        backend: "cpp" (on a CPU; not a default under torch.compile), "reference" or None.

    Returns:
        [S, B, elements] float32 on seeds' device.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.

    Source: Salmon et al. 2011 (Philox4x32-10); Box & Muller 1958.
    """
    checks.check_noise(seeds, steps, elements)
    if choose("normal", backend, seeds) == "cpp":
        return definitions.normal(seeds, steps, elements)
    return noise_of.normal(seeds, steps, elements)


def trajectory(
    x: Tensor,
    x0: Tensor,
    weights: DiTWeights,
    modulation: Modulation,
    coefficients: Tensor,
    first: int = 0,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    guidance: Guidance | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Take K steps of a DiT's sampling loop in one op.

    Step k is `DiT.denoise` under `modulation.at(k)`, then `sampler_update` with row k of the
    coefficients. With "cpp" an image has the same bits in any batch, at any place in it, and with
    any number of threads.

    Args:
        x: [B, P, C] float32 or float64 tokens: all pixels in the model's token order.
        x0: like x, the x0 of the step before; zeros before a first step.
        weights: the model's, in x's dtype or in 16 bits; the model has neither context tokens nor
            a bottleneck of patches. "cpp" reads them where they are.
        modulation: that of the K steps; with guidance of 2B rows, the null label's last. Whether
            `rows` are in range is checked on a CPU only, since it would wait for a device.
        coefficients: [K, 10] float, as `sampler_update` takes them.
        first: number of steps taken before; the noise of step k is that of step first + k + 1.
        seeds: [B, 2] int64 (key, stream), or None where noise is given.
        noise: [K, B, P, C], z itself. With neither seeds nor noise z is 0.
        guidance: the scale, and the number of guided channels; guides all K steps.
        backend: "triton" (CUDA; the published DiT's block, hidden 64 or 128, 16 or 64 tokens, head
            dims of 16 or 32; the error names what a chip's registers do not allow), "cpp" (a CPU,
            float32; bfloat16 with AVX512-BF16), "reference" or None.

    Returns:
        (x, x0) after the last step, of x's shape and dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        RuntimeError: "cpp" was named, and there is no C++ compiler that builds it.

    Source: Peebles & Xie 2023, section 3.2; Ho et al. 2020, algorithm 2.
    """
    checks.check_trajectory(x, x0, weights, modulation, coefficients, seeds, noise, guidance)
    dtype = x.dtype if x.dtype == torch.float64 else weights.dtype
    chosen = choose("trajectory", backend, weights.cfg, x.device, dtype)
    if chosen == "reference":
        return plain_trajectory(
            x, x0, weights, modulation, coefficients, first, seeds, noise, guidance
        )
    by_step, by_label, rows = modulation
    sizes, eps = kernel_shape(weights.cfg)
    return definitions.trajectory(
        x=x,
        x0=x0,
        weights=list(weights.tensors) if chosen == "cpp" else [weights.packed],
        modulation=[by_step, rows] if by_label is None else [by_step, rows, by_label],
        coefficients=coefficients,
        first=first,
        seeds=seeds,
        noise=noise,
        guidance=[guidance.scale, guidance.channels or weights.cfg.in_channels] if guidance else [],
        shape=[*sizes, *eps],
        backend=chosen,
    )
