"""The ops of a DiT and of its sampling.

LayerNorm and softmax are computed in at least float32. With mixed dtypes a residual keeps x's
dtype, and a modulated output takes scale's.

Those that kernels exist for take a `backend`, which runs the op or raises:

- "triton": fused kernels on CUDA or ROCm, or on the CPU if TRITON_INTERPRET=1 was set before the
  import. They take no float64, no heads wider than 128, and no NVIDIA GPU before Ampere.
- "cpp": C++ for float32 on a CPU; `attention` has none, and `normal` has no "triton".
- "reference": plain PyTorch, which torch.compile can fuse.
- None: the first of these that can run and suits. "cpp" does not suit while torch.compile traces,
  for LayerNorms of fewer than 100,000 elements, and for updates that need a gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit import noise as noise_of
from fastdit import reference
from fastdit.ops import checks, definitions, registration
from fastdit.ops.dispatch import choose, fuses_gelu
from fastdit.ops.trajectory import DiTWeights, Modulation, kernel_shape, plain_trajectory
from fastdit.update import Guidance


def patchify(x: Tensor, p: int) -> Tensor:
    """Cut images into tokens: [B, C, h*p, w*p] -> [B, h*w, p*p*C], the channel fastest."""
    B, C, H, W = x.shape
    x = x.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)  # [B, h, w, p, p, C]
    return x.reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(x: Tensor, p: int, grid: tuple[int, int] | None = None) -> Tensor:
    """Join tokens to images; inverts `patchify`.

    Args:
        x: [B, h*w, p*p*C].
        p: side of a patch.
        grid: (h, w), the rows and columns of patches; None is a square of them.

    Returns:
        [B, C, h*p, w*p].

    Raises:
        ValueError: the grid has another number of tokens than x.
    """
    B, N, F_ = x.shape
    h, w = grid or (int(N**0.5),) * 2
    if h * w != N:
        raise ValueError(f"grid: expected (rows, columns) of {N} tokens, got {grid or 'a square'}")
    C = F_ // (p * p)
    x = x.view(B, h, w, p, p, C).permute(0, 5, 1, 3, 2, 4)  # [B, C, h, p, w, p]
    return x.reshape(B, C, h * p, w * p)


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-5, backend: str | None = None
) -> Tensor:
    """Return LayerNorm without affine weights, then modulated: `LN(x) * (1 + scale) + shift`.

    Args:
        x: [B, N, D], any float dtype.
        scale: [B, D], of any row stride, so that a `chunk` of one [B, 6D] tensor needs no copy.
        shift: [B, D], like scale.
        eps: added to the variance.
        backend: "triton", "cpp" (all tensors in float32 on a CPU), "reference" or None.

    Returns:
        [B, N, D] in scale's dtype.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.

    Source: Peebles & Xie 2023, section 3.2 (adaLN).
    """
    checks.check_tokens("x", x)
    checks.check_modulation(x, scale=scale, shift=shift)
    chosen = choose("layer_norm_modulate", backend, x, scale, shift)
    if chosen != "reference":
        return registration.call(definitions.layer_norm_modulate, x, scale, shift, eps, chosen)[0]
    if x.dtype == torch.float64:
        return reference.layer_norm_modulate(x, scale, shift, eps)
    return _layer_norm_modulate(x, scale, shift, eps)


def gated_residual_layer_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """End one sub-layer and begin the next: `r = x + gate * y`, `LN(r) * (1 + scale) + shift`.

    Args:
        x: [B, N, D], the residual stream, any float dtype.
        y: [B, N, D], the sub-layer's output.
        gate: [B, D], any row stride.
        scale: [B, D], the next sub-layer's.
        shift: [B, D], the next sub-layer's.
        eps: added to the variance.
        backend: "triton", "cpp" (all tensors in float32 on a CPU), "reference" or None.

    Returns:
        (r, modulated): both [B, N, D]; r in x's dtype, modulated in scale's.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.

    Source: Peebles & Xie 2023, figure 3 (adaLN-Zero).
    """
    checks.check_tokens("x", x)
    checks.check_tokens("y", y)
    if y.shape != x.shape:
        raise ValueError(f"y: expected x's shape {list(x.shape)}, got {list(y.shape)}")
    checks.check_modulation(x, gate=gate, scale=scale, shift=shift)
    checks.check_device(x, y=y)
    chosen = choose("gated_residual_layer_norm_modulate", backend, x, y, gate, scale, shift)
    if chosen != "reference":
        residual, modulated, _, _ = registration.call(
            definitions.gated_residual_layer_norm_modulate, x, y, gate, scale, shift, eps, chosen
        )
        return residual, modulated
    if x.dtype == torch.float64:
        return reference.gated_residual_layer_norm_modulate(x, y, gate, scale, shift, eps)
    residual = torch.addcmul(x, gate[:, None], y).to(x.dtype)
    return residual, _layer_norm_modulate(residual, scale, shift, eps)


def attention(qkv: Tensor, n_heads: int, backend: str | None = None) -> Tensor:
    """Return softmax attention without a mask, on packed queries, keys and values.

    Scores are scaled by `head_dim ** -0.5`. float32 is computed in float32, or in TF32 where
    `torch.backends.cuda.matmul` allows it, and under autocast in its dtype, like any matrix
    product. For N = 1 the result is exactly v.

    Args:
        qkv: [B, N, 3D], the thirds of one linear, each head-major.
        n_heads: number of heads; must divide D. Triton takes head dims up to 128.
        backend: "triton", "reference" or None.

    Returns:
        [B, N, D] in qkv's dtype, or autocast's.

    Raises:
        ValueError: the shape or dtype does not fit.

    Source: Vaswani et al. 2017, equation 1.
    """
    checks.check_tokens("qkv", qkv)
    B, N, D3 = qkv.shape
    if n_heads < 1:
        raise ValueError(f"n_heads: expected at least 1, got {n_heads}")
    if D3 % (3 * n_heads):
        raise ValueError(
            f"qkv: expected a last dimension divisible by 3 * n_heads = {3 * n_heads}, got {D3}"
        )
    d = D3 // (3 * n_heads)
    chosen = choose("attention", backend, qkv, d)
    kind = qkv.device.type  # "meta" has no autocast
    if qkv.dtype != torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind):
        qkv = qkv.to(torch.get_autocast_dtype(kind))
    if N == 1 and qkv.dtype != torch.float64:
        return qkv[..., 2 * d * n_heads :].clone()
    if chosen == "triton":
        return registration.call(definitions.attention, qkv, n_heads)[0]
    if qkv.dtype == torch.float64:
        return reference.attention(qkv, n_heads)
    q, k, v = qkv.view(B, N, 3, n_heads, d).permute(2, 0, 3, 1, 4)  # each [B, h, N, d]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D3 // 3)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """Return the GELU of a linear layer, `gelu(x W^T + b)`.

    At inference on CUDA a tanh GELU is fused into the product, which saves a pass over the widest
    tensor of a block; it is then computed before the product is rounded.

    Args:
        x: [..., D], any float dtype.
        weight: [M, D].
        bias: [M], or None.
        approximate: "tanh" or "none", as `torch.nn.functional.gelu` takes it.

    Returns:
        [..., M].

    Source: Hendrycks & Gimpel 2016, section 2.
    """
    if bias is not None and approximate == "tanh" and fuses_gelu(x, weight, bias):
        rows = x.reshape(-1, x.shape[-1])
        rows = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)
        return rows.view(*x.shape[:-1], len(weight))
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


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
        model_out: predicted noise eps, like x but any float dtype; or, with the learned range v,
            [B, P, 2C] or [B, 2C, H, W], eps first. With guidance 2B rows: B conditional, B null.
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
        weights: the model's, in x's dtype or in 16 bits. "cpp" reads them where they are.
        modulation: that of the K steps; with guidance of 2B rows, the null label's last. Whether
            `rows` are in range is checked on a CPU only, since it would wait for a device.
        coefficients: [K, 10] float, as `sampler_update` takes them.
        first: number of steps taken before; the noise of step k is that of step first + k + 1.
        seeds: [B, 2] int64 (key, stream), or None where noise is given.
        noise: [K, B, P, C], z itself. With neither seeds nor noise z is 0.
        guidance: the scale, and the number of guided channels; guides all K steps.
        backend: "triton" (CUDA; hidden 64 or 128, 16 or 64 tokens, head dims of 16 or 32; the error
            names what a chip's registers do not allow), "cpp" (a CPU, float32; bfloat16 with
            AVX512-BF16), "reference" or None.

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


def _layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(shift[:, None], normed, 1 + scale[:, None]).to(scale.dtype)
