"""Linears, and the activations of MLPs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.errors import unknown_name
from fastdit.ops import checks, definitions, registration
from fastdit.ops.dispatch import choose, fuses_gelu


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Return a linear layer, `x W^T + b`.

    Args:
        x: [..., D], any float dtype.
        weight: [M, D].
        bias: [M], or None.
        backend: "cpp" (all tensors in float32 on a CPU, without gradients), "reference" (PyTorch's
            own) or None. In C++ a row's bits depend on no other row.

    Returns:
        [..., M].

    Raises:
        ValueError: the named backend cannot run; the message says why.
    """
    if choose("linear", backend, x, weight, bias) == "cpp":
        return _linear_in_cpp(x, weight, bias, None)
    return F.linear(x, weight, bias)


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    approximate: str,
    backend: str | None = None,
) -> Tensor:
    """Return the GELU of a linear layer, `gelu(x W^T + b)`.

    At inference on CUDA a tanh GELU is fused into the product, and on a CPU in C++ either GELU is.
    That saves a pass over the widest tensor of a block, and on CUDA the GELU is computed before
    the product is rounded.

    Args:
        x: [..., D], any float dtype.
        weight: [M, D].
        bias: [M], or None.
        approximate: "tanh" or "none", as `torch.nn.functional.gelu` takes it.
        backend: as for `linear`.

    Returns:
        [..., M].

    Raises:
        ValueError: `approximate` is neither, or the named backend cannot run; the message says
            which.

    Source: Hendrycks & Gimpel 2016, section 2.
    """
    if approximate not in ("tanh", "none"):
        raise unknown_name("approximate", str(approximate), ("tanh", "none"))
    if choose("linear", backend, x, weight, bias) == "cpp":
        return _linear_in_cpp(x, weight, bias, approximate)
    if bias is not None and approximate == "tanh" and fuses_gelu(x, weight, bias):
        rows = x.reshape(-1, x.shape[-1])
        rows = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)
        return rows.view(*x.shape[:-1], len(weight))
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def _linear_in_cpp(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None) -> Tensor:
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    out = registration.call(definitions.linear, rows, weight, bias, gelu)
    return out.view(*x.shape[:-1], len(weight))


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
