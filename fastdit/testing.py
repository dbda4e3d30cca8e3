"""What tests and benchmarks share: random weights that make a check meaningful, the error rule."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> None:
    """Replace every trainable weight by a random number other than zero.

    A fresh adaLN-Zero model returns zeros, so a check on it proves nothing. Matrices are scaled by
    their fan-in, which keeps activations of order one and makes modulations about 0.5.
    """
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            spread = 0.5 * p[0].numel() ** -0.5 if p.dim() > 1 else 0.1
            p.copy_(torch.randn(p.shape, generator=generator) * spread)


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """Return the relative L2 distance over the whole tensor, computed in float64."""
    actual, oracle = actual.detach().cpu().double(), oracle.detach().cpu().double()
    return ((actual - oracle).norm() / oracle.norm()).item()


def check_against_oracle(actual: Tensor, plain: Tensor, oracle: Tensor) -> None:
    """Check the error rule: a fast path may be at most twice as wrong as plain PyTorch ops.

    In the relative L2 norm over the whole tensor, `error(actual) <= 2 error(plain) + half an ulp`,
    which is one rounding of the output. No single element may be off by more than four times the
    largest error of the plain ops plus that rounding.

    Args:
        actual: the result under test.
        plain: the result of plain ops in the same dtype.
        oracle: the result of the reference in float64.

    Raises:
        AssertionError: the rule is broken; the message gives both errors.
        ValueError: the shapes differ, or the oracle is not float64, has too few elements to judge
            or is all zero.
    """
    if not actual.shape == plain.shape == oracle.shape:
        shapes = [list(tensor.shape) for tensor in (actual, plain, oracle)]
        raise ValueError(f"actual, plain, oracle: expected one shape, got {shapes}")
    if oracle.numel() < 4096 or oracle.dtype != torch.float64 or not oracle.norm() > 0:
        expected = "at least 4096 elements of float64, not all zero"
        raise ValueError(f"oracle: expected {expected}, got {oracle.numel()} of {oracle.dtype}")
    rounding = torch.finfo(actual.dtype).eps / 2
    error, plain_error = relative_error(actual, oracle), relative_error(plain, oracle)
    assert error <= 2 * plain_error + rounding, (
        f"relative error {error:.3g}, but plain ops have {plain_error:.3g}"
    )
    worst = (actual.double() - oracle).abs().max().item()
    plain_worst = (plain.double() - oracle).abs().max().item()
    bound = 4 * plain_worst + rounding * oracle.abs().max().item()
    assert worst <= bound, f"largest error {worst:.3g}, but plain ops have {plain_worst:.3g}"
