"""Attention on packed queries, keys and values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit import reference
from fastdit.ops import checks, definitions, registration, text_attention
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
    d = checks.head_dim(qkv, n_heads)
    chosen = choose("attention", backend, qkv, d)
    qkv = qkv.to(_product_dtype(qkv))
    if qkv.shape[1] == 1 and qkv.dtype != torch.float64:
        return qkv[..., 2 * d * n_heads :].clone()
    if chosen == "triton":
        return registration.call(definitions.attention, qkv, n_heads)[0]
    if qkv.dtype == torch.float64:
        return reference.attention(qkv, n_heads)
    return _attend(*qkv.unflatten(-1, (3, n_heads, d)).unbind(2))


def qk_norm_rope(
    qkv: Tensor,
    n_heads: int,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    rope: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Norm each head's queries and keys, then turn them by their positions; values stay.

    Args:
        qkv: [B, N, 3D], the thirds of one linear, each head-major.
        n_heads: number of heads h; must divide D. The head dim is d = D / h. Triton takes head
            dims up to 128.
        q_weight: [d], the weight of the queries' norm; None norms neither queries nor keys.
        q_bias: [d]; with it the norm is a LayerNorm, without it an RMSNorm.
        k_weight: [d], of the keys; given where q_weight is.
        k_bias: [d], of the keys; given where q_bias is.
        rope: [2, N, d/2] cosines and sines, as `rope_table` returns them, which get no gradient;
            None turns nothing.
        eps: added to the variance or to the mean square.
        backend: "triton", "reference" or None.

    Returns:
        [B, N, 3D] in qkv's dtype. Norms and turns are computed in at least float32.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.

    Source: Henry et al. 2020 (query-key normalization); Su et al. 2021 (RoFormer).
    """
    weights = q_weight, q_bias, k_weight, k_bias
    d = checks.check_head_parts(qkv, n_heads, weights, rope)
    chosen = choose("qk_norm_rope", backend, qkv, d, *weights, rope)
    if q_weight is None and rope is None:
        return qkv.clone()
    if chosen == "triton":
        return registration.call(definitions.qk_norm_rope, qkv, n_heads, *weights, rope, eps)
    if qkv.dtype == torch.float64:
        exact = (None if t is None else t.double() for t in (*weights, rope))
        q_weight, q_bias, k_weight, k_bias, rope = exact
        return reference.qk_norm_rope(qkv, n_heads, q_weight, q_bias, k_weight, k_bias, rope, eps)
    heads = _normed_and_turned(qkv.unflatten(-1, (3, n_heads, d)), weights, rope, eps)
    return torch.stack(heads, dim=2).view(qkv.shape)


