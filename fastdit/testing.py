"""What the tests and the benchmarks share: weights that prove something, and the error rule."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Draw every trainable weight anew, none of them zero.

    A fresh adaLN-Zero model returns zeros and proves nothing. Matrices are scaled by fan-in, so
    that activations stay of order one; modulation comes out at about 0.5.
    """
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            spread = 0.5 * p[0].numel() ** -0.5 if p.dim() > 1 else 0.1
            p.copy_(torch.randn(p.shape, generator=generator) * spread)


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """Relative L2 distance over the whole tensor, computed in float64."""
    actual, oracle = actual.detach().cpu().double(), oracle.detach().cpu().double()
    return ((actual - oracle).norm() / oracle.norm()).item()


def check_against_oracle(actual: Tensor, plain: Tensor, oracle: Tensor) -> None:
    """The error rule: a fast path may be at most twice as wrong as plain PyTorch ops.

    Over the whole tensor in the relative L2 norm, `error(actual) <= 2 error(plain) + half an ulp`
    (one rounding of the output); and no element is off by more than four times the largest error
    of the plain ops, that rounding added.

    Args:
        actual: what is tested.
        plain: the same computation by plain ops, in the same dtype.
        oracle: the same in float64.

    Raises:
        AssertionError: the rule is broken; the message gives both errors.
        ValueError: shapes differ, there are too few elements to judge, or the oracle is zero.
    """
    if not actual.shape == plain.shape == oracle.shape:
        raise ValueError(
            f"actual, plain, oracle: expected one shape, got {list(actual.shape)}, "
            f"{list(plain.shape)}, {list(oracle.shape)}"
        )
    if oracle.numel() < 4096 or oracle.dtype != torch.float64 or not oracle.norm() > 0:
        raise ValueError(
            "oracle: expected at least 4096 elements of float64, not all zero; got "
            f"{oracle.numel()} of {oracle.dtype}"
        )
    rounding = torch.finfo(actual.dtype).eps / 2
    error, plain_error = relative_error(actual, oracle), relative_error(plain, oracle)
    assert error <= 2 * plain_error + rounding, (
        f"relative error {error:.3g}, plain ops have {plain_error:.3g}"
    )
    worst = (actual.double() - oracle).abs().max().item()
    plain_worst = (plain.double() - oracle).abs().max().item()
    bound = 4 * plain_worst + rounding * oracle.abs().max().item()
    assert worst <= bound, f"largest error {worst:.3g}, plain ops have {plain_worst:.3g}"
