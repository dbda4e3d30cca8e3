"""The sampler update, the noise and the norms in C++, each called on its own."""

import math

import pytest
import torch

from fastdit import Guidance, functional, noise
from fastdit.kernels import cpu
from fastdit.kernels.cpu import adaln
from fastdit.testing import check_against_oracle, relative_error


@pytest.mark.parametrize("layout", ["tokens", "images"])
@pytest.mark.parametrize("learned", [False, True], ids=["eps", "learned"])
@pytest.mark.parametrize("guidance", [None, Guidance(3.5), Guidance(2.5, channels=2)], ids=str)
def test_a_single_update_obeys_the_error_rule(layout, learned, guidance):
    """The columns are those of COEFFICIENTS; row 1 clips x0, and row 2 is a last step."""
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
                x.double(),
                model_out.double(),
                coefficients.double(),
                step,
                x0_prev=None if prev is None else prev.double(),
                guidance=guidance,
                **wide,
            )
            own, plain = (
                functional.sampler_update(
                    x,
                    model_out,
                    coefficients,
                    step,
                    x0_prev=prev,
                    guidance=guidance,
                    backend=backend,
                    **given,
                )
                for backend in ("cpp", "reference")
            )
            for a, b, exact in zip(own, plain, oracle, strict=True):
                check_against_oracle(a, b, exact)
    by_default = functional.sampler_update(x, model_out, coefficients, 2, guidance=guidance)
    assert torch.equal(by_default[0], own[0])
    x.requires_grad_()
    with_gradient = functional.sampler_update(x, model_out, coefficients, 2, guidance=guidance)
    assert with_gradient[0].requires_grad
    with pytest.raises(ValueError, match="backend: 'cpp' expects a float32 state on a CPU"):
        functional.sampler_update(
            x.double(), model_out, coefficients, 0, guidance=guidance, backend="cpp"
        )


def test_noise_and_updates_are_float32_under_any_default_dtype():
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
def test_noise_from_bad_seeds_or_steps_is_an_error(seeds, steps, message):
    with pytest.raises(ValueError, match=message):
        functional.normal(seeds, steps, 4)


def test_a_learned_range_that_overflows_is_infinite():
    """The reference overflows too; an exponent that wraps around would give a finite image."""
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


NORMS = {
    "layer_norm_modulate": ("x", "scale", "shift"),
    "gated_residual_layer_norm_modulate": ("x", "y", "gate", "scale", "shift"),
    "rms_norm_modulate": ("x", "scale", "shift", "weight"),
    "gated_residual_rms_norm_modulate": ("x", "y", "gate", "scale", "shift", "weight"),
}
by_norm = pytest.mark.parametrize("op", NORMS)


def norm_inputs(op, shape):
    """Return an op's inputs; the modulation is chunk views of one tensor, as in the model."""
    B, N, D = shape
    x, y = torch.randn(2, B, N, D)
    gate, scale, shift = torch.randn(B, 3 * D).chunk(3, dim=1)
    given = dict(x=x, y=y, gate=gate, scale=scale, shift=shift, weight=torch.randn(D))
    return [given[name] for name in NORMS[op]]


def outputs_and_gradients(op, inputs, upstream, backend):
    leaves = [t.detach().requires_grad_() for t in inputs]
    outs = getattr(functional, op)(*leaves, backend=backend)
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.autograd.backward(outs, upstream[: len(outs)])
    return [t.detach() for t in (*outs, *(leaf.grad for leaf in leaves))]


