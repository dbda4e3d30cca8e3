"""RMSNorm with modulation, and both norms without a shift, alone and after a gated residual."""

import math

import pytest
import torch

from fastdit import functional, reference
from fastdit.testing import check_against_oracle

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPS = {
    "layer_norm_modulate": ("x", "scale", "shift"),
    "gated_residual_layer_norm_modulate": ("x", "y", "gate", "scale", "shift"),
    "rms_norm_modulate": ("x", "scale", "shift", "weight"),
    "gated_residual_rms_norm_modulate": ("x", "y", "gate", "scale", "shift", "weight"),
}
RMS = [op for op in OPS if "rms" in op]
# (op, whether there is a shift) of everything but the LayerNorms with a shift.
NEW = [(op, shifted) for op in OPS for shifted in (True, False) if op in RMS or not shifted]
by_op = pytest.mark.parametrize(
    ("op", "shifted"), NEW, ids=[f"{op}-{'shift' if s else 'no-shift'}" for op, s in NEW]
)


def inputs_of(op, shape, dtype=torch.float32, shifted=True):
    """Return an op's inputs; the modulation is chunk views of one tensor, as in the model."""
    B, N, D = shape
    x, y = torch.randn(2, B, N, D).to(dtype)
    gate, scale, shift = torch.randn(B, 3 * D).to(dtype).chunk(3, dim=1)
    weight = (1 + torch.randn(D) / 2).to(dtype)
    given = dict(x=x, y=y, gate=gate, scale=scale, shift=shift if shifted else None, weight=weight)
    return [given[name] for name in OPS[op]]


def outputs(module, op, inputs, *options, **named):
    out = getattr(module, op)(*inputs, *options, **named)
    return out if isinstance(out, tuple) else (out,)


