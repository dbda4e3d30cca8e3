"""Launchers of adaln.cpp, with the arguments of those in `fastdit.kernels.adaln`, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit.kernels.cpu.build import call, library
from fastdit.kernels.cpu.structs import AdaLN, AdaLNBackward
from fastdit.kernels.tensors import contiguous, rows_of

# The number of tokens over which one thread sums the modulation's gradients. It is fixed, so that
# sums do not depend on the number of threads.
_CHUNK = 64


def norm_modulate_fwd(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    weight: Tensor | None = None,
    residual: tuple[Tensor, Tensor] | None = None,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Run the forward: RMSNorm if there is a weight, else LayerNorm.

    Args:
        residual: (y, gate) of the gated op.
        instruction_set: "plain", "avx2" or "avx512"; None is the best that the CPU has.

    Returns:
        (r [B, N, D], h [B, N, D], mean [B, N], rstd [B, N]): r is x itself without a gate, and
        RMSNorm's mean is None.

    Raises:
        BuildError: the kernels cannot be built.
        ValueError: the CPU does not have that instruction set.
    """
    B, N, D = x.shape
    y, gate = residual or (None, None)
    x, y, weight = x.contiguous(), contiguous(y), contiguous(weight)
    gate, gate_stride = rows_of(gate)
    (scale, scale_stride), (shift, shift_stride) = rows_of(scale), rows_of(shift)
    r, h = x if gate is None else x.new_empty(x.shape), x.new_empty(x.shape)
    mean, rstd = x.new_empty((B, N)) if weight is None else None, x.new_empty((B, N))
    strides = dict(gate_stride=gate_stride, scale_stride=scale_stride, shift_stride=shift_stride)
    given = dict(x=x, y=y, gate=gate, scale=scale, shift=shift, weight=weight)
    results = dict(r=r, h=h, mean=mean, rstd=rstd)
    problem = AdaLN(images=B, tokens=N, hidden=D, eps=eps, **strides, **given, **results)
    call(library().fastdit_adaln, problem, instruction_set)
    return r, h, mean, rstd


def norm_modulate_bwd(
    dh: Tensor,
    r: Tensor,
    scale: Tensor,
    statistics: tuple[Tensor | None, Tensor],
    weight: Tensor | None = None,
    residual: tuple[Tensor | None, Tensor, Tensor] | None = None,
    shifted: bool = True,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Run the backward.

    Args:
        statistics: (mean, rstd).
        residual: (dr or None, y, gate) of the gated op.
        shifted: whether there was a shift.
        instruction_set: as for the forward.

    Returns:
        (dx, dy, dgate, dscale, dshift, dweight); each is None where the forward had no such input.

    Raises:
        BuildError, ValueError: as for the forward.
    """
    B, N, D = r.shape
    (mean, rstd), (dr, y, gate) = statistics, residual or (None, None, None)
    dr, dh, r, y, mean, rstd = map(contiguous, (dr, dh, r, y, mean, rstd))
    weight = contiguous(weight)
    (gate, gate_stride), (rows, scale_stride) = rows_of(gate), rows_of(scale)
    dx, dy = r.new_empty(r.shape), None if y is None else r.new_empty(r.shape)
    partial = r.new_empty((B, -(-N // _CHUNK), 3, D))
    sizes = dict(images=B, tokens=N, hidden=D, chunk_tokens=_CHUNK, shifted=int(shifted))
    strides = dict(gate_stride=gate_stride, scale_stride=scale_stride)
    given = dict(dr=dr, dh=dh, r=r, y=y, gate=gate, scale=rows, weight=weight, mean=mean, rstd=rstd)
    problem = AdaLNBackward(**sizes, **strides, **given, dx=dx, dy=dy, partial=partial)
    call(library().fastdit_adaln_backward, problem, instruction_set)
    dscale, dshift, dgate = (_alone(sums) for sums in partial.sum(1).unbind(1))
    dweight = None
    if weight is not None:
        dweight = torch.addcmul(dscale, dscale, scale).sum(0)  # of dscale before the weight
        dscale = dscale * weight
    return dx, dy, dgate if gate is not None else None, dscale, dshift if shifted else None, dweight


def _alone(sums: Tensor) -> Tensor:
    return sums.clone(memory_format=torch.contiguous_format)