@by_norm
@pytest.mark.parametrize("width", [7, 33, 64])
def test_norms_are_the_same_in_every_instruction_set(op, width):
    inputs = norm_inputs(op, (3, 70, width))
    given = dict(zip(NORMS[op], inputs, strict=True))
    x, scale, shift = (given[name] for name in ("x", "scale", "shift"))
    weight, residual = given.get("weight"), None
    dr, dh = torch.randn(2, *x.shape)
    runs = []
    for name in cpu.instruction_sets():
        if "y" in given:
            residual = given["y"], given["gate"]
        r, h, *statistics = adaln.norm_modulate_fwd(
            x, scale, shift, 1e-5, weight, residual, instruction_set=name
        )
        if residual is not None:
            residual = dr, *residual
        gradients = adaln.norm_modulate_bwd(
            dh, r, scale, statistics, weight, residual, instruction_set=name
        )
        runs.append([t for t in (r, h, *gradients) if t is not None])
    for run in runs:
        for a, b in zip(run, runs[0], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@by_norm
def test_norms_have_the_same_bits_for_any_batch_and_number_of_threads(op):
    torch.manual_seed(0)
    inputs, upstream = norm_inputs(op, (9, 150, 40)), torch.randn(2, 9, 150, 40).unbind()
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(outputs_and_gradients(op, inputs, upstream, "cpp"))
    finally:
        torch.set_num_threads(before)
    one_image = [t[4:5] if t.dim() > 1 else t for t in inputs]
    alone = outputs_and_gradients(op, one_image, [u[4:5] for u in upstream], "cpp")
    for first, second, third, one in zip(*runs, alone, strict=True):
        assert torch.equal(first, second) and torch.equal(first, third)
        # The gradient of a weight [D] is a sum over the images.
        assert first.dim() == 1 or torch.equal(first[4:5], one)


@by_norm
def test_norms_take_any_strides_and_empty_inputs(op):
    inputs = norm_inputs(op, (3, 5, 10))
    strided = [t.mT.contiguous().mT if t.dim() > 1 else t.repeat_interleave(2)[::2] for t in inputs]
    upstream = torch.randn(3, 10, 5).transpose(1, 2), torch.randn(3, 1, 1).expand(3, 5, 10)
    expected = outputs_and_gradients(op, inputs, [u.contiguous() for u in upstream], "cpp")
    for a, b in zip(outputs_and_gradients(op, strided, upstream, "cpp"), expected, strict=True):
        assert torch.equal(a, b)
    for shape in ((0, 5, 10), (2, 0, 10)):
        empty = outputs_and_gradients(op, norm_inputs(op, shape), [torch.ones(shape)] * 2, "cpp")
        assert all(not t.any() for t in empty)


@by_norm
def test_a_nan_stays_in_its_token(op):
    inputs = norm_inputs(op, (2, 40, 20))
    inputs[0][1, 7, 3] = math.nan
    out = getattr(functional, op)(*inputs, backend="cpp")
    out = out[1] if isinstance(out, tuple) else out
    assert out[1, 7].isnan().all() and out.isnan().sum() == 20


@by_norm
def test_norms_pass_opcheck(op):
    inputs = [t.requires_grad_() for t in norm_inputs(op, (2, 3, 10))]
    call = getattr(torch.ops.fastdit, op).default
    torch.library.opcheck(call, (*inputs, 1e-5, "cpp"))
    if "rms" in op:
        inputs[NORMS[op].index("shift")] = None
        torch.library.opcheck(call, (*inputs, 1e-5, "cpp"))


def test_an_update_in_place_passes_opcheck():
    x, coefficients, step = torch.randn(2, 4, 3), torch.rand(2, 10), torch.tensor(1)
    given = (x, x + 1, coefficients, step, None, None, None, None, None, "cpp")
    out = torch.empty_like(x), torch.empty_like(x)
    torch.library.opcheck(torch.ops.fastdit.sampler_update_out.default, (*given, *out))


@by_norm
def test_norms_in_cpp_take_only_float32_and_differentiate_once(op):
    inputs = norm_inputs(op, (2, 3, 10))
    with pytest.raises(ValueError, match="backend: 'cpp' expects float32 tensors on a CPU"):
        getattr(functional, op)(*(t.bfloat16() for t in inputs), backend="cpp")
    x = inputs[0].requires_grad_()
    out = getattr(functional, op)(*inputs, backend="cpp")
    out = out[1] if isinstance(out, tuple) else out
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(dx.sum(), x)


@by_norm
def test_only_large_norms_run_in_cpp_by_default(op):
    for shape, backend in (((4, 16, 64), "reference"), ((98, 16, 64), "cpp")):
        inputs = norm_inputs(op, shape)
        default, named = (getattr(functional, op)(*inputs, backend=b) for b in (None, backend))
        other = getattr(functional, op)(*inputs, backend={"cpp": "reference"}.get(backend, "cpp"))
        pick = (lambda out: out[1]) if isinstance(default, tuple) else (lambda out: out)
        assert torch.equal(pick(default), pick(named))
        assert not torch.equal(pick(default), pick(other))
