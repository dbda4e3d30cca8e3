"""The ops a DiT is made of: shapes checked, numbers defined, the fastest way to run them chosen.

In lower precision every op computes in at least float32 inside LayerNorm and softmax; with mixed
dtypes a residual keeps x's dtype and a modulated output takes scale's.

Every op takes `backend`: "triton" runs the fused kernels, on CUDA or ROCm, or on the CPU where
TRITON_INTERPRET=1 was set before the import; it runs them or raises. "reference" is plain PyTorch,
which a compiler sees through. None, the default, is "triton" where it can run, and "reference"
elsewhere: on other devices, in float64, for heads wider than 128, on NVIDIA GPUs before Ampere.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit import checks, ops, reference
from fastdit import noise as noise_of
from fastdit.config import DiTConfig
from fastdit.errors import unknown_name
from fastdit.packed import PackedDiT
from fastdit.solvers import Guidance

BACKENDS = ("reference", "triton")

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_MAX_HEAD_DIM = 128


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-5, backend: str | None = None
) -> Tensor:
    """LayerNorm without affine weights, then adaLN modulation: `LN(x) * (1 + scale) + shift`.

    Args:
        x: [B, N, D], any float dtype.
        scale: [B, D], any row stride (a `chunk` of one [B, 6D] tensor needs no copy).
        shift: [B, D], like scale.
        eps: added to the variance.
        backend: one of BACKENDS, or None.

    Returns:
        [B, N, D] in scale's dtype.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.

    Source: Peebles & Xie 2023, section 3.2 (adaLN).
    """
    checks.check_tokens("x", x)
    checks.check_modulation(x, scale=scale, shift=shift)
    checks.check_device(x, scale=scale, shift=shift)
    if _runs_triton(backend, x, scale, shift):
        return ops.layer_norm_modulate(x, scale, shift, eps)[0]
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
    """Close one sub-layer and open the next: `r = x + gate * y`, `LN(r) * (1 + scale) + shift`.

    Args:
        x: [B, N, D], the residual stream, any float dtype.
        y: [B, N, D], the sub-layer's output.
        gate: [B, D], any row stride.
        scale: [B, D], the next sub-layer's.
        shift: [B, D], the next sub-layer's.
        eps: added to the variance.
        backend: one of BACKENDS, or None.

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
    checks.check_device(x, y=y, gate=gate, scale=scale, shift=shift)
    if _runs_triton(backend, x, y, gate, scale, shift):
        residual, modulated, _, _ = ops.gated_residual_layer_norm_modulate(
            x, y, gate, scale, shift, eps
        )
        return residual, modulated
    if x.dtype == torch.float64:
        return reference.gated_residual_layer_norm_modulate(x, y, gate, scale, shift, eps)
    residual = torch.addcmul(x, gate[:, None], y).to(x.dtype)
    return residual, _layer_norm_modulate(residual, scale, shift, eps)