def outputs_and_gradients(module, op, inputs, upstream, **named):
    """Return all outputs and all inputs' gradients, flattened."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in inputs]
    outs = outputs(module, op, leaves, 1e-5, **named)
    torch.autograd.backward(outs, [upstream] * len(outs))
    gradients = [leaf.grad for leaf in leaves if leaf is not None]
    return [t.detach().flatten() for t in (*outs, *gradients)]


def element(op, given, b, n, d):
    """Return the residual and the modulated norm at one element, by the formula."""
    row = given["x"][b, n].tolist()
    if "y" in OPS[op]:
        pairs = zip(given["gate"][b].tolist(), given["y"][b, n].tolist(), strict=True)
        row = [value + gate * y for value, (gate, y) in zip(row, pairs, strict=True)]
    mean = 0.0 if op in RMS else sum(row) / len(row)
    spread = math.sqrt(sum((value - mean) ** 2 for value in row) / len(row) + 1e-3)
    weight = given["weight"][d].item() if op in RMS else 1.0
    shift = 0.0 if given["shift"] is None else given["shift"][b, d].item()
    return row[d], (row[d] - mean) / spread * weight * (1 + given["scale"][b, d].item()) + shift


@by_op
def test_every_element_in_float64_is_its_formula(op, shifted):
    """Each of three images has a modulation of its own, and no input is contiguous."""
    inputs = inputs_of(op, (3, 5, 7), torch.float64, shifted)
    inputs = [t if t is None or t.dim() < 3 else t.mT.contiguous().mT for t in inputs]
    inputs = [t if t is None or t.dim() > 1 else t.repeat_interleave(2)[::2] for t in inputs]
    inputs[0] += 4
    assert not any(t.is_contiguous() for t in inputs if t is not None)
    outs = outputs(functional, op, inputs, 1e-3)
    given = dict(zip(OPS[op], inputs, strict=True))
    for b in range(3):
        for n in range(5):
            for d in range(7):
                expected = element(op, given, b, n, d)[-len(outs) :]
                actual = [out[b, n, d].item() for out in outs]
                assert actual == pytest.approx(expected, rel=1e-12, abs=1e-12)


@by_op
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [*((dtype, "reference") for dtype in DTYPES.values()), (torch.float32, "cpp")],
    ids=[*DTYPES, "float32-cpp"],
)
def test_norms_and_their_gradients_meet_the_error_rule(op, shifted, dtype, backend):
    """Eight seeds are pooled, so that the smallest tensor, a weight, has enough elements."""
    shape, runs = (3, 35, 520), []
    for _ in range(8):
        inputs, upstream = inputs_of(op, shape, dtype, shifted), torch.randn(shape).to(dtype)
        exact = [t if t is None else t.double() for t in inputs]
        runs.append(
            (
                outputs_and_gradients(functional, op, inputs, upstream, backend=backend),
                outputs_and_gradients(reference, op, inputs, upstream),
                outputs_and_gradients(reference, op, exact, upstream.double()),
            )
        )
    actual, plain, oracle = (
        [torch.cat(pooled) for pooled in zip(*column, strict=True)]
        for column in zip(*runs, strict=True)
    )
    for triple in zip(actual, plain, oracle, strict=True):
        check_against_oracle(*triple)


@by_op
def test_mixed_dtypes_keep_the_residual_and_follow_the_scale(op, shifted):
    """As under bfloat16 autocast, x and the weight are float32; autograd keeps each dtype."""
    inputs = inputs_of(op, (2, 4, 8), torch.bfloat16, shifted)
    inputs = [
        t.float() if name in ("x", "weight") else t for name, t in zip(OPS[op], inputs, strict=True)
    ]
    leaves = [t if t is None else t.detach().requires_grad_() for t in inputs]
    *residual, modulated = outputs(functional, op, leaves)
    assert modulated.dtype == torch.bfloat16
    assert all(r.dtype == torch.float32 for r in residual)
    (modulated.float().sum() + sum(r.sum() for r in residual)).backward()
    assert all(leaf is None or leaf.grad.dtype == leaf.dtype for leaf in leaves)


@by_op
def test_gradients_equal_finite_differences(op, shifted):
    inputs = inputs_of(op, (2, 3, 4), torch.float64, shifted)
    given = [t.detach().requires_grad_() for t in inputs if t is not None]

    def call(*tensors):
        left = iter(tensors)
        return outputs(functional, op, [t if t is None else next(left) for t in inputs])

    assert torch.autograd.gradcheck(call, given)


@pytest.mark.parametrize("op", OPS)
def test_no_shift_is_a_shift_of_zero(op):
    inputs = inputs_of(op, (3, 5, 8), shifted=False)
    zero = [torch.zeros(3, 8) if t is None else t for t in inputs]
    pairs = zip(outputs(functional, op, inputs), outputs(functional, op, zero), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize("op", RMS)
@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        ("x", torch.zeros(3, 8), "x: expected 3 dimensions [B, N, channels], got [3, 8]"),
        ("weight", torch.zeros(1, 8), "weight: expected shape [8], got [1, 8]"),
        ("weight", torch.zeros(8).int(), "weight: expected a float dtype, got torch.int32"),
        ("weight", torch.zeros(8, device="meta"), "weight: expected x's device cpu, got meta"),
        ("scale", torch.zeros(1, 8), "scale: expected shape [2, 8], got [1, 8]"),
        ("shift", torch.zeros(2, 4), "shift: expected shape [2, 8], got [2, 4]"),
    ],
)
def test_bad_arguments_are_value_errors_that_name_them(op, changed, value, message):
    given = dict(zip(OPS[op], inputs_of(op, (2, 3, 8)), strict=True)) | {changed: value}
    with pytest.raises(ValueError) as error:
        getattr(functional, op)(**given)
    assert message in str(error.value)


def test_a_gated_residual_needs_two_tensors_of_one_shape():
    given = dict(zip(OPS[RMS[1]], inputs_of(RMS[1], (2, 3, 8)), strict=True))
    with pytest.raises(ValueError, match=r"y: expected x's shape \[2, 3, 8\], got \[2, 1, 8\]"):
        functional.gated_residual_rms_norm_modulate(**(given | {"y": given["y"][:, :1]}))


@by_op
def test_function_transforms_differentiate_the_norms(op, shifted):
    """A custom op would give no tangent to torch.func.jvp."""
    inputs = inputs_of(op, (50, 33, 64), shifted=shifted)
    given = tuple(t.contiguous() for t in inputs if t is not None)

    def out(*tensors):
        left = iter(tensors)
        return outputs(functional, op, [t if t is None else next(left) for t in inputs])[-1]

    h, ones = 1e-3, tuple(torch.ones_like(t) for t in given)
    _, tangent = torch.func.jvp(out, given, ones)
    difference = (out(*(t + h for t in given)) - out(*(t - h for t in given))) / (2 * h)
    assert torch.allclose(tangent, difference, atol=1e-2)
    with pytest.raises(ValueError, match="backend: 'cpp' supports neither torch.func's"):
        torch.func.jvp(
            lambda x: getattr(functional, op)(x, *inputs[1:], backend="cpp"), given[:1], ones[:1]
        )
