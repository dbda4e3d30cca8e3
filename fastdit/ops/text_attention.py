"""Attention of an image and a text as PyTorch ops: schema, shapes, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit.ops.registration import call, fresh, kernels, no_derivative, op


def _cross_shapes(
    q: Tensor, kv: Tensor, n_heads: int, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, N, _ = q.shape
    return fresh(q), q.new_empty((B, n_heads, N), dtype=torch.float32)


def _save_cross(ctx: Any, inputs: Any, output: Any) -> None:
    q, kv, ctx.n_heads, lengths = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, kv, out, lse, lengths)


def _cross_gradients(ctx: Any, dout: Tensor | None, _: None) -> Any:
    if dout is None:
        return None, None, None, None
    *given, lengths = ctx.saved_tensors
    return *call(cross_attention_backward, dout, *given, ctx.n_heads, lengths), None, None


@op(shapes=_cross_shapes, saves=_save_cross, gradients=_cross_gradients)
def cross_attention(
    q: Tensor, kv: Tensor, n_heads: int, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse)"""
    return kernels("text_attention", "triton").cross_attention_fwd(q, kv, n_heads, lengths)


@op(shapes=lambda dout, q, kv, *_: (fresh(q), fresh(kv)), gradients=no_derivative)
def cross_attention_backward(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    n_heads: int,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(dq, dkv)"""
    launcher = kernels("text_attention_backward", "triton").cross_attention_bwd
    return launcher(dout, q, kv, out, lse, n_heads, lengths)


def _third(qkv: Tensor) -> Tensor:
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3))


def _joint_shapes(
    qkv_image: Tensor, qkv_text: Tensor, n_heads: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = qkv_image.shape[1] + qkv_text.shape[1]
    lse = qkv_image.new_empty((qkv_image.shape[0], n_heads, tokens), dtype=torch.float32)
    return _third(qkv_image), _third(qkv_text), lse


def _save_joint(ctx: Any, inputs: Any, output: Any) -> None:
    qkv_image, qkv_text, ctx.n_heads, *norms, lengths, ctx.eps = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(qkv_image, qkv_text, *output, *norms, lengths)


def _joint_gradients(ctx: Any, dimage: Tensor, dtext: Tensor, _: None) -> Any:
    *given, q_image, k_image, q_text, k_text, lengths = ctx.saved_tensors
    norms = q_image, k_image, q_text, k_text
    backward, rest = joint_attention_backward, (ctx.n_heads, *norms, lengths, ctx.eps)
    dqkv_image, dqkv_text, dnorms = call(backward, dimage, dtext, *given, *rest)
    rows = iter(dnorms.unbind())
    gradients = (None if w is None else next(rows).to(w.dtype) for w in norms)
    return dqkv_image, dqkv_text, None, *gradients, None, None


@op(shapes=_joint_shapes, saves=_save_joint, gradients=_joint_gradients)
def joint_attention(
    qkv_image: Tensor,
    qkv_text: Tensor,
    n_heads: int,
    q_image: Tensor | None,
    k_image: Tensor | None,
    q_text: Tensor | None,
    k_text: Tensor | None,
    lengths: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(image, text, lse)

    q_image to k_text are the weights of the norms.
    """
    norms = q_image, k_image, q_text, k_text
    launcher = kernels("text_attention", "triton").joint_attention_fwd
    return launcher(qkv_image, qkv_text, n_heads, norms, lengths, eps)


def _joint_backward_shapes(
    dimage: Tensor, dtext: Tensor, qkv_image: Tensor, qkv_text: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, _, n_heads, *norms, _, _ = rest
    rows, d = sum(w is not None for w in norms), qkv_image.shape[2] // (3 * n_heads)
    dnorms = qkv_image.new_empty((rows, d), dtype=torch.float32)
    return fresh(qkv_image), fresh(qkv_text), dnorms


@op(shapes=_joint_backward_shapes, gradients=no_derivative)
def joint_attention_backward(
    dimage: Tensor,
    dtext: Tensor,
    qkv_image: Tensor,
    qkv_text: Tensor,
    image: Tensor,
    text: Tensor,
    lse: Tensor,
    n_heads: int,
    q_image: Tensor | None,
    k_image: Tensor | None,
    q_text: Tensor | None,
    k_text: Tensor | None,
    lengths: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dqkv_image, dqkv_text, dnorms [K, d]: a row for each of the K = 0 or 4 weights)"""
    norms = q_image, k_image, q_text, k_text
    outs = (dimage, dtext), (qkv_image, qkv_text), (image, text), lse
    launcher = kernels("text_attention_backward", "triton").joint_attention_bwd
    return launcher(*outs, n_heads, norms, lengths, eps)
