"""The kernels as PyTorch ops: schema, shapes, gradients.

`fastdit.functional` calls these ops for "triton" and "cpp", after it has checked the arguments.
They trace under `torch.compile(fullgraph=True)`, and a kernel's module is imported when an op first
runs it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdit.ops.registration import call, implements, no_derivative, shapes

_define = torch.library.define


_define(
    "fastdit::layer_norm_modulate",
    "(Tensor x, Tensor scale, Tensor shift, float eps, str backend='triton')"
    " -> (Tensor h, Tensor mean, Tensor rstd)",
)
_define(
    "fastdit::layer_norm_modulate_backward",
    "(Tensor dh, Tensor x, Tensor scale, Tensor mean, Tensor rstd, str backend='triton')"
    " -> (Tensor dx, Tensor dscale, Tensor dshift)",
)
_define(
    "fastdit::gated_residual_layer_norm_modulate",
    "(Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift, float eps,"
    " str backend='triton') -> (Tensor r, Tensor h, Tensor mean, Tensor rstd)",
)
_define(
    "fastdit::gated_residual_layer_norm_modulate_backward",
    "(Tensor? dr, Tensor dh, Tensor r, Tensor y, Tensor gate, Tensor scale, Tensor mean,"
    " Tensor rstd, str backend='triton')"
    " -> (Tensor dx, Tensor dy, Tensor dgate, Tensor dscale, Tensor dshift)",
)
_define("fastdit::normal", "(Tensor seeds, Tensor steps, int elements) -> Tensor")
_define("fastdit::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_define("fastdit::attention", "(Tensor qkv, int n_heads) -> (Tensor out, Tensor lse)")
_define(
    "fastdit::attention_backward",
    "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int n_heads) -> Tensor dqkv",
)
_define(
    "fastdit::trajectory",
    "(Tensor x, Tensor x0, Tensor weights, Tensor[] modulation, Tensor coefficients, int first,"
    " Tensor? seeds, Tensor? noise, float[] guidance, float[] shape, str backend)"
    " -> (Tensor x_next, Tensor x0_next)",
)
_define(
    "fastdit::sampler_update",
    "(Tensor x, Tensor model_out, Tensor coefficients, Tensor step, Tensor? x0_prev,"
    " Tensor? seeds, Tensor? noise, float? scale, int? channels, str backend='triton')"
    " -> (Tensor x_next, Tensor x0)",
)
_define(
    "fastdit::sampler_update_out",
    "(Tensor x, Tensor model_out, Tensor coefficients, Tensor step, Tensor? x0_prev,"
    " Tensor? seeds, Tensor? noise, float? scale, int? channels, str backend,"
    " Tensor(a!) x_next, Tensor(b!) x0) -> ()",
)


@implements("fastdit::layer_norm_modulate")
def _layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, backend: str = "triton"
) -> Any:
    return _kernels("adaln", backend).layer_norm_modulate_fwd(x, scale, shift, eps)[1:]


@shapes("fastdit::layer_norm_modulate")
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float, backend: str = "triton") -> Any:
    return (x.new_empty(x.shape, dtype=scale.dtype), *_statistics(x))


@implements("fastdit::layer_norm_modulate_backward")
def _layer_norm_modulate_backward(
    dh: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, backend: str = "triton"
) -> Any:
    kernels = _kernels("adaln", backend)
    dx, _, _, dscale, dshift = kernels.layer_norm_modulate_bwd(dh, x, scale, mean, rstd)
    return dx, dscale, dshift


@shapes("fastdit::layer_norm_modulate_backward")
def _(dh: Tensor, x: Tensor, scale: Tensor, *_: Any) -> Any:
    return _fresh(x), _fresh(scale), _fresh(scale)


def _save_layer_norm(ctx: Any, inputs: Any, output: Any) -> None:
    x, scale, _, _, ctx.backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, mean, rstd)


def _layer_norm_gradients(ctx: Any, dh: Tensor | None, *_: None) -> Any:
    if dh is None:
        return (None,) * 5
    backward = torch.ops.fastdit.layer_norm_modulate_backward.default
    return *call(backward, dh, *ctx.saved_tensors, ctx.backend), None, None


torch.library.register_autograd(
    "fastdit::layer_norm_modulate", _layer_norm_gradients, setup_context=_save_layer_norm
)
torch.library.register_autograd("fastdit::layer_norm_modulate_backward", no_derivative)


@implements("fastdit::gated_residual_layer_norm_modulate")
def _gated(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    backend: str = "triton",
) -> Any:
    return _kernels("adaln", backend).layer_norm_modulate_fwd(x, scale, shift, eps, y, gate)


@shapes("fastdit::gated_residual_layer_norm_modulate")
def _(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, *_: Any) -> Any:
    return (_fresh(x), x.new_empty(x.shape, dtype=scale.dtype), *_statistics(x))


@implements("fastdit::gated_residual_layer_norm_modulate_backward")
def _gated_backward(
    dr: Tensor | None,
    dh: Tensor,
    r: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    backend: str = "triton",
) -> Any:
    kernels = _kernels("adaln", backend)
    return kernels.layer_norm_modulate_bwd(dh, r, scale, mean, rstd, (dr, y, gate))


@shapes("fastdit::gated_residual_layer_norm_modulate_backward")
def _(
    dr: Tensor | None, dh: Tensor, r: Tensor, y: Tensor, gate: Tensor, scale: Tensor, *_: Any
) -> Any:
    return tuple(_fresh(t) for t in (r, y, gate, scale, scale))


def _save_gated(ctx: Any, inputs: Any, output: Any) -> None:
    _, y, gate, scale, _, _, ctx.backend = inputs
    r, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(r, y, gate, scale, mean, rstd)


def _gated_gradients(ctx: Any, dr: Tensor | None, dh: Tensor | None, *_: None) -> Any:
    r, y, gate, scale, mean, rstd = ctx.saved_tensors
    if dh is None:  # the modulated output was not used
        if dr is None:
            return (None,) * 7
        dh = torch.zeros_like(r, dtype=scale.dtype)
    backward = torch.ops.fastdit.gated_residual_layer_norm_modulate_backward.default
    return *call(backward, dr, dh, r, y, gate, scale, mean, rstd, ctx.backend), None, None


torch.library.register_autograd(
    "fastdit::gated_residual_layer_norm_modulate", _gated_gradients, setup_context=_save_gated
)
torch.library.register_autograd(
    "fastdit::gated_residual_layer_norm_modulate_backward", no_derivative
)


@implements("fastdit::attention")
def _attention(qkv: Tensor, n_heads: int) -> Any:
    return _kernels("attention", "triton").attention_fwd(qkv, n_heads)


@shapes("fastdit::attention")
def _(qkv: Tensor, n_heads: int) -> Any:
    B, N, D3 = qkv.shape
    lse = qkv.new_empty((B, n_heads, N), dtype=torch.float32)
    return qkv.new_empty((B, N, D3 // 3)), lse


@implements("fastdit::attention_backward")
def _attention_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_heads: int
) -> Tensor:
    return _kernels("attention", "triton").attention_bwd(dout, qkv, out, lse, n_heads)


@shapes("fastdit::attention_backward")
def _(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_heads: int) -> Tensor:
    return _fresh(qkv)


def _save_attention(ctx: Any, inputs: Any, output: Any) -> None:
    qkv, ctx.n_heads = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, out, lse)


def _attention_gradients(ctx: Any, dout: Tensor | None, _: None) -> Any:
    if dout is None:
        return None, None
    backward = torch.ops.fastdit.attention_backward.default
    return call(backward, dout, *ctx.saved_tensors, ctx.n_heads), None


torch.library.register_autograd(
    "fastdit::attention", _attention_gradients, setup_context=_save_attention
)
torch.library.register_autograd("fastdit::attention_backward", no_derivative)


@implements("fastdit::sampler_update")
def _sampler_update(
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
    out: tuple[Tensor, Tensor] | None = None,
) -> Any:
    guidance = None if scale is None else (scale, channels)
    given = x, model_out, coefficients, step, x0_prev, seeds, noise, guidance
    return _kernels("sampling", backend).sampler_update(*given, out=out)


@shapes("fastdit::sampler_update")
def _(x: Tensor, *_: Any) -> Any:
    return _fresh(x), _fresh(x)


torch.library.register_autograd("fastdit::sampler_update", no_derivative)


@implements("fastdit::sampler_update_out")
def _sampler_update_out(*given: Any) -> None:
    *arguments, x_next, x0 = given
    _sampler_update(*arguments, out=(x_next, x0))


@shapes("fastdit::sampler_update_out")
def _(*_: Any) -> None:
    return None


@implements("fastdit::normal")
def _normal(seeds: Tensor, steps: Tensor, elements: int) -> Tensor:
    return _kernels("sampling", "cpp").normal(seeds, steps, elements)


@shapes("fastdit::normal")
def _(seeds: Tensor, steps: Tensor, elements: int) -> Tensor:
    return seeds.new_empty((len(steps), len(seeds), elements), dtype=torch.float32)


@implements("fastdit::linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _kernels("linear", "cpp").linear(x, weight, bias)


@shapes("fastdit::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((len(x), len(weight)))


@implements("fastdit::trajectory")
def _trajectory(
    x: Tensor,
    x0: Tensor,
    weights: Tensor,
    modulation: list[Tensor],  # by_step, rows, and by_label where there is one
    coefficients: Tensor,
    first: int,
    seeds: Tensor | None,
    noise: Tensor | None,
    guidance: list[float],  # scale and channels, or nothing
    shape: list[float],  # the integers and the floats of the kernels' `Shape`
    backend: str,
) -> Any:
    by_step, rows, *by_label = modulation
    scale, channels = guidance or (1.0, 0)
    return _kernels("trajectory", backend).trajectory(
        x=x,
        x0=x0,
        weights=weights,
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


@shapes("fastdit::trajectory")
def _(x: Tensor, *_: Any) -> Any:
    return _fresh(x), _fresh(x)


torch.library.register_autograd("fastdit::trajectory", no_derivative)


def trajectory_obstacle(backend: str, sizes: list[int], eps: list[float]) -> str | None:
    """Return why the kernel of "cpp" or "triton" takes no model of such a shape, or None."""
    return _kernels("trajectory", backend).obstacle(_shape([*sizes, *eps]))


def build_cpp() -> None:
    """Build the C++ kernels unless they are in the cache.

    Raises:
        RuntimeError: they cannot be built.
    """
    _kernels("library", "cpp").library()


# Cached, since an import statement would take time at every launch.
@functools.cache
def _kernels(of: str, backend: str) -> Any:
    """Import and return the module that launches an op: one of `kernels`, or `kernels.cpu`."""
    if backend == "cpp":
        of = "cpu.adaln" if of == "adaln" else "cpu"
    return importlib.import_module(f"fastdit.kernels.{of}")


def _shape(values: Sequence[float]) -> Any:
    from fastdit.kernels.shape import Shape

    *integers, tanh_gelu, eps, mlp_eps = values
    return Shape(*map(int, integers), bool(tanh_gelu), eps, mlp_eps)


layer_norm_modulate = torch.ops.fastdit.layer_norm_modulate.default
gated_residual_layer_norm_modulate = torch.ops.fastdit.gated_residual_layer_norm_modulate.default
attention = torch.ops.fastdit.attention.default
sampler_update = torch.ops.fastdit.sampler_update.default
sampler_update_out = torch.ops.fastdit.sampler_update_out.default
trajectory = torch.ops.fastdit.trajectory.default
normal = torch.ops.fastdit.normal.default
linear = torch.ops.fastdit.linear.default


def _fresh(like: Tensor) -> Tensor:
    """Return what a launcher allocates: a contiguous tensor of like's shape and dtype."""
    return like.new_empty(like.shape)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return mean, rstd
