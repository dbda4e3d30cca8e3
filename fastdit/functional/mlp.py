"""Linears, and the activations of MLPs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.ops import checks, definitions, registration
from fastdit.ops.dispatch import choose, fuses_gelu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a linear layer, `x W^T + b`.

    Args:
        x: [..., D], any float dtype.
        weight: [M, D].
        bias: [M], or None.

    Returns:
        [..., M].
    """
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """Return the GELU of a linear layer, `gelu(x W^T + b)`.

    At inference on CUDA a tanh GELU is fused into the product, which saves a pass over the widest
    tensor of a block; it is then computed before the product is rounded.

    Args:
        x: [..., D], any float dtype.
        weight: [M, D].
        bias: [M], or None.
        approximate: "tanh" or "none", as `torch.nn.functional.gelu` takes it.

    Returns:
        [..., M].

    Source: Hendrycks & Gimpel 2016, section 2.
    """
    if bias is not None and approximate == "tanh" and fuses_gelu(x, weight, bias):
        rows = x.reshape(-1, x.shape[-1])
        rows = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)
        return rows.view(*x.shape[:-1], len(weight))
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def swiglu(x: Tensor, backend: str | None = None) -> Tensor:
    """Return the gated product `silu(a) * b` of the halves a and b of x.

    Args:
        x: [..., 2M], any float dtype: the output of one linear.
        backend: "triton", "reference" or None.

    Returns:
        [..., M] in x's dtype.

    Raises:
        ValueError: the shape or dtype does not fit.

    Source: Shazeer 2020 (GLU Variants Improve Transformer), equation 6.
    """
    checks.check_halves(x)
    if choose("swiglu", backend, x) == "triton":
        return registration.call(definitions.swiglu, x)
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b
