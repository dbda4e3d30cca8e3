"""Attention on packed queries, keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit import reference
from fastdit.ops import checks, definitions, registration
from fastdit.ops.dispatch import choose


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


def qk_norm_rope(
    qkv: Tensor,
    n_heads: int,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    rope: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Norm each head's queries and keys, then turn them by their positions; values stay.

    Args:
        qkv: [B, N, 3D], the thirds of one linear, each head-major.
        n_heads: number of heads h; must divide D. The head dim is d = D / h.
        q_weight: [d], the weight of the queries' norm; None norms neither queries nor keys.
        q_bias: [d]; with it the norm is a LayerNorm, without it an RMSNorm.
        k_weight: [d], of the keys.
        k_bias: [d], of the keys.
        rope: [2, N, d/2] cosines and sines, as `rope_table` returns them; None turns nothing.
        eps: added to the variance or to the mean square.

    Returns:
        [B, N, 3D] in qkv's dtype.

    Source: Henry et al. 2020 (query-key normalization); Su et al. 2021 (RoFormer).
    """
    return reference.qk_norm_rope(qkv, n_heads, q_weight, q_bias, k_weight, k_bias, rope, eps)