def attention(qkv: Tensor, n_heads: int, backend: str | None = None) -> Tensor:
    """Softmax attention, no mask, scaled by `head_dim ** -0.5`, on packed queries, keys, values.

    float32 is computed in float32, in TF32 only where `torch.backends.cuda.matmul` allows it;
    under autocast in its dtype, like any matrix product. A single token attends to itself alone,
    so that N = 1 returns v, exactly.

    Args:
        qkv: [B, N, 3D], the thirds of one linear, each head-major.
        n_heads: number of heads; must divide D. Triton takes head dims up to 128.
        backend: one of BACKENDS, or None.

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
    if d > _MAX_HEAD_DIM:
        if backend == "triton":
            raise ValueError(
                f"qkv: backend 'triton' takes head dims up to {_MAX_HEAD_DIM}, got {d}; "
                "use backend='reference'"
            )
        backend = "reference"
    triton = _runs_triton(backend, qkv)
    if qkv.dtype != torch.float64 and torch.is_autocast_enabled(qkv.device.type):
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
    if N == 1 and qkv.dtype != torch.float64:
        return qkv[..., 2 * d * n_heads :].clone()
    if triton:
        return ops.attention(qkv, n_heads)[0]
    if qkv.dtype == torch.float64:
        return reference.attention(qkv, n_heads)
    q, k, v = qkv.view(B, N, 3, n_heads, d).permute(2, 0, 3, 1, 4)  # each [B, h, N, d]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D3 // 3)


def sampler_update(
    x: Tensor,
    model_out: Tensor,
    coefficients: Tensor,
    step: Tensor | int,
    x0_prev: Tensor | None = None,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    guidance: Guidance | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Guidance, one solver step and its noise; any solver that is linear in x, eps and x0.

    With c the row `step` of the coefficients, whose columns `reference.COEFFICIENTS` names:

        x0 = clamp(c.x0_x * x + c.x0_eps * eps, -c.x0_limit, c.x0_limit)
        x_next = c.x * x + c.eps * eps + c.x0 * x0 + c.x0_prev * x0_prev + sigma * z
        sigma = c.sigma, or with a learned range exp(low + (v + 1) / 2 * (high - low))

    low and high are c.log_sigma_low and c.log_sigma_high. Where c.sigma is 0 (a last step)
    nothing is added for z and they are not used; c.x0_limit = inf does not clip. All of it is
    computed in at least float32.

    Args:
        x: [B, P, C] tokens (all pixels in the model's token order) or [B, C, H, W] images, any
            float dtype.
        model_out: predicted noise eps, like x but any float dtype; or, with the learned range v,
            [B, P, 2C] or [B, 2C, H, W], eps first. With guidance 2B rows: B conditional, B null.
        coefficients: [S, 10] float.
        step: [] int64 on x's device, or an int: the row, and the noise's step less one (x_T is
            step 0).
        x0_prev: like x, the x0 of the step before; None for 0.
        seeds: [B, 2] int64 (key, stream in [0, 2^32)): z is `fastdit.noise.normal` of them, its
            elements counted in the order of x's own.
        noise: z itself, like x. With neither seeds nor noise z is 0.
        guidance: scale, and how many channels it holds for.
        backend: one of BACKENDS, "cpp" (float32 on a CPU, the default there but under
            `torch.compile`), or None.

    Returns:
        (x_next, x0), both of x's shape and dtype.

    Raises:
        ValueError: a shape, dtype, device or int step does not fit, or seeds and noise are both
            given; the message names the argument.

    Source: Ho et al. 2020, equation 11; Song et al. 2021 (DDIM), equation 12; Lu et al. 2022
    (DPM-Solver++), algorithm 2; Nichol & Dhariwal 2021, equation 15; Ho & Salimans 2022, eq. 6.
    """
    checks.check_update_tensors(x, model_out, guidance, x0_prev=x0_prev, noise=noise)
    step = checks.check_update_tables(x, coefficients, step)
    checks.check_seeds(x, seeds, noise)
    tensors = (x, model_out, *(t for t in (x0_prev, noise) if t is not None))
    if backend is None and _suits_cpp(*tensors):
        backend = "cpp"
    if backend == "cpp" or _runs_triton(backend, *tensors):
        if backend == "cpp" and not _takes_cpp(*tensors):
            raise ValueError(
                "backend: 'cpp' expects float32 tensors on a CPU; use backend='reference'"
            )
        scale, channels = (guidance.scale, guidance.channels) if guidance else (None, None)
        return ops.sampler_update(
            *(x, model_out, coefficients, step, x0_prev, seeds, noise, scale, channels),
            "cpp" if backend == "cpp" else "triton",
        )
    return reference.sampler_update(
        x, model_out, coefficients, step, x0_prev, seeds, noise, guidance
    )