def qk_attention(
    qkv: Tensor,
    n_heads: int,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    rope: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Return `attention(qk_norm_rope(...))`, which is what a block computes between its linears.

    Plain PyTorch attends to the normed and turned heads as they are, while the kernels pack them
    again in between. Without weights and rope this is `attention`.

    Args:
        qkv: as those of `qk_norm_rope`, like all arguments but the last.
        backend: "triton" or "reference" for both ops, or None.

    Returns:
        [B, N, D] in qkv's dtype, or autocast's.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    weights = q_weight, q_bias, k_weight, k_bias
    if all(part is None for part in (*weights, rope)):  # as in most models, checked there
        return attention(qkv, n_heads, backend)
    d = checks.check_head_parts(qkv, n_heads, weights, rope)
    given = qkv, d, *weights, rope
    chosen = choose("attention", backend, qkv, d), choose("qk_norm_rope", backend, *given)
    if "triton" in chosen or qkv.dtype == torch.float64 or qkv.shape[1] == 1:
        return attention(qk_norm_rope(qkv, n_heads, *weights, rope, eps, backend), n_heads, backend)
    heads = _normed_and_turned(qkv.unflatten(-1, (3, n_heads, d)), weights, rope, eps)
    return _attend(*(t.to(_product_dtype(qkv)) for t in heads))


def cross_attention(
    q: Tensor, kv: Tensor, n_heads: int, lengths: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Return softmax attention of queries to packed keys and values of ragged length.

    Args:
        q: [B, N, D], head-major.
        kv: [B, M, 2D], the halves of one linear, keys and values, each head-major.
        n_heads: number of heads; must divide D. Triton takes head dims up to 128.
        lengths: [B] int64, how many of the M keys each image attends to, at least 1; None for all.
            Values are checked on a CPU only. What lies past them gets a gradient of zero.
        backend: "triton", "reference" or None.

    Returns:
        [B, N, D] in q's dtype, or autocast's.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.

    Source: Vaswani et al. 2017, equation 1.
    """
    d = checks.check_cross_attention(q, kv, n_heads, lengths)
    chosen = choose("cross_attention", backend, q, d, kv)
    q, kv = (t.to(_product_dtype(q)) for t in (q, kv))
    if chosen == "triton":
        return registration.call(text_attention.cross_attention, q, kv, n_heads, lengths)[0]
    if q.dtype == torch.float64:
        return reference.cross_attention(q, kv, n_heads, lengths)
    counts = _read(lengths)
    if lengths is not None and counts is None:
        kv = _without_padding(kv, lengths)
    k, v = kv.unflatten(-1, (2, n_heads, d)).unbind(2)
    q = q.unflatten(-1, (n_heads, d))
    if counts is None:
        return _attend(q, k, v, None if lengths is None else _mask(lengths, k.shape[1]))
    parts = [_attend(q[i:j], k[i:j, :n], v[i:j, :n]) for i, j, n in _runs(counts)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def joint_attention(
    qkv_image: Tensor,
    qkv_text: Tensor,
    n_heads: int,
    norms: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] = (None,) * 4,
    lengths: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return softmax attention of an image and a text to both of them together.

    Args:
        qkv_image: [B, N, 3D], the thirds of one linear, each head-major.
        qkv_text: [B, M, 3D], likewise.
        n_heads: number of heads h; must divide D. The head dim is d = D / h.
        norms: weights [d] of the RMSNorms of the image's queries and keys and of the text's queries
            and keys; all four, or None.
        lengths: [B] int64, how many of the M text tokens are the prompt's, at least 1; None for
            all. The rest is padding: nothing attends to it, what is returned for it is zero, and
            its gradient is zero.
        eps: added to the mean square of a norm.
        backend: "triton", "reference" or None.

    Returns:
        ([B, N, D], [B, M, D]) of image and text, in their dtype, or autocast's.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.

    Source: Esser et al. 2024 (Stable Diffusion 3), section 4.
    """
    d = checks.check_joint_attention(qkv_image, qkv_text, n_heads, norms, lengths)
    chosen = choose("joint_attention", backend, qkv_image, d, qkv_text, *norms)
    dtype, (N, M) = _product_dtype(qkv_image), (qkv_image.shape[1], qkv_text.shape[1])
    if chosen == "triton":
        op = text_attention.joint_attention
        both = qkv_image.to(dtype), qkv_text.to(dtype)
        return registration.call(op, *both, n_heads, *norms, lengths, eps)[:2]
    if dtype == torch.float64:
        exact = tuple(None if weight is None else weight.double() for weight in norms)
        return reference.joint_attention(qkv_image, qkv_text, n_heads, exact, lengths, eps)  # type: ignore[arg-type]
    if lengths is not None:
        qkv_text = _without_padding(qkv_text, lengths)
    streams = []
    for qkv, weights in ((qkv_image, norms[:2]), (qkv_text, norms[2:])):
        heads, given = qkv.unflatten(-1, (3, n_heads, d)), (weights[0], None, weights[1], None)
        streams.append([t.to(dtype) for t in _normed_and_turned(heads, given, None, eps)])
    # The text comes last, so that its padding does.
    q, k, v = (torch.cat(parts, dim=1) for parts in zip(*streams, strict=True))
    if (counts := _read(lengths)) is not None:
        parts = []
        for i, j, n in _runs(counts):
            out = _attend(*(t[i:j, : N + n] for t in (q, k, v)))
            parts.append(F.pad(out, (0, 0, 0, M - n)) if n < M else out)
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
    else:
        out = _attend(q, k, v, None if lengths is None else _mask(lengths + N, N + M))
    image, text = out[:, :N], out[:, N:]
    if lengths is not None and counts is None:
        text = _without_padding(text, lengths)
    return image, text


def _read(lengths: Tensor | None) -> list[int] | None:
    """Return lengths as integers where that costs nothing: on a CPU, outside torch.compile."""
    if lengths is None or lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return lengths.tolist() or None


def _runs(counts: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (first, end, count) of neighbours in a batch that have the same count."""
    first = 0
    for count, own in itertools.groupby(counts):
        end = first + len(list(own))
        yield first, end, count
        first = end


def _mask(lengths: Tensor, M: int) -> Tensor:
    """Return which of M keys count: [B, 1, 1, M]."""
    return (torch.arange(M, device=lengths.device) < lengths[:, None])[:, None, None]


def _without_padding(text: Tensor, lengths: Tensor) -> Tensor:
    """Return text [B, M, C] with zeros past its lengths: NaN times a weight of zero is NaN."""
    own = _mask(lengths, text.shape[1])[:, 0, 0, :, None]
    return torch.where(own, text, 0.0)


def _product_dtype(qkv: Tensor) -> torch.dtype:
    """Return the dtype of attention's products: qkv's, or under autocast autocast's."""
    kind = qkv.device.type
    # "meta" has no autocast.
    if qkv.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return qkv.dtype
    return torch.get_autocast_dtype(kind)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention by PyTorch: q [B, N, h, d], k, v [B, M, h, d] -> [B, N, h * d]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def _normed_and_turned(
    qkv: Tensor, weights: tuple[Tensor | None, ...], rope: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of qkv [B, N, 3, h, d], the first two normed and turned."""
    q, k, v = qkv.unbind(2)  # each [B, N, h, d]
    q_weight, q_bias, k_weight, k_bias = weights
    q = _norm_and_turn(q, q_weight, q_bias, rope, eps)
    return q, _norm_and_turn(k, k_weight, k_bias, rope, eps), v


def _norm_and_turn(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, rope: Tensor | None, eps: float
) -> Tensor:
    """Norm each head of x [B, N, h, d] and turn it, in at least float32, and return x's dtype."""
    y = x if x.dtype == torch.float64 else x.float()
    if weight is not None and bias is not None:
        y = F.layer_norm(y, y.shape[-1:], weight.to(y.dtype), bias.to(y.dtype), eps)
    elif weight is not None:
        y = F.rms_norm(y, y.shape[-1:], weight.to(y.dtype), eps)
    return (y if rope is None else _turn(y, *rope.to(y.dtype).unsqueeze(2))).to(x.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of x [B, N, h, d] by angles of cosines and sines [N, 1, d/2]."""
    pairs = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # Inductor fuses real arithmetic, and no complex
        a, b = pairs.unbind(-1)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    # In eager mode one complex product takes half the time.
    if pairs.stride(-1) != 1 or any(n % 2 for n in (x.storage_offset(), *pairs.stride()[:-1])):
        pairs = pairs.clone(memory_format=torch.contiguous_format)
    turned = torch.view_as_complex(pairs) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2)
