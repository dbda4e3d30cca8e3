"""What the Triton kernels share: the architecture, the dtype of products, pieces of a row."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

INTERPRET: bool = triton.knobs.runtime.interpret
_DOT_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@functools.cache
def arch(device: torch.device) -> str:
    """Return the name of a device's architecture: "sm_90", "gfx942", "interpreter" for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def power_of_two_pieces(n: int) -> tuple[int, int]:
    """Return two powers of two that cover n columns: the largest below n, and one for the rest.

    `tl.arange` takes powers of two only. A row of 1152 held as 1024 + 128 has no idle lanes, while
    one piece of 2048 would leave 44% of them idle.
    """
    first = 1 << max(0, (n - 1).bit_length() - 1)
    return first, triton.next_power_of_2(max(1, n - first))


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype of products' operands: the interpreter has no bfloat16 arithmetic."""
    return tl.float32 if INTERPRET else _DOT_DTYPES[dtype]