def normal(seeds: Tensor, steps: Tensor, elements: int, backend: str | None = None) -> Tensor:
    """Standard normal noise as a pure function of seed, step and element.

    Args:
        seeds: [B, 2] int64, a row (key, stream) for each image; 0 <= stream < 2^32.
        steps: [S] int64, 0 <= step < 2^32.
        elements: how many normals an image has at each step.
        backend: "cpp" on a CPU, the default there but under `torch.compile`; "reference"; or None.

    Returns:
        [S, B, elements] float32 on seeds' device.

    Raises:
        ValueError: elements is not positive, or the backend does not serve the device.

    Source: Salmon et al. 2011 (Philox4x32-10); Box & Muller 1958.
    """
    if elements < 1:
        raise ValueError(f"elements: expected at least 1, got {elements}")
    if backend not in (None, "reference", "cpp"):
        raise unknown_name("backend", str(backend), ("reference", "cpp"))
    on_cpu = seeds.device.type == "cpu"
    if backend == "cpp" and not on_cpu:
        raise ValueError(f"backend: 'cpp' expects tensors on a CPU, got {seeds.device}")
    chosen = on_cpu and not torch.compiler.is_compiling() and backend is None and has_cpp()
    if backend == "cpp" or chosen:
        return ops.normal(seeds, steps, elements)
    return noise_of.normal(seeds, steps, elements)


