"""The ops a DiT is made of: shapes checked, numbers defined, the fastest way to run them chosen.

In lower precision every op computes in at least float32 inside LayerNorm and softmax; with mixed
dtypes a residual keeps x's dtype and a modulated output takes scale's.

Every op takes `backend`: "triton" runs the fused kernels, on CUDA or ROCm, or on the CPU where
TRITON_INTERPRET=1 was set before the import; it runs them or raises. "reference" is plain PyTorch,
which a compiler sees through. None, the default, is "triton" where it can run, and "reference"
elsewhere: on other devices, in float64, for heads wider than 128, on NVIDIA GPUs before Ampere.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit import ops, reference
from fastdit.errors import unknown_name
from fastdit.solvers import Guidance

BACKENDS = ("reference", "triton")

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_MAX_HEAD_DIM = 128
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    _check_tokens("x", x)
    _check_modulation(x, scale=scale, shift=shift)
    _check_device(x, scale=scale, shift=shift)
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
    _check_tokens("x", x)
    _check_tokens("y", y)
    if y.shape != x.shape:
        raise ValueError(f"y: expected x's shape {list(x.shape)}, got {list(y.shape)}")
    _check_modulation(x, gate=gate, scale=scale, shift=shift)
    _check_device(x, y=y, gate=gate, scale=scale, shift=shift)
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
    _check_tokens("qkv", qkv)
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
        backend: one of BACKENDS, or None.

    Returns:
        (x_next, x0), both of x's shape and dtype.

    Raises:
        ValueError: a shape, dtype, device or int step does not fit, or seeds and noise are both
            given; the message names the argument.

    Source: Ho et al. 2020, equation 11; Song et al. 2021 (DDIM), equation 12; Lu et al. 2022
    (DPM-Solver++), algorithm 2; Nichol & Dhariwal 2021, equation 15; Ho & Salimans 2022, eq. 6.
    """
    _check_update_tensors(x, model_out, guidance, x0_prev=x0_prev, noise=noise)
    step = _check_update_tables(x, coefficients, step)
    _check_seeds(x, seeds, noise)
    tensors = (x, model_out, *(t for t in (x0_prev, noise) if t is not None))
    if _runs_triton(backend, *tensors):
        scale, channels = (guidance.scale, guidance.channels) if guidance else (None, None)
        return ops.sampler_update(
            x, model_out, coefficients, step, x0_prev, seeds, noise, scale, channels
        )
    return reference.sampler_update(
        x, model_out, coefficients, step, x0_prev, seeds, noise, guidance
    )


def default_backend(*tensors: Tensor) -> str:
    """The backend that None stands for on these tensors."""
    return "triton" if _obstacle(tensors) is None else "reference"


def _layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(shift[:, None], normed, 1 + scale[:, None]).to(scale.dtype)


def _runs_triton(backend: str | None, *tensors: Tensor) -> bool:
    """Whether the Triton op runs; raises where it was named and cannot."""
    if backend not in (None, *BACKENDS):
        raise unknown_name("backend", str(backend), BACKENDS)
    if backend == "reference":
        return False
    obstacle = _obstacle(tensors)
    if backend == "triton" and obstacle:
        raise ValueError(f"backend: 'triton' {obstacle}; use backend='reference'")
    return obstacle is None


def _obstacle(tensors: Sequence[Tensor]) -> str | None:
    """Why Triton cannot run on these, or None."""
    if any(t.dtype == torch.float64 for t in tensors):
        return "computes in float32, got float64"
    device = tensors[0].device
    if device.type != "cuda" and not (device.type == "cpu" and _INTERPRET):
        return f"expects tensors on CUDA (or TRITON_INTERPRET=1 for the CPU), got {device}"
    if not _HAS_TRITON:
        return "needs the package triton, which is not installed"
    if device.type == "cuda" and torch.version.hip is None:
        properties = torch.cuda.get_device_properties(device.index or 0)
        if properties.major < 8:
            return f"needs Ampere or later, got {properties.name}"
    return None


