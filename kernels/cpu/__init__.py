"""The whole sampling loop of a small DiT in one call of C++; see `trajectory`.

`problem.h` says what the parts share, `vector.h` holds the mathematics, `product.h` the matrix
products, `network.h` a forward, `loop.h` the steps; `plain.cpp`, `avx2.cpp` and `avx512.cpp` are
these for an instruction set each, and `trajectory.cpp` gives images to threads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastdit.kernels.cpu.build import BuildError, library
from fastdit.kernels.shape import Shape

__all__ = ["MAX_HIDDEN", "MAX_TOKENS", "BuildError", "library", "obstacle", "trajectory"]

MAX_HIDDEN = 512
MAX_TOKENS = 256

_INTEGERS = (
    "tokens features out_features channels hidden layers heads tanh_gelu images steps first "
    "step_rows guided threads"
).split()
_FLOATS = "eps mlp_eps scale".split()
_POINTERS = "weights by_step by_label rows coefficients seeds noise x x0".split()


class _Problem(ctypes.Structure):
    """`Problem` of problem.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_float) for name in _FLOATS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


def obstacle(shape: Shape) -> str | None:
    """Why the kernel does not take a model, or None."""
    if shape.hidden > MAX_HIDDEN:
        return f"takes a hidden size up to {MAX_HIDDEN}, got {shape.hidden}"
    if shape.tokens > MAX_TOKENS:
        return f"takes up to {MAX_TOKENS} tokens, got {shape.tokens}"
    return None


def trajectory(
    x: Tensor,
    x0: Tensor,
    weights: Tensor,
    by_step: Tensor,
    by_label: Tensor | None,
    rows: Tensor,
    coefficients: Tensor,
    first: int,
    seeds: Tensor | None,
    noise: Tensor | None,
    guidance: tuple[float, int | None] | None,
    shape: Shape,
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor]:
    """K steps on the CPU, in float32; arguments as `fastdit.functional.trajectory`'s, who checks.

    An image's bits depend on neither its batch, nor its place in it, nor the number of threads,
    which is PyTorch's.

    Args:
        x, x0: [B, P, C].
        weights: [n], as `Shape` lays them out.
        by_step: [K, 1 or R, W].
        by_label: [R, W], or None.
        rows: [B] int64, or with guidance [2B].
        coefficients: [K, 10].
        first: how many steps were taken before.
        seeds: [B, 2] int64, or None.
        noise: [K, B, P, C], or None.
        guidance: (scale, channels or None for all), or None.
        shape: the model's.
        instruction_set: "plain", "avx2" or "avx512"; None is the best that the CPU has.

    Returns:
        (x, x0), new and contiguous.

    Raises:
        BuildError: the kernels cannot be built.
        ValueError: the CPU has not that instruction set.
        MemoryError: there is too little.
    """
    scale, channels = guidance or (1.0, 0)
    x, x0 = (t.detach().clone(memory_format=torch.contiguous_format) for t in (x, x0))
    given = dict(by_step=by_step, by_label=by_label, weights=weights)
    floats = {
        name: None if t is None else t.detach().to(torch.float32).contiguous()
        for name, t in dict(given, coefficients=coefficients, noise=noise).items()
    }
    integers = {
        name: None if t is None else t.contiguous()
        for name, t in dict(rows=rows, seeds=seeds).items()
    }
    tensors = dict(floats, **integers, x=x, x0=x0)
    problem = _Problem(
        **{name: getattr(shape, name) for name in _INTEGERS[:8]},
        images=len(x),
        steps=len(coefficients),
        first=first,
        step_rows=by_step.shape[1],
        guided=shape.channels if channels is None else channels,
        threads=torch.get_num_threads(),
        eps=shape.eps,
        mlp_eps=shape.mlp_eps,
        scale=scale,
        **{name: None if t is None else t.data_ptr() for name, t in tensors.items()},
    )
    name = None if instruction_set is None else instruction_set.encode()
    code = library().fastdit_trajectory(ctypes.byref(problem), name)
    if code == 1:
        raise MemoryError(
            f"trajectory: too little memory for {len(x)} images; take a smaller batch"
        )
    if code == 2:
        raise ValueError(f"instruction_set: expected one this CPU has, got {instruction_set!r}")
    return x, x0


def instruction_set() -> str:
    """The best that this CPU has: "plain", "avx2" or "avx512"."""
    return library().fastdit_instruction_set().decode()


def peak_flop_per_second(repeats: int = 10_000_000) -> float:
    """What multiply-adds on registers alone reach, on PyTorch's number of threads."""
    return library().fastdit_peak(torch.get_num_threads(), repeats)
