"""The ops of a DiT's blocks, by their formulas."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    """`LN(x) * (1 + scale) + shift`: x [B, N, D], scale and shift [B, D] -> [B, N, D]."""
    modulated = F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None])
    return (modulated if shift is None else modulated + shift[:, None]).to(scale.dtype)


def gated_residual_layer_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`r = x + gate * y` and `LN(r) * (1 + scale) + shift`: both [B, N, D]."""
    residual = (x + gate[:, None] * y).to(x.dtype)
    return residual, layer_norm_modulate(residual, scale, shift, eps)


def rms_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor | None, weight: Tensor, eps: float
) -> Tensor:
    """`RMSNorm(x) * weight * (1 + scale) + shift`: x [B, N, D], weight [D] -> [B, N, D]."""
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
    modulated = normed * (1 + scale[:, None])
    return (modulated if shift is None else modulated + shift[:, None]).to(scale.dtype)


def gated_residual_rms_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`r = x + gate * y`, and its modulated RMSNorm: both [B, N, D]."""
    residual = (x + gate[:, None] * y).to(x.dtype)
    return residual, rms_norm_modulate(residual, scale, shift, weight, eps)


def attention(qkv: Tensor, n_heads: int) -> Tensor:
    """Softmax attention without a mask on packed qkv [B, N, 3D] -> [B, N, D]."""
    B, N, D3 = qkv.shape
    d = D3 // (3 * n_heads)
    q, k, v = qkv.view(B, N, 3, n_heads, d).permute(2, 0, 3, 1, 4)  # each [B, h, N, d]
    weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2).reshape(B, N, D3 // 3)


def rope_table(head_dim: int, grid: tuple[int, int], context: int = 0) -> Tensor:
    """Cosines and sines of two-dimensional rotary positions: [2, context + N, d/2] float32.

    With d the head dim, pair i < d/4 of a head turns by `row / 10000^(i / (d / 4))`, and pair
    d/4 + i by the same of the column. Context tokens, which come first, do not turn. (Su et al.
    2021, RoFormer; the table is that of LightningDiT and JiT.)
    """
    omega = 10000.0 ** -(torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
    row, column = torch.meshgrid(*[torch.arange(side).double() for side in grid], indexing="ij")
    angles = torch.cat([p.flatten()[:, None] * omega for p in (row, column)], dim=1)  # [N, d/2]
    angles = torch.cat([angles.new_zeros(context, angles.shape[1]), angles])
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn each pair (x[2i], x[2i + 1]) by the angles of `rope_table`: x [..., N, d]."""
    cos, sin = rope.to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def head_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of x [..., d] where there is a bias, RMSNorm where there is only a weight."""
    if weight is None:
        return x
    if bias is not None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


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
    """Norm and turn the queries and keys of packed qkv [B, N, 3D], head by head -> [B, N, 3D]."""
    B, N, D3 = qkv.shape
    q, k, v = (
        qkv.view(B, N, 3, n_heads, D3 // (3 * n_heads)).transpose(1, 3).unbind(2)
    )  # each [B, h, N, d]
    q, k = head_norm(q, q_weight, q_bias, eps), head_norm(k, k_weight, k_bias, eps)
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    return torch.stack([q, k, v.to(q.dtype)], dim=2).transpose(1, 3).reshape(B, N, D3).to(qkv.dtype)


def cross_attention(q: Tensor, kv: Tensor, n_heads: int, lengths: Tensor | None = None) -> Tensor:
    """Softmax attention of q [B, N, D] to the first `lengths` of packed kv [B, M, 2D] -> [B, N, D].

    (Vaswani et al. 2017, equation 1; without lengths all M keys.)
    """
    kv = _without_padding(kv, lengths)
    q = q.unflatten(-1, (n_heads, -1)).transpose(1, 2)  # [B, h, N, d]
    k, v = kv.unflatten(-1, (2, n_heads, -1)).transpose(1, 3).unbind(2)  # each [B, h, M, d]
    return _softmax_attention(q, k, v, lengths)


def joint_attention(
    qkv_image: Tensor,
    qkv_text: Tensor,
    n_heads: int,
    norms: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] = (None,) * 4,
    lengths: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of an image and a text to both of them: ([B, N, D], [B, M, D]).

    Each stream has RMSNorms of its own, of queries and of keys. A text's tokens past its length
    are attended to by nothing, and nothing is returned for them: zeros. (Esser et al. 2024, Stable
    Diffusion 3, section 4.)
    """
    N, M = qkv_image.shape[1], qkv_text.shape[1]
    qkv_text = _without_padding(qkv_text, lengths)
    streams = []
    for qkv, weights in ((qkv_image, norms[:2]), (qkv_text, norms[2:])):
        q, k, v = qkv.unflatten(-1, (3, n_heads, -1)).transpose(1, 3).unbind(2)  # [B, h, N, d]
        q, k = (
            head_norm(x, w, None, eps).to(v.dtype) for x, w in zip((q, k), weights, strict=True)
        )
        streams.append((q, k, v))
    q, k, v = (torch.cat(parts, dim=2) for parts in zip(*streams, strict=True))
    out = _softmax_attention(q, k, v, None if lengths is None else N + lengths)
    image, text = out.split([N, M], dim=1)
    return image, _without_padding(text, lengths)


def _without_padding(text: Tensor, lengths: Tensor | None) -> Tensor:
    """text [B, M, C], with zeros past its lengths, whatever stood there."""
    if lengths is None:
        return text
    own = torch.arange(text.shape[1], device=lengths.device) < lengths[:, None]  # [B, M]
    return torch.where(own[:, :, None], text, 0.0)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    """q [B, h, N, d], k, v [B, h, M, d], of which the first `lengths` keys count -> [B, N, D]."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if lengths is not None:
        past = torch.arange(k.shape[2], device=lengths.device) >= lengths[:, None]  # [B, M]
        scores = scores.masked_fill(past[:, None, None], -torch.inf)
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)


def swiglu(x: Tensor) -> Tensor:
    """`silu(a) * b` of the halves a and b of x [..., 2M] -> [..., M] (Shazeer 2020, equation 6)."""
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b
