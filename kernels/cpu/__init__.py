"""C++ kernels for CPUs: the whole sampling loop of a DiT in one call, and its single ops.

`structs.h` and `problem.h` declare what the parts share, `team.h` has the threads that share an
image, `vector.h` the mathematics, `product.h` the matrix products, `update.h` a solver's step,
`network.h` the forward, `loop.h` the loop over steps, `linear.h` a linear by itself, and `adaln.h`
the norms with modulation.
`plain.cpp`, `avx2.cpp`, `avx512.cpp` and `avx512_bf16.cpp` compile these headers for one
instruction set each. `trajectory.cpp` and `adaln.cpp` are the C interface, and distribute images
and rows over threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.kernels.columns import COLUMNS
from fastdit.kernels.cpu.build import BuildError, call, library
from fastdit.kernels.cpu.structs import Linear, Problem, Update
from fastdit.kernels.shape import Shape
from fastdit.kernels.tensors import contiguous

__all__ = [
    "BuildError",
    "instruction_set",
    "instruction_sets",
    "library",
    "linear",
    "normal",
    "peak_flop_per_second",
    "sampler_update",
    "trajectory",
]


_BFLOAT16 = "avx512_bf16"  # the instruction set for bfloat16


def trajectory(
    x: Tensor,
    x0: Tensor,
    weights: Sequence[Tensor],
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
    """Take K steps of a sampling loop; `fastdit.functional.trajectory` checks arguments.

    Products are of bfloat16 if the weights are, and everything else is float32. An image's bits
    depend neither on its batch and its place there, nor on the number of threads, which is at most
    PyTorch's.

    Args:
        x ... shape: as for `fastdit.kernels.trajectory.trajectory`, but weights are the tensors
            that `Shape` lists, and are read where they are.
        instruction_set: "plain", "avx2" or "avx512"; None is the best that the CPU has. bfloat16
            weights have an instruction set of their own.

    Returns:
        (x, x0) after the last step, new and contiguous.

    Raises:
        BuildError: the kernels cannot be built.
        ValueError: the CPU does not have that instruction set.
        MemoryError: memory does not suffice.
    """
    scale, channels = guidance or (1.0, 0)
    x, x0 = (t.detach().clone(memory_format=torch.contiguous_format) for t in (x, x0))
    sizes = dict(images=len(x), steps=len(coefficients), first=first, step_rows=by_step.shape[1])
    guided = dict(guided=shape.channels if channels is None else channels, scale=scale)
    given = _float32(coefficients=coefficients, noise=noise, by_step=by_step, by_label=by_label)
    given |= dict(rows=rows.contiguous(), seeds=contiguous(seeds))
    low = weights[0].dtype == torch.bfloat16
    if instruction_set is not None and low != (instruction_set == _BFLOAT16):
        raise ValueError(f"instruction_set: {instruction_set} is not for {weights[0].dtype}")
    # All but matrices are float32 in any case; `kept` lives as long as the call has addresses.
    kept = [
        _even_rows(t) if low and t.dim() == 2 and i != 1 else t.float().contiguous()
        for i, t in enumerate(weights)
    ]
    given["weights"] = torch.tensor([t.data_ptr() for t in kept], dtype=torch.int64)
    problem = Problem(**shape._asdict(), **sizes, **guided, **given, x=x, x0=x0)
    call(library().fastdit_trajectory, problem, _BFLOAT16 if low else instruction_set)
    return x, x0


def sampler_update(
    x: Tensor,
    model_out: Tensor,
    coefficients: Tensor,
    step: Tensor,
    x0_prev: Tensor | None = None,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    guidance: tuple[float, int | None] | None = None,
    instruction_set: str | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one step's update in float32; `fastdit.functional.sampler_update` checks arguments.

    Args:
        step: [] int64; the result is NaN if coefficients has no such row.
        guidance: (scale, number of channels or None for all) if model_out has 2B rows.
        instruction_set: as for `trajectory`.

    Returns:
        (x_next, x0), contiguous, like x.

    Raises:
        BuildError, ValueError: as for `trajectory`.
    """
    channel, k = 1 if x.dim() == 4 else 2, int(step)
    C, (scale, channels) = x.shape[channel], guidance or (1.0, 0)
    row = torch.full((len(COLUMNS),), float("nan"), dtype=torch.float32, device="cpu")
    if 0 <= k < len(coefficients):
        row = coefficients[k]
    x_next, x0 = out or (x.new_empty(x.shape), x.new_empty(x.shape))
    sizes = dict(images=len(x), elements=x.shape[1:].numel(), channels=C, step=k)
    kinds = dict(
        space=1 if channel == 2 else x.shape[2:].numel(),
        learned=model_out.shape[channel] == 2 * C,
        guided=C if channels is None else channels,
        scale=scale,
    )
    given = _float32(x=x, model_out=model_out, coefficients=row, x0_prev=x0_prev, noise=noise)
    results = dict(x_next=x_next, x0=x0)
    update = Update(**sizes, **kinds, **given, seeds=contiguous(seeds), **results)
    call(library().fastdit_update, update, instruction_set)
    return x_next, x0