def trajectory(
    x: Tensor,
    x0: Tensor,
    packed: PackedDiT,
    modulation: reference.Modulation,
    coefficients: Tensor,
    first: int = 0,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    guidance: Guidance | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """K steps of a sampling loop as one op: forwards of a small DiT, each with its update.

    Step k is `out = denoise(tokens of x)` under `modulation.at(k)`, then `sampler_update` with row
    k of the coefficients. On a CPU an image's bits depend on neither its batch, nor its place in
    it, nor the number of threads.

    Args:
        x: [B, P, C] float32 or float64 tokens: all pixels in the model's token order.
        x0: like x, the x0 of the step before; zeros before a first step.
        packed: the model's weights, in x's dtype, or on CUDA in bfloat16.
        modulation: of the K steps; with guidance its rows are 2B, the null label's last.
        coefficients: [K, 10] float, as `sampler_update` takes them.
        first: how many steps were taken before: the noise of step k is that of step first + k + 1.
        seeds: [B, 2] int64 (key, stream); or
        noise: [K, B, P, C], z itself. With neither z is 0.
        guidance: scale, and how many channels it holds for; all K steps are guided.
        backend: "cpp" (a CPU, float32, hidden up to 512, up to 256 tokens), "triton" (CUDA; hidden
            64 or 128, 16 or 64 tokens), "reference", or None, which is the first that can run.

    Returns:
        (x, x0) after the last step, of x's shape and dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        RuntimeError: "cpp" was named, and there is no C++ compiler that builds it.

    Source: Peebles & Xie 2023, section 3.2; Ho et al. 2020, algorithm 2.
    """
    checks.check_trajectory(x, x0, packed, modulation, coefficients, seeds, noise, guidance)
    sizes, eps = _sizes(packed.cfg)
    chosen = _trajectory_backend(backend, x, packed)
    if chosen == "reference":
        return reference.trajectory(
            x, x0, packed, modulation, coefficients, first, seeds, noise, guidance
        )
    scale, channels = (guidance.scale, guidance.channels) if guidance else (None, None)
    return ops.trajectory(
        *(x, x0, packed.weights, *modulation, coefficients, first, seeds, noise),
        *(scale, channels, sizes, eps, chosen),
    )


def trajectory_obstacle(
    backend: str, cfg: DiTConfig, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why "cpp" or "triton" takes no trajectory of such a model and state, or None."""
    if backend == "cpp" and device.type != "cpu":
        return f"expects tensors on a CPU, got {device}"
    if backend == "cpp" and dtype != torch.float32:
        return f"computes in float32, got {dtype}"
    reason = None if backend == "cpp" else _obstacle(device, dtype)
    return reason or ops.trajectory_obstacle(backend, *_sizes(cfg))


@functools.cache
def has_cpp() -> bool:
    """Whether the C++ kernels are here or can be built; warns once where they cannot."""
    try:
        ops.build_cpp()
    except RuntimeError as error:
        warnings.warn(f"fastdit runs without its C++ kernels: {error}", stacklevel=2)
        return False
    return True


def _trajectory_backend(backend: str | None, x: Tensor, packed: PackedDiT) -> str:
    known = (*BACKENDS, "cpp")
    if backend not in (None, *known):
        raise unknown_name("backend", str(backend), known)
    if backend == "reference" or (backend is None and x.dtype == torch.float64):
        return "reference"
    where = packed.cfg, x.device, x.dtype
    if backend is not None:
        reason = trajectory_obstacle(backend, *where)
        if reason:
            raise ValueError(f"backend: {backend!r} {reason}; use backend='reference'")
        return backend
    if trajectory_obstacle("triton", *where) is None:
        return "triton"
    return "cpp" if trajectory_obstacle("cpp", *where) is None and has_cpp() else "reference"


def _sizes(cfg: DiTConfig) -> tuple[list[int], list[float]]:
    """A config as the kernels' `Shape` has it."""
    patch = cfg.patch_size**2
    sizes = [cfg.n_tokens, patch * cfg.in_channels, patch * cfg.out_channels, cfg.in_channels]
    sizes += [cfg.hidden, cfg.n_layers, cfg.n_heads, int(cfg.gelu == "tanh")]
    return sizes, [cfg.ln_eps, cfg.mlp_ln_eps or cfg.ln_eps]


def makes_noise(*tensors: Tensor) -> bool:
    """Whether `sampler_update` makes the noise of seeds in its own pass over such tensors."""
    return default_backend(*tensors) == "triton" or _suits_cpp(*tensors)


def _takes_cpp(*tensors: Tensor) -> bool:
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


def _suits_cpp(*tensors: Tensor) -> bool:
    """Not where a compiler looks on, which fuses plain PyTorch, nor where kernels are tested."""
    plain = not torch.compiler.is_compiling() and not _INTERPRET
    return plain and _takes_cpp(*tensors) and has_cpp()


def default_backend(*tensors: Tensor) -> str:
    """The backend that None stands for on these tensors, in most ops."""
    return "triton" if _obstacle_of(tensors) is None else "reference"


def _layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(shift[:, None], normed, 1 + scale[:, None]).to(scale.dtype)


def _runs_triton(backend: str | None, *tensors: Tensor) -> bool:
    """Whether the Triton op runs; raises where it was named and cannot."""
    if backend not in (None, *BACKENDS):
        raise unknown_name("backend", str(backend), BACKENDS)
    if backend == "reference":
        return False
    obstacle = _obstacle_of(tensors)
    if backend == "triton" and obstacle:
        raise ValueError(f"backend: 'triton' {obstacle}; use backend='reference'")
    return obstacle is None


def _obstacle_of(tensors: Sequence[Tensor]) -> str | None:
    wide = any(t.dtype == torch.float64 for t in tensors)
    return _obstacle(tensors[0].device, torch.float64 if wide else torch.float32)


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot run there, or None."""
    if dtype == torch.float64:
        return "computes in float32, got float64"
    if device.type != "cuda" and not (device.type == "cpu" and _INTERPRET):
        return f"expects tensors on CUDA (or TRITON_INTERPRET=1 for the CPU), got {device}"
    if not _HAS_TRITON:
        return "needs the package triton, which is not installed"
    if device.type == "cuda" and torch.version.hip is None:
        properties = torch.cuda.get_device_properties(device.index or 0)
        if properties.major < 8:
            return f"needs Ampere or later, got {properties.name}"
    return None
