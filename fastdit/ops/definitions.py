"""The kernels as PyTorch ops, but for norms and attention to texts: schema, shapes, gradients.

`fastdit.functional` calls these ops for "triton" and "cpp", after it has checked the arguments.
They trace under `torch.compile(fullgraph=True)`, and a kernel's module is imported when an op first
runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdit.ops.registration import call, fresh, kernels, no_derivative, op


def _save_attention(ctx: Any, inputs: Any, output: Any) -> None:
    qkv, ctx.n_heads = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, out, lse)


def _attention_gradients(ctx: Any, dout: Tensor | None, _: None) -> Any:
    if dout is None:
        return None, None
    return call(attention_backward, dout, *ctx.saved_tensors, ctx.n_heads), None


def _attention_shapes(qkv: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    B, N, D3 = qkv.shape
    lse = qkv.new_empty((B, n_heads, N), dtype=torch.float32)
    return qkv.new_empty((B, N, D3 // 3)), lse


@op(shapes=_attention_shapes, saves=_save_attention, gradients=_attention_gradients)
def attention(qkv: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """(out, lse)"""
    return kernels("attention", "triton").attention_fwd(qkv, n_heads)


@op(shapes=lambda dout, qkv, *_: fresh(qkv), gradients=no_derivative)
def attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_heads: int) -> Tensor:
    """dqkv"""
    return kernels("attention", "triton").attention_bwd(dout, qkv, out, lse, n_heads)


def _save_qk(ctx: Any, inputs: Any, output: Any) -> None:
    qkv, ctx.n_heads, *tensors, ctx.eps = inputs
    ctx.save_for_backward(qkv, *tensors)


def _qk_gradients(ctx: Any, dout: Tensor) -> Any:
    qkv, *weights, rope = ctx.saved_tensors
    backward = qk_norm_rope_backward
    dqkv, dweights = call(backward, dout, qkv, ctx.n_heads, *weights, rope, ctx.eps)
    rows = iter(dweights.unbind())
    gradients = (None if w is None else next(rows).to(w.dtype) for w in weights)
    return dqkv, None, *gradients, None, None


@op(shapes=lambda qkv, *_: fresh(qkv), saves=_save_qk, gradients=_qk_gradients)
def qk_norm_rope(
    qkv: Tensor,
    n_heads: int,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    rope: Tensor | None,
    eps: float,
) -> Tensor:
    weights = q_weight, q_bias, k_weight, k_bias
    return kernels("qk_norm_rope", "triton").qk_norm_rope_fwd(qkv, n_heads, weights, rope, eps)


def _qk_backward_shapes(
    dout: Tensor, qkv: Tensor, n_heads: int, *weights_rope_eps: Any
) -> tuple[Tensor, Tensor]:
    rows = sum(w is not None for w in weights_rope_eps[:4])
    d = qkv.shape[-1] // (3 * n_heads)
    return fresh(qkv), qkv.new_empty((rows, d), dtype=torch.float32)


@op(shapes=_qk_backward_shapes, gradients=no_derivative)
def qk_norm_rope_backward(
    dout: Tensor,
    qkv: Tensor,
    n_heads: int,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    rope: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(dqkv, dweights [K, d]: a row for each of the K weights that are not None)"""
    weights = q_weight, q_bias, k_weight, k_bias
    launcher = kernels("qk_norm_rope", "triton").qk_norm_rope_bwd
    return launcher(dout, qkv, n_heads, weights, rope, eps)


