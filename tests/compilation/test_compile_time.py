"""The time in which a network of our ops compiles, by its depth."""

import shutil
import time

import pytest
import torch

from fastdit import functional
from fastdit.ops import definitions, norms

CPP = {"backend": "cpp"}


@pytest.fixture
def inductor_knows_no_op(monkeypatch):
    """Act as in a new process; fail if an op's arguments are written out, which may be endless."""
    from torch._inductor import config, exc, lowering

    for op in (
        norms.layer_norm_modulate,
        norms.gated_residual_layer_norm_modulate,
        definitions.sampler_update,
    ):
        monkeypatch.delitem(lowering.lowerings, op, raising=False)

    def written_out(target, args, kwargs):
        raise AssertionError(f"the arguments of {target} were written out")

    for error in (exc.MissingOperatorWithDecomp, exc.MissingOperatorWithoutDecomp):
        monkeypatch.setattr(error, "operator_str", staticmethod(written_out))
    with config.patch(force_disable_caches=True):
        yield


def network(depth):
    """Return layers that each use both results of the one before, with an update at the end."""

    def step(x, weight, modulation, coefficients, k):
        residual, m = x, modulation
        h = functional.layer_norm_modulate(x, m, m, **CPP)
        for _ in range(depth):
            residual, h = functional.gated_residual_layer_norm_modulate(
                residual, h @ weight, m, m, m, **CPP
            )
        return functional.sampler_update(x, h, coefficients, k, **CPP)

    return step


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@torch.no_grad()
def test_compiling_takes_time_proportional_to_depth(inductor_knows_no_op):
    given = torch.randn(2, 4, 8), torch.randn(8, 8), torch.randn(2, 8), torch.rand(3, 10)
    took = {}
    for depth in (1, 2, 4, 8, 12):  # the first starts the compiler
        torch._dynamo.reset()
        step, k = network(depth), torch.tensor(1)
        begin = time.monotonic()
        results = torch.compile(step, fullgraph=True)(*given, k)
        took[depth] = time.monotonic() - begin
        for compiled, eager in zip(results, step(*given, k), strict=True):
            assert torch.equal(compiled, eager)
    assert took[12] < 3 * 6 * took[2], took