def _check_tokens(name: str, x: Tensor) -> None:
    if x.dim() != 3:
        raise ValueError(f"{name}: expected 3 dimensions [B, N, channels], got {list(x.shape)}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name}: expected a float dtype, got {x.dtype}")


def _check_modulation(x: Tensor, **modulation: Tensor) -> None:
    expected = (x.shape[0], x.shape[2])
    for name, value in modulation.items():
        if value.shape != expected:
            raise ValueError(f"{name}: expected shape {list(expected)}, got {list(value.shape)}")
        if value.dtype not in _DTYPES:
            raise ValueError(f"{name}: expected a float dtype, got {value.dtype}")


def _check_update_tensors(
    x: Tensor, model_out: Tensor, guidance: Guidance | None, **like_x: Tensor | None
) -> None:
    if x.dim() not in (3, 4):
        raise ValueError(f"x: expected [B, P, C] or [B, C, H, W], got {list(x.shape)}")
    given = {name: value for name, value in like_x.items() if value is not None}
    for name, value in {"x": x, "model_out": model_out, **given}.items():
        if value.dtype not in _DTYPES:
            raise ValueError(f"{name}: expected a float dtype, got {value.dtype}")
    for name, value in given.items():
        if value.shape != x.shape:
            raise ValueError(f"{name}: expected x's shape {list(x.shape)}, got {list(value.shape)}")
    dim = 1 if x.dim() == 4 else 2
    eps, learned = list(x.shape), list(x.shape)
    learned[dim] *= 2
    if guidance is not None:
        eps[0] = learned[0] = 2 * x.shape[0]
        if guidance.channels is not None and not 0 < guidance.channels <= x.shape[dim]:
            raise ValueError(
                f"guidance: expected 1 to {x.shape[dim]} channels, got {guidance.channels}"
            )
    if list(model_out.shape) not in (eps, learned):
        raise ValueError(
            f"model_out: expected shape {eps}, or {learned} with a learned range"
            f"{'' if guidance is None else ' (2B rows for guidance)'}, got {list(model_out.shape)}"
        )
    _check_device(x, model_out=model_out, **given)


def _check_update_tables(x: Tensor, coefficients: Tensor, step: Tensor | int) -> Tensor:
    """Returns step as a tensor."""
    S, columns = coefficients.shape[0] if coefficients.dim() else 0, len(reference.COEFFICIENTS)
    if coefficients.shape != (S, columns) or coefficients.dtype not in _DTYPES:
        raise ValueError(
            f"coefficients: expected floats of shape [S, {columns}], got {coefficients.dtype} of "
            f"{list(coefficients.shape)}"
        )
    if not isinstance(step, Tensor):
        if not 0 <= step < S:
            raise ValueError(f"step: expected a row of the {S} coefficients, got {step}")
        step = torch.tensor(step, device=x.device)
    if step.dtype != torch.int64 or step.dim():
        raise ValueError(
            f"step: expected an int64 scalar, got {step.dtype} of shape {list(step.shape)}"
        )
    _check_device(x, coefficients=coefficients, step=step)
    return step


def _check_seeds(x: Tensor, seeds: Tensor | None, noise: Tensor | None) -> None:
    if seeds is None:
        return
    if noise is not None:
        raise ValueError("noise: expected None where seeds are given, got both")
    if seeds.dtype != torch.int64 or seeds.shape != (x.shape[0], 2):
        raise ValueError(
            f"seeds: expected int64 of shape [{x.shape[0]}, 2], got {seeds.dtype} of "
            f"{list(seeds.shape)}"
        )
    _check_device(x, seeds=seeds)


def _check_device(x: Tensor, **others: Tensor) -> None:
    for name, value in others.items():
        if value.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}, got {value.device}")
