"""The norms' kernels as PyTorch ops; `definitions.py` has all others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit.ops.registration import call, fresh, kernels, no_derivative, op


def _statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


def _modulated(x: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=scale.dtype)


def _dshift(scale: Tensor, shifted: bool) -> Tensor:
    return fresh(scale) if shifted else scale.new_empty(0)


def _backward_shapes(
    dh: Tensor,
    x: Tensor,
    scale: Tensor,
    mean_or_weight: Tensor,
    rstd: Tensor,
    shifted: bool = True,
    backend: str = "",
) -> tuple[Tensor, ...]:
    return fresh(x), fresh(scale), _dshift(scale, shifted)


def _gated_backward_shapes(
    dr: Tensor | None,
    dh: Tensor,
    r: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean_or_weight: Tensor,
    rstd: Tensor,
    shifted: bool = True,
    backend: str = "",
) -> tuple[Tensor, ...]:
    return *map(fresh, (r, y, gate, scale)), _dshift(scale, shifted)


def _save_norm(ctx: Any, inputs: Any, output: Any) -> None:
    x, scale, shift, *weight, _, ctx.backend = inputs
    _, *mean, rstd = output
    _save(ctx, shift, weight, [*mean, rstd], x, scale)


def _save_gated(ctx: Any, inputs: Any, output: Any) -> None:
    _, y, gate, scale, shift, *weight, _, ctx.backend = inputs
    r, _, *mean, rstd = output
    _save(ctx, shift, weight, [*mean, rstd], r, y, gate, scale)


def _save(
    ctx: Any, shift: Tensor | None, weight: list[Tensor], statistics: list[Tensor], *saved: Tensor
) -> None:
    ctx.shifted, ctx.rms = shift is not None, bool(weight)
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved, *weight, *statistics)


def _norm_gradients(ctx: Any, dh: Tensor | None, *_: None) -> Any:
    if dh is None:
        return (None,) * (6 if ctx.rms else 5)
    backward = rms_norm_modulate_backward if ctx.rms else layer_norm_modulate_backward
    return _in_order(ctx, *call(backward, dh, *ctx.saved_tensors, ctx.shifted, ctx.backend))


def _gated_gradients(ctx: Any, dr: Tensor | None, dh: Tensor | None, *_: None) -> Any:
    saved = r, _, _, scale, *_ = ctx.saved_tensors  # which may be unpacked once only
    if dh is None:  # the modulated output was not used
        if dr is None:
            return (None,) * (8 if ctx.rms else 7)
        dh = torch.zeros_like(r, dtype=scale.dtype)
    backward = gated_residual_layer_norm_modulate_backward
    if ctx.rms:
        backward = gated_residual_rms_norm_modulate_backward
    return _in_order(ctx, *call(backward, dr, dh, *saved, ctx.shifted, ctx.backend))


def _in_order(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients as autograd expects them: no shift, eps and backend have none."""
    *others, dshift = gradients[:-1] if ctx.rms else gradients
    dweight = gradients[-1:] if ctx.rms else ()
    return *others, dshift if ctx.shifted else None, *dweight, None, None


@op(
    shapes=lambda x, scale, *_: (_modulated(x, scale), _statistic(x), _statistic(x)),
    saves=_save_norm,
    gradients=_norm_gradients,
)
def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor | None, eps: float, backend: str = "triton"
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, mean, rstd)"""
    return kernels("adaln", backend).norm_modulate_fwd(x, scale, shift, eps)[1:]


@op(shapes=_backward_shapes, gradients=no_derivative)
def layer_norm_modulate_backward(
    dh: Tensor,
    x: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shifted: bool = True,
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dshift), dshift being empty where there was no shift"""
    backward = kernels("adaln", backend).norm_modulate_bwd
    dx, _, _, dscale, dshift, _ = backward(dh, x, scale, (mean, rstd), shifted=shifted)
    return dx, dscale, _or_empty(dshift, scale)


@op(
    shapes=lambda x, scale, *_: (_modulated(x, scale), _statistic(x)),
    saves=_save_norm,
    gradients=_norm_gradients,
)
def rms_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    eps: float,
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    """(h, rstd)"""
    _, h, _, rstd = kernels("adaln", backend).norm_modulate_fwd(x, scale, shift, eps, weight)
    return h, rstd


@op(
    shapes=lambda *given: (*_backward_shapes(*given), fresh(given[3])),
    gradients=no_derivative,
)
def rms_norm_modulate_backward(
    dh: Tensor,
    x: Tensor,
    scale: Tensor,
    weight: Tensor,
    rstd: Tensor,
    shifted: bool = True,
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dscale, dshift, dweight), dshift being empty where there was no shift"""
    backward = kernels("adaln", backend).norm_modulate_bwd
    dx, _, _, dscale, dshift, dweight = backward(
        dh, x, scale, (None, rstd), weight, shifted=shifted
    )
    return dx, dscale, _or_empty(dshift, scale), dweight


@op(
    shapes=lambda x, y, gate, scale, *_: (
        fresh(x),
        _modulated(x, scale),
        _statistic(x),
        _statistic(x),
    ),
    saves=_save_gated,
    gradients=_gated_gradients,
)
def gated_residual_layer_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r, h, mean, rstd)"""
    forward = kernels("adaln", backend).norm_modulate_fwd
    return forward(x, scale, shift, eps, None, (y, gate))


@op(shapes=_gated_backward_shapes, gradients=no_derivative)
def gated_residual_layer_norm_modulate_backward(
    dr: Tensor | None,
    dh: Tensor,
    r: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shifted: bool = True,
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, dgate, dscale, dshift), dshift being empty where there was no shift"""
    backward = kernels("adaln", backend).norm_modulate_bwd
    *others, dshift, _ = backward(dh, r, scale, (mean, rstd), None, (dr, y, gate), shifted)
    return *others, _or_empty(dshift, scale)


@op(
    shapes=lambda x, y, gate, scale, *_: (fresh(x), _modulated(x, scale), _statistic(x)),
    saves=_save_gated,
    gradients=_gated_gradients,
)
def gated_residual_rms_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    eps: float,
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor]:
    """(r, h, rstd)"""
    forward = kernels("adaln", backend).norm_modulate_fwd
    r, h, _, rstd = forward(x, scale, shift, eps, weight, (y, gate))
    return r, h, rstd


@op(
    shapes=lambda *given: (*_gated_backward_shapes(*given), fresh(given[6])),
    gradients=no_derivative,
)
def gated_residual_rms_norm_modulate_backward(
    dr: Tensor | None,
    dh: Tensor,
    r: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    weight: Tensor,
    rstd: Tensor,
    shifted: bool = True,
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, dgate, dscale, dshift, dweight), dshift being empty where there was no shift"""
    backward = kernels("adaln", backend).norm_modulate_bwd
    *others, dshift, dweight = backward(dh, r, scale, (None, rstd), weight, (dr, y, gate), shifted)
    return *others, _or_empty(dshift, scale), dweight


def _or_empty(dshift: Tensor | None, scale: Tensor) -> Tensor:
    """Return the gradient, or an empty tensor, since an op cannot return None."""
    return scale.new_empty(0) if dshift is None else dshift
