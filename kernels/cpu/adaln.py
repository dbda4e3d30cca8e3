"""The launchers of adaln.cpp, with the arguments of `fastdit.kernels.adaln`'s, in float32."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastdit.kernels.cpu.build import call, library

# Tokens whose part in the modulation's gradients is summed by one thread. Fixed, so that sums do
# not depend on how many threads there are.
_CHUNK = 64

_INTEGERS = "images tokens hidden gate_stride scale_stride shift_stride threads".split()
_POINTERS = "x y gate scale shift r h mean rstd".split()
_BACKWARD_INTEGERS = "images tokens hidden gate_stride scale_stride chunk_tokens threads".split()
_BACKWARD_POINTERS = "dr dh r y gate scale mean rstd dx dy partial".split()


class _AdaLN(ctypes.Structure):
    """`AdaLN` of problem.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


class _AdaLNBackward(ctypes.Structure):
    """`AdaLNBackward` of problem.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _BACKWARD_INTEGERS),
        *((name, ctypes.c_void_p) for name in _BACKWARD_POINTERS),
    ]


def layer_norm_modulate_fwd(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward; y and gate make it the gated residual's.

    Args:
        x: [B, N, D], like y.
        scale: [B, D], like shift and gate.
        instruction_set: "plain", "avx2" or "avx512"; None is the best that the CPU has.

    Returns:
        (r [B, N, D], h [B, N, D], mean [B, N], rstd [B, N]): r is x itself where there is no gate.

    Raises:
        BuildError: the kernels cannot be built.
        ValueError: the CPU has not that instruction set.
    """
    B, N, D = x.shape
    x, y = x.contiguous(), None if y is None else y.contiguous()
    gate, scale, shift = (None if m is None else _unit_stride(m) for m in (gate, scale, shift))
    r, h = x if gate is None else x.new_empty(x.shape), x.new_empty(x.shape)
    mean, rstd = (x.new_empty((B, N)) for _ in range(2))
    strides = (0 if gate is None else gate.stride(0), scale.stride(0), shift.stride(0))
    tensors = (x, y, gate, scale, shift, r, h, mean, rstd)
    problem = _AdaLN(B, N, D, *strides, torch.get_num_threads(), eps, *map(_pointer, tensors))
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
    """The backward.

    Args:
        dh: [B, N, D], gradient of h.
        r: [B, N, D], the forward's r (x where there was no gate).
        scale: [B, D].
        mean: [B, N], of the forward.
        rstd: [B, N], of the forward.
        residual: (dr or None, y, gate) of the gated op.
        instruction_set: as for the forward.

    Returns:
        (dx, dy, dgate, dscale, dshift); dy and dgate None where there is no gate.

    Raises:
        BuildError: the kernels cannot be built.
        ValueError: the CPU has not that instruction set.
    """
    B, N, D = r.shape
    dr, y, gate = residual if residual else (None, None, None)
    dh, r, mean, rstd = (t.contiguous() for t in (dh, r, mean, rstd))
    dr, y = (None if t is None else t.contiguous() for t in (dr, y))
    scale, gate = _unit_stride(scale), None if gate is None else _unit_stride(gate)
    dx, dy = r.new_empty(r.shape), None if y is None else r.new_empty(r.shape)
    partial = r.new_empty((B, -(-N // _CHUNK), 3, D))
    strides = (0 if gate is None else gate.stride(0), scale.stride(0))
    tensors = (dr, dh, r, y, gate, scale, mean, rstd, dx, dy, partial)
    problem = _AdaLNBackward(
        *(B, N, D, *strides, _CHUNK, torch.get_num_threads()), *map(_pointer, tensors)
    )
    call(library().fastdit_adaln_backward, problem, instruction_set)
    sums = partial.sum(1)
    dscale, dshift, dgate = (
        sums[:, i].clone(memory_format=torch.contiguous_format) for i in range(3)
    )
    return dx, dy, None if gate is None else dgate, dscale, dshift


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _unit_stride(modulation: Tensor) -> Tensor:
    """[B, D] whose channels lie side by side; rows may lie anywhere."""
    return modulation if modulation.stride(-1) == 1 else modulation.contiguous()
