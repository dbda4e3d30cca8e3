"""What attention's forward and backward share: tiles, readable views, prepared launches."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels.attention_configs import head_pieces
from fastdit.kernels.common import arch, dot_dtype
from fastdit.kernels.launch import PreparedLaunch

Kind = tuple[torch.dtype, str, str]  # dtype, architecture, precision of products


@triton.jit
def tile(p, s, rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, D, EVEN, DOT):
    """Load columns FIRST to FIRST + WIDTH of a head's next ROWS rows, of which `rows` exist."""
    o_n = tl.arange(0, ROWS)[:, None]
    o_d = FIRST + tl.arange(0, WIDTH)[None, :]
    p += o_n * s + o_d
    if FIRST + WIDTH <= D:
        if EVEN:
            return tl.load(p).to(DOT)
        return tl.load(p, mask=o_n < rows, other=0.0).to(DOT)
    if EVEN:
        return tl.load(p, mask=o_d < D, other=0.0).to(DOT)
    return tl.load(p, mask=(o_n < rows) & (o_d < D), other=0.0).to(DOT)


@triton.jit
def store(p, s, rows, b, FIRST: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, D):
    o_n = tl.arange(0, ROWS)[:, None]
    o_d = FIRST + tl.arange(0, WIDTH)[None, :]
    tl.store(p + o_n * s + o_d, b.to(p.dtype.element_ty), mask=(o_n < rows) & (o_d < D))


def kind_of(qkv: Tensor) -> Kind:
    """Return what a launch depends on besides sizes."""
    dtype, target = qkv.dtype, arch(qkv.device)
    if dtype != torch.float32:
        return dtype, target, "ieee"
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    if torch.version.hip and target != "gfx942":  # AMD's only architecture with TF32
        tf32 = False
    return dtype, target, "tf32" if tf32 else "ieee"


def prepare(
    kernel: Any, own: str, qkv_shape: torch.Size, n_heads: int, kind: Kind, config: triton.Config
) -> tuple[PreparedLaunch, float]:
    """Prepare a kernel whose programs own a tile of a head's rows; own names the tile's size.

    Returns:
        (the launch, the scale of its scores).
    """
    (B, N, width), (dtype, _, precision) = qkv_shape, kind
    d = width // 3 // n_heads
    D0, D1 = head_pieces(d)
    even = N % config.kwargs["BM"] == 0 and N % config.kwargs["BN"] == 0
    grid = (B * n_heads * triton.cdiv(N, config.kwargs[own]),)
    constants = dict(D=d, D0=D0, D1=D1, EVEN=even, DOT=dot_dtype(dtype), PRECISION=precision)
    return PreparedLaunch(kernel, grid, **constants, **config.all_kwargs()), d**-0.5


def unit_stride(qkv: Tensor) -> tuple[Tensor, int, int]:
    """Return qkv [B, N, 3D] as the kernels read it, copied if need be, and its two strides.

    Its channels must lie side by side. Rows may lie anywhere, but not one element apart, since
    Triton makes a stride of 1 a constant, nor so far apart that offsets within a tile of at most
    256 rows exceed 32 bits.
    """
    s_b, s_n, channel = qkv.stride()
    if channel == 1 and s_n != 1 and s_n < 2**23:
        return qkv, s_b, s_n
    qkv = qkv.clone(memory_format=torch.contiguous_format)
    return qkv, qkv.stride(0), qkv.stride(1)
