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


def layer_norm_modulate_fwd(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the forward, with the gated residual if y and gate are given.

    Args:
        instruction_set: "plain", "avx2" or "avx512"; None is the best that the CPU has.

    Returns:
        (r [B, N, D], h [B, N, D], mean [B, N], rstd [B, N]): r is x itself without a gate.

    Raises:
        BuildError: the kernels cannot be built.
        ValueError: the CPU does not have that instruction set.
    """
    B, N, D = x.shape
    x, y = x.contiguous(), contiguous(y)
    gate, gate_stride = rows_of(gate)
    (scale, scale_stride), (shift, shift_stride) = rows_of(scale), rows_of(shift)
    r, h = x if gate is None else x.new_empty(x.shape), x.new_empty(x.shape)
    mean, rstd = (x.new_empty((B, N)) for _ in range(2))
    strides = dict(gate_stride=gate_stride, scale_stride=scale_stride, shift_stride=shift_stride)
    given = dict(x=x, y=y, gate=gate, scale=scale, shift=shift)
    results = dict(r=r, h=h, mean=mean, rstd=rstd)
    problem = AdaLN(images=B, tokens=N, hidden=D, eps=eps, **strides, **given, **results)
    call(library().fastdit_adaln, problem, instruction_set)
    return r, h, mean, rstd


def layer_norm_modulate_bwd(
    dh: Tensor,
    r: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual: tuple[Tensor | None, Tensor, Tensor] | None = None,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Run the backward.

    Args:
        instruction_set: as for the forward.

    Returns:
        (dx, dy, dgate, dscale, dshift); dy and dgate are None without a gate.

    Raises:
        BuildError, ValueError: as for the forward.
    """
    B, N, D = r.shape
    dr, y, gate = residual if residual else (None, None, None)
    dr, dh, r, y, mean, rstd = map(contiguous, (dr, dh, r, y, mean, rstd))
    (gate, gate_stride), (scale, scale_stride) = rows_of(gate), rows_of(scale)
    dx, dy = r.new_empty(r.shape), None if y is None else r.new_empty(r.shape)
    partial = r.new_empty((B, -(-N // _CHUNK), 3, D))
    sizes = dict(images=B, tokens=N, hidden=D, chunk_tokens=_CHUNK)
    strides = dict(gate_stride=gate_stride, scale_stride=scale_stride)
    given = dict(dr=dr, dh=dh, r=r, y=y, gate=gate, scale=scale, mean=mean, rstd=rstd)
    problem = AdaLNBackward(**sizes, **strides, **given, dx=dx, dy=dy, partial=partial)
    call(library().fastdit_adaln_backward, problem, instruction_set)
    sums = partial.sum(1)
    dscale, dshift, dgate = (
        sums[:, i].clone(memory_format=torch.contiguous_format) for i in range(3)
    )
    return dx, dy, None if gate is None else dgate, dscale, dshift