def normal(seeds: Tensor, steps: Tensor, elements: int) -> Tensor:
    """Return standard normal noise as `fastdit.noise.normal` defines it.

    Args:
        seeds: [B, 2] int64 rows of (key, stream).
        steps: [S] int64.
        elements: how many, for each image and step.

    Returns:
        [S, B, elements] float32.

    Raises:
        BuildError: the kernels cannot be built.
    """
    seeds, steps = seeds.contiguous(), steps.contiguous()
    out = seeds.new_empty((len(steps), len(seeds), elements), dtype=torch.float32)
    sizes = len(seeds), len(steps), elements, torch.get_num_threads()
    library().fastdit_normal(seeds.data_ptr(), steps.data_ptr(), *sizes, out.data_ptr())
    return out


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gelu: str | None = None,
    instruction_set: str | None = None,
) -> Tensor:
    """Return x weight^T + bias; a row's bits depend on no other row, nor on threads.

    Args:
        x: [R, K].
        weight: [M, K], float32; or bfloat16, where x is rounded to bfloat16 too and K is even.
        bias: [M], or None.
        gelu: "none" or "tanh", as PyTorch names them, for the GELU of the result; None for itself.
        instruction_set: as for `trajectory`.

    Returns:
        [R, M] float32.

    Raises:
        BuildError, MemoryError, ValueError: as for `trajectory`.
    """
    y = x.new_empty((len(x), len(weight)), dtype=torch.float32)
    sizes = dict(rows=len(x), in_features=x.shape[1], out_features=len(weight))
    sizes["gelu"] = (None, "none", "tanh").index(gelu)
    low = weight.dtype == torch.bfloat16
    if low and x.shape[1] % 2:
        raise ValueError(f"weight: expected an even K in bfloat16, got {x.shape[1]}")
    given = _float32(x=x, bias=bias)
    given["weight"] = weight.contiguous() if low else weight.float().contiguous()
    best = _BFLOAT16 if low else instruction_set
    call(library().fastdit_linear, Linear(**sizes, **given, y=y), best)
    return y


def instruction_set() -> str:
    """Return the best instruction set of this CPU: "plain", "avx2" or "avx512"."""
    return library().fastdit_instruction_set().decode()


def instruction_sets() -> list[str]:
    """Return all instruction sets of this CPU for float32, the best last."""
    names = ["plain", "avx2", "avx512"]
    return names[: names.index(instruction_set()) + 1]


def peak_flop_per_second(repeats: int = 2_000_000) -> float:
    """Measure multiply-adds on registers alone, on PyTorch's number of threads."""
    return library().fastdit_peak(torch.get_num_threads(), repeats)


def _even_rows(matrix: Tensor) -> Tensor:
    """Return a matrix contiguous, with a zero behind rows of an odd number of elements."""
    return F.pad(matrix, (0, 1)) if matrix.shape[1] % 2 else matrix.contiguous()


def _float32(**given: Tensor | None) -> dict[str, Tensor | None]:
    """Return the tensors by name, contiguous and in float32."""
    return {
        name: None if t is None else (t if t.dtype == torch.float32 else t.float()).contiguous()
        for name, t in given.items()
    }
