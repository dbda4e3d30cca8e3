"""The updates and the noise of a loop in C++, each by itself."""

import math

import pytest
import torch

from fastdit import Guidance, functional, noise
from fastdit.kernels import cpu
from fastdit.testing import check_against_oracle, relative_error


@pytest.mark.parametrize("layout", ["tokens", "images"])
@pytest.mark.parametrize("learned", [False, True], ids=["eps", "learned"])
@pytest.mark.parametrize("guidance", [None, Guidance(3.5), Guidance(2.5, channels=2)], ids=str)
def test_an_update_by_itself_obeys_the_error_rule(layout, learned, guidance):
    """Columns as reference.COEFFICIENTS; row 1 clips, row 2 is a last step."""
    B, C = 4, 3
    shape = [B, 21 * 17, C] if layout == "tokens" else [B, C, 21, 17]
    out_shape = list(shape)
    out_shape[0] *= 2 if guidance else 1
    out_shape[2 if layout == "tokens" else 1] *= 2 if learned else 1
    rows = [
        (1.1, -0.4, math.inf, 0.7, -0.2, 0.3, 0.4, 0.8, -2.0, -1.0),
        (1.3, -0.7, 1.25, 0.4, 0.3, 0.5, -0.2, 0.6, -1.5, -0.5),
        (1.3, -0.7, math.inf, 0.4, 0.3, 0.5, -0.2, 0.0, -math.inf, -0.5),
    ]
    torch.manual_seed(0)
    x, x0_prev, z = torch.randn(3, *shape)
    model_out, seeds = torch.randn(out_shape), torch.tensor([[2**40 + 5, i] for i in range(B)])
    coefficients = torch.tensor(rows)
    for step in range(3):
        for prev, given in ((x0_prev, dict(seeds=seeds)), (None, dict(noise=z)), (None, {})):
            wide = {k: v.double() if k == "noise" else v for k, v in given.items()}
            oracle = functional.sampler_update(
                *(x.double(), model_out.double(), coefficients.double(), step),
                *(None if prev is None else prev.double(),),
                guidance=guidance,
                **wide,
            )
            own, plain = (
                functional.sampler_update(
                    *(x, model_out, coefficients, step, prev),
                    guidance=guidance,
                    backend=backend,
                    **given,
                )
                for backend in ("cpp", "reference")
            )
            for a, b, exact in zip(own, plain, oracle, strict=True):
                check_against_oracle(a, b, exact)
    by_default = functional.sampler_update(
        *(x, model_out, coefficients, 2, None), guidance=guidance
    )
    assert torch.equal(by_default[0], own[0])
    x.requires_grad_()
    with_gradient = functional.sampler_update(*(x, model_out, coefficients, 2), guidance=guidance)
    assert with_gradient[0].requires_grad
    with pytest.raises(ValueError, match="backend: 'cpp' expects a float32 state on a CPU"):
        functional.sampler_update(
            *(x.double(), model_out, coefficients, 0), guidance=guidance, backend="cpp"
        )


def test_noise_and_updates_are_float32_whatever_the_default_dtype():
    seeds, steps = torch.tensor([[7, 0], [-(2**40), 2**32 - 1]]), torch.tensor([0, 3])
    expected = noise.normal(seeds, steps, 45)
    x, out = torch.randn(1, 45, 3), torch.ones(1, 45, 3)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            own = functional.normal(seeds, steps, 45)
            past = cpu.sampler_update(x, out, torch.ones(6, 10), torch.tensor(99))
        finally:
            torch.set_default_dtype(torch.float32)
        assert own.dtype == torch.float32 and relative_error(own, expected) < 1e-6
        assert past[0].isnan().all() and past[1].isnan().all()
    assert torch.equal(own, functional.normal(seeds.t().contiguous().t(), steps, 45))


@pytest.mark.parametrize(
    ("seeds", "steps", "message"),
    [
        (torch.zeros(2, 2), torch.zeros(1).long(), r"seeds: expected int64 of shape \[B, 2\]"),
        (torch.zeros(2).long(), torch.zeros(1).long(), r"seeds: expected int64 of shape"),
        (torch.zeros(2, 2).long(), torch.zeros(1).int(), r"steps: expected int64 of shape \[S\]"),
    ],
)
def test_noise_of_bad_seeds_is_an_error(seeds, steps, message):
    with pytest.raises(ValueError, match=message):
        functional.normal(seeds, steps, 4)


def test_a_learned_range_that_overflows_is_infinite():
    """As the reference has it; a wrapped exponent would be a finite, wrong image."""
    x, z = torch.zeros(1, 64, 3), torch.ones(1, 64, 3)
    row = torch.tensor([[1.0, 0, math.inf, 1, 0, 0, 0, 1, 0, 200]])
    for v, high in ((1.0, 200), (-1.0, 200), (0.7, 100)):
        row[0, 9] = high
        out = torch.cat([x, torch.full_like(x, v)], dim=2)
        own, plain = (
            functional.sampler_update(x, out, row, 0, noise=z, backend=backend)[0]
            for backend in ("cpp", "reference")
        )
        assert torch.equal(own.isinf(), plain.isinf())
        assert plain.isinf().all() or torch.allclose(own, plain, rtol=1e-5)
