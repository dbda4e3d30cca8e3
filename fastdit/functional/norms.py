"""Norms with adaLN modulation, alone and after a gated residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit import reference
from fastdit.ops import checks, norms, registration
from fastdit.ops.dispatch import choose


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor | None, eps: float = 1e-5, backend: str | None = None
) -> Tensor:
    """Return LayerNorm without affine weights, then modulated: `LN(x) * (1 + scale) + shift`.

    Args:
        x: [B, N, D], any float dtype.
        scale: [B, D], of any row stride, so that a `chunk` of one [B, 6D] tensor needs no copy.
        shift: [B, D], like scale; None adds nothing.
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
        return registration.call(norms.layer_norm_modulate, x, scale, shift, eps, chosen)[0]
    if x.dtype == torch.float64:
        return reference.layer_norm_modulate(x, scale, shift, eps)
    return _layer_norm_modulate(x, scale, shift, eps)


def gated_residual_layer_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """End one sub-layer and begin the next: `r = x + gate * y`, `LN(r) * (1 + scale) + shift`.

    Args:
        x: [B, N, D], the residual stream, any float dtype.
        y: [B, N, D], the sub-layer's output.
        gate: [B, D], any row stride.
        scale: [B, D], the next sub-layer's.
        shift: [B, D], the next sub-layer's; None adds nothing.
        eps: added to the variance.
        backend: "triton", "cpp" (all tensors in float32 on a CPU), "reference" or None.

    Returns:
        (r, modulated): both [B, N, D]; r in x's dtype, modulated in scale's.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.

    Source: Peebles & Xie 2023, figure 3 (adaLN-Zero).
    """
    checks.check_residual(x, y)
    checks.check_modulation(x, gate=gate, scale=scale, shift=shift)
    chosen = choose("gated_residual_layer_norm_modulate", backend, x, y, gate, scale, shift)
    if chosen != "reference":
        residual, modulated, _, _ = registration.call(
            norms.gated_residual_layer_norm_modulate, x, y, gate, scale, shift, eps, chosen
        )
        return residual, modulated
    if x.dtype == torch.float64:
        return reference.gated_residual_layer_norm_modulate(x, y, gate, scale, shift, eps)
    residual = gated_residual(x, y, gate)
    return residual, _layer_norm_modulate(residual, scale, shift, eps)


def rms_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Return RMSNorm with a learned weight, then modulated.

    It is `x / rms(x) * weight * (1 + scale) + shift`, with `rms(x)^2 = mean(x^2) + eps`.

    Args:
        x: [B, N, D], any float dtype.
        scale: [B, D], of any row stride.
        shift: [B, D], like scale; None adds nothing.
        weight: [D].
        eps: added to the mean square.
        backend: "triton", "cpp" (all tensors in float32 on a CPU), "reference" or None.

    Returns:
        [B, N, D] in scale's dtype.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.

    Source: Zhang & Sennrich 2019, equation 4; Peebles & Xie 2023, section 3.2 (adaLN).
    """
    checks.check_tokens("x", x)
    checks.check_modulation(x, scale=scale, shift=shift)
    checks.check_norm_weight(x, weight)
    chosen = choose("rms_norm_modulate", backend, x, scale, weight, shift)
    if chosen != "reference":
        return registration.call(norms.rms_norm_modulate, x, scale, shift, weight, eps, chosen)[0]
    if x.dtype == torch.float64:
        return reference.rms_norm_modulate(x, scale, shift, weight, eps)
    return _rms_norm_modulate(x, scale, shift, weight, eps)


def gated_residual_rms_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """End one sub-layer and begin the next: `r = x + gate * y`, and r's modulated RMSNorm.

    Args:
        x: [B, N, D], the residual stream, any float dtype.
        y: [B, N, D], the sub-layer's output.
        gate: [B, D], any row stride.
        scale: [B, D], the next sub-layer's.
        shift: [B, D], the next sub-layer's; None adds nothing.
        weight: [D], of the next sub-layer's norm.
        eps: added to the mean square.
        backend: "triton", "cpp" (all tensors in float32 on a CPU), "reference" or None.

    Returns:
        (r, modulated): both [B, N, D]; r in x's dtype, modulated in scale's.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.

    Source: Peebles & Xie 2023, figure 3 (adaLN-Zero), with the norm of `rms_norm_modulate`.
    """
    checks.check_residual(x, y)
    checks.check_modulation(x, gate=gate, scale=scale, shift=shift)
    checks.check_norm_weight(x, weight)
    chosen = choose("gated_residual_rms_norm_modulate", backend, x, y, gate, scale, weight, shift)
    if chosen != "reference":
        op, given = norms.gated_residual_rms_norm_modulate, (x, y, gate, scale, shift, weight)
        residual, modulated, _ = registration.call(op, *given, eps, chosen)
        return residual, modulated
    if x.dtype == torch.float64:
        return reference.gated_residual_rms_norm_modulate(x, y, gate, scale, shift, weight, eps)
    residual = gated_residual(x, y, gate)
    return residual, _rms_norm_modulate(residual, scale, shift, weight, eps)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Return `x + gate * y`: x, y [B, N, D], gate [B, D] -> [B, N, D] in x's dtype."""
    return torch.addcmul(x, gate[:, None], y).to(x.dtype)


def _layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    return _modulate(F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale, shift, scale.dtype)


def _rms_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, eps: float
) -> Tensor:
    # The weight is multiplied into [B, D], which saves a pass over [B, N, D] in each direction.
    normed = F.rms_norm(x, x.shape[-1:], eps=eps)
    return _modulate(normed, weight * (1 + scale), shift, scale.dtype)


def _modulate(x: Tensor, factor: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    factor = factor[:, None]
    modulated = x * factor if shift is None else torch.addcmul(shift[:, None], x, factor)
    return modulated.to(dtype)
