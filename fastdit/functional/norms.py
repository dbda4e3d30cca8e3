"""Norms with adaLN modulation, alone and after a gated residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit import reference
from fastdit.ops import checks, definitions, registration
from fastdit.ops.dispatch import choose


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor | None, eps: float = 1e-5, backend: str | None = None
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


def rms_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, eps: float = 1e-6
) -> Tensor:
    """Return RMSNorm with a learned weight, then modulated.

    It is `x / rms(x) * weight * (1 + scale) + shift`, with `rms(x)^2 = mean(x^2) + eps`.

    Args:
        x: [B, N, D], any float dtype.
        scale: [B, D], of any row stride.
        shift: [B, D], like scale; None adds nothing.
        weight: [D].
        eps: added to the mean square.

    Returns:
        [B, N, D] in scale's dtype.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.

    Source: Zhang & Sennrich 2019, equation 4; Peebles & Xie 2023, section 3.2 (adaLN).
    """
    return reference.rms_norm_modulate(x, scale, shift, weight, eps)


def gated_residual_rms_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    eps: float = 1e-6,
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

    Returns:
        (r, modulated): both [B, N, D]; r in x's dtype, modulated in scale's.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.
    """
    return reference.gated_residual_rms_norm_modulate(x, y, gate, scale, shift, weight, eps)


def _layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(shift[:, None], normed, 1 + scale[:, None]).to(scale.dtype)
