"""The ops a DiT is made of: shapes checked, numbers defined, the fastest way to run them chosen.

float64 always runs `fastdit.reference`. In lower precision every op computes in at least float32
inside LayerNorm and softmax; with mixed dtypes a residual keeps x's dtype and a modulated
output takes scale's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit import reference


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm without affine weights, then adaLN modulation: `LN(x) * (1 + scale) + shift`.

    Args:
        x: [B, N, D], any float dtype.
        scale: [B, D], any row stride (a `chunk` of one [B, 6D] tensor needs no copy).
        shift: [B, D], like scale.
        eps: added to the variance.

    Returns:
        [B, N, D] in scale's dtype.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.

    Source: Peebles & Xie 2023, section 3.2 (adaLN).
    """
    _check_tokens("x", x)
    _check_modulation(x, scale=scale, shift=shift)
    if x.dtype == torch.float64:
        return reference.layer_norm_modulate(x, scale, shift, eps)
    return _layer_norm_modulate(x, scale, shift, eps)


def gated_residual_layer_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Close one sub-layer and open the next: `r = x + gate * y`, `LN(r) * (1 + scale) + shift`.

    Args:
        x: [B, N, D], the residual stream, any float dtype.
        y: [B, N, D], the sub-layer's output.
        gate: [B, D], any row stride.
        scale: [B, D], the next sub-layer's.
        shift: [B, D], the next sub-layer's.
        eps: added to the variance.

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
    if x.dtype == torch.float64:
        return reference.gated_residual_layer_norm_modulate(x, y, gate, scale, shift, eps)
    residual = torch.addcmul(x, gate[:, None], y).to(x.dtype)
    return residual, _layer_norm_modulate(residual, scale, shift, eps)


def attention(qkv: Tensor, n_heads: int) -> Tensor:
    """Softmax attention, no mask, scaled by `head_dim ** -0.5`, on packed queries, keys, values.

    Args:
        qkv: [B, N, 3D], the thirds of one linear, each head-major.
        n_heads: number of heads; must divide D.

    Returns:
        [B, N, D] in qkv's dtype.

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
    if qkv.dtype == torch.float64:
        return reference.attention(qkv, n_heads)
    d = D3 // (3 * n_heads)
    q, k, v = qkv.view(B, N, 3, n_heads, d).permute(2, 0, 3, 1, 4)  # each [B, h, N, d]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D3 // 3)


def _layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(shift[:, None], normed, 1 + scale[:, None]).to(scale.dtype)


def _check_tokens(name: str, x: Tensor) -> None:
    if x.dim() != 3:
        raise ValueError(f"{name}: expected 3 dimensions [B, N, channels], got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected a float dtype, got {x.dtype}")


def _check_modulation(x: Tensor, **modulation: Tensor) -> None:
    expected = (x.shape[0], x.shape[2])
    for name, value in modulation.items():
        if value.shape != expected:
            raise ValueError(f"{name}: expected shape {list(expected)}, got {list(value.shape)}")
        if not value.is_floating_point():
            raise ValueError(f"{name}: expected a float dtype, got {value.dtype}")