def _halved(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _save_swiglu(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradients(ctx: Any, dout: Tensor) -> Any:
    return call(swiglu_backward, dout, *ctx.saved_tensors)


@op(shapes=_halved, saves=_save_swiglu, gradients=_swiglu_gradients)
def swiglu(x: Tensor) -> Tensor:
    return kernels("swiglu", "triton").swiglu_fwd(x)


@op(shapes=lambda dout, x: fresh(x), gradients=no_derivative)
def swiglu_backward(dout: Tensor, x: Tensor) -> Tensor:
    """dx"""
    return kernels("swiglu", "triton").swiglu_bwd(dout, x)


def _update(
    backend: str, scale: float | None, channels: int | None, out: Any, *given: Tensor | None
) -> Any:
    guidance = None if scale is None else (scale, channels)
    return kernels("sampling", backend).sampler_update(*given, guidance, out=out)


@op(shapes=lambda x, *_: (fresh(x), fresh(x)), gradients=no_derivative)
def sampler_update(
    x: Tensor,
    model_out: Tensor,
    coefficients: Tensor,
    step: Tensor,
    x0_prev: Tensor | None,
    seeds: Tensor | None,
    noise: Tensor | None,
    scale: float | None,
    channels: int | None,
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    """(x_next, x0)"""
    given = x, model_out, coefficients, step, x0_prev, seeds, noise
    return _update(backend, scale, channels, None, *given)


@op(shapes=lambda *_: None, mutates=("x_next", "x0"))
def sampler_update_out(
    x: Tensor,
    model_out: Tensor,
    coefficients: Tensor,
    step: Tensor,
    x0_prev: Tensor | None,
    seeds: Tensor | None,
    noise: Tensor | None,
    scale: float | None,
    channels: int | None,
    backend: str,
    x_next: Tensor,
    x0: Tensor,
) -> None:
    given = x, model_out, coefficients, step, x0_prev, seeds, noise
    _update(backend, scale, channels, (x_next, x0), *given)


@op(
    shapes=lambda seeds, steps, n: seeds.new_empty((len(steps), len(seeds), n), dtype=torch.float32)
)
def normal(seeds: Tensor, steps: Tensor, elements: int) -> Tensor:
    return kernels("sampling", "cpp").normal(seeds, steps, elements)


@op(shapes=lambda x, weight, *_: x.new_empty((len(x), len(weight)), dtype=torch.float32))
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None = None) -> Tensor:
    return kernels("linear", "cpp").linear(x, weight, bias, gelu)


@op(shapes=lambda x, *_: (fresh(x), fresh(x)), gradients=no_derivative)
def trajectory(
    x: Tensor,
    x0: Tensor,
    weights: list[Tensor],
    modulation: list[Tensor],
    coefficients: Tensor,
    first: int,
    seeds: Tensor | None,
    noise: Tensor | None,
    guidance: list[float],
    shape: list[float],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(x_next, x0_next)

    weights are the tensors of a `DiTWeights`, or for "triton" one that holds them all; modulation
    is [by_step, rows], and by_label where there is one; guidance is [scale, channels], or empty;
    shape is the kernels' `Shape`, its integers first.
    """
    by_step, rows, *by_label = modulation
    scale, channels = guidance or (1.0, 0)
    return kernels("trajectory", backend).trajectory(
        x=x,
        x0=x0,
        weights=weights if backend == "cpp" else weights[0],
        by_step=by_step,
        by_label=by_label[0] if by_label else None,
        rows=rows,
        coefficients=coefficients,
        first=first,
        seeds=seeds,
        noise=noise,
        guidance=(scale, int(channels)) if guidance else None,
        shape=_shape(shape),
    )


def trajectory_obstacle(sizes: list[int], eps: list[float]) -> str | None:
    """Return why the kernel in Triton takes no model of such a shape, or None."""
    return kernels("trajectory", "triton").obstacle(_shape([*sizes, *eps]))


def build_cpp() -> None:
    """Build the C++ kernels unless they are in the cache.

    Raises:
        RuntimeError: they cannot be built.
    """
    kernels("library", "cpp").library()


def cpp_instruction_set() -> str:
    """Return the instruction set of the C++ kernels, which must be here: "plain" is any CPU's."""
    return kernels("instruction_set", "cpp").instruction_set()


def _shape(values: Sequence[float]) -> Any:
    from fastdit.kernels.shape import Shape

    *integers, tanh_gelu, eps, mlp_eps, qk_norm_eps = values
    return Shape(*map(int, integers), bool(tanh_gelu), eps, mlp_eps, qk_norm_eps)
