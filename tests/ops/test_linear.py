"""`linear` and `linear_gelu` in C++: what they compute, and when they are chosen."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdit import blocks, functional
from fastdit.kernels import cpu
from fastdit.testing import check_against_oracle

GELUS = [None, "none", "tanh"]
by_gelu = pytest.mark.parametrize("gelu", GELUS, ids=["linear", "erf", "tanh"])


def inputs(rows, width, out):
    torch.manual_seed(0)
    return torch.randn(rows, width), torch.randn(out, width) / width**0.5, torch.randn(out)


def plain(x, weight, bias, gelu):
    y = F.linear(x, weight, bias)
    return y if gelu is None else F.gelu(y, approximate=gelu)


def call(x, weight, bias, gelu, backend=None):
    if gelu is None:
        return functional.linear(x, weight, bias, backend)
    return functional.linear_gelu(x, weight, bias, gelu, backend)


@by_gelu
@pytest.mark.parametrize(("rows", "width", "out"), [(75, 50, 131), (7, 96, 600), (130, 5, 36)])
def test_every_instruction_set_obeys_the_error_rule(gelu, rows, width, out):
    x, weight, bias = inputs(rows, width, out)
    for b in (bias, None):
        exact = plain(x.double(), weight.double(), None if b is None else b.double(), gelu)
        for name in cpu.instruction_sets():
            own = cpu.linear(x, weight, b, gelu, instruction_set=name)
            check_against_oracle(own, plain(x, weight, b, gelu), exact)


@by_gelu
def test_a_row_has_the_same_bits_alone_and_with_any_number_of_threads(gelu):
    x, weight, bias = inputs(700, 40, 450)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(call(x, weight, bias, gelu, "cpp"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    for row in (0, 333, 699):
        assert torch.equal(call(x[row], weight, bias, gelu, "cpp"), runs[0][row])


@by_gelu
def test_inputs_may_have_any_strides_and_leading_dimensions(gelu):
    x, weight, bias = inputs(60, 24, 30)
    expected = call(x, weight, bias, gelu, "cpp").view(3, 4, 5, 30)
    strided = x.t().contiguous().t().unflatten(0, (3, 4, 5)), weight.t().contiguous().t()
    assert torch.equal(call(*strided, bias.repeat_interleave(2)[::2], gelu, "cpp"), expected)
    assert call(x[:0].view(2, 0, 24), weight, bias, gelu, "cpp").shape == (2, 0, 30)
    assert call(x, weight[:0], bias[:0], gelu, "cpp").shape == (60, 0)


@by_gelu
def test_a_nan_stays_in_its_row(gelu):
    x, weight, bias = inputs(40, 20, 30)
    x[7, 3] = math.nan
    out = call(x, weight, bias, gelu, "cpp")
    assert out[7].isnan().all() and out.isnan().sum() == 30


@by_gelu
@torch.no_grad()
def test_only_large_products_run_in_cpp_by_default(gelu):
    if cpu.instruction_set() == "plain":
        pytest.skip("needs AVX2")
    for shape, backend in (((60, 64, 64), "reference"), ((2, 2048, 2048), "reference")):
        given = *inputs(*shape), gelu
        assert torch.equal(call(*given), call(*given, backend))
    given = *inputs(64, 256, 512), gelu
    own, others = call(*given, "cpp"), call(*given, "reference")
    assert torch.equal(call(*given), own) and not torch.equal(own, others)
    assert torch.equal(others, plain(*given)), "plain PyTorch by that name"


@by_gelu
def test_training_and_autocast_run_in_pytorch_by_default(gelu):
    x, weight, bias = inputs(64, 256, 512)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(x, weight, bias, gelu).dtype == torch.bfloat16
        with pytest.raises(ValueError, match="backend: 'cpp' computes in float32, not in autocast"):
            call(x, weight, bias, gelu, "cpp")
    bias.requires_grad_()
    assert torch.equal(call(x, weight, bias, gelu), plain(x, weight, bias, gelu))
    assert call(x, weight, bias, gelu).requires_grad
    with pytest.raises(ValueError, match="backend: 'cpp' has no gradients"):
        call(x, weight, bias, gelu, "cpp")
    # Derivatives of other kinds than the graph's.
    push = torch.func.jvp(lambda v: call(v, weight, bias.detach(), gelu), (x,), (x,))
    assert torch.allclose(push[0], plain(x, weight, bias, gelu))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.ones(2, 3, dtype=torch.float64)), "expects float32 tensors on a CPU"),
        (
            dict(weight=torch.ones(4, 5)),
            r"expects a weight \[M, D\] for x \[..., D\], got \[4, 5\]",
        ),
        (dict(bias=torch.ones(3)), r"expects a bias \[M\] beside a weight \[M, D\], got \[3\]"),
    ],
)
def test_a_linear_that_cpp_cannot_run_is_an_error_where_it_is_named(change, message):
    given = dict(x=torch.ones(2, 3), weight=torch.ones(4, 3), bias=torch.ones(4)) | change
    with pytest.raises(ValueError, match=f"backend: 'cpp' {message}"):
        functional.linear(**given, backend="cpp")
    with pytest.raises(ValueError, match="backend: expected"):
        functional.linear(**given, backend="triton")


@by_gelu
def test_a_linear_passes_opcheck(gelu):
    x, weight, bias = inputs(5, 6, 7)
    torch.library.opcheck(torch.ops.fastdit.linear.default, (x, weight, bias, gelu))
    torch.library.opcheck(torch.ops.fastdit.linear.default, (x, weight, None, gelu))


@torch.no_grad()
def test_only_an_mlp_of_fastdits_own_linears_leaves_pytorchs_bits():
    x, weight, bias = inputs(64, 256, 512)
    for kind, backend in ((nn.Linear, "reference"), (blocks.Linear, "cpp")):
        mlp = blocks.MLP(kind(256, 512), nn.GELU(approximate="tanh"), nn.Identity())
        mlp[0].weight.copy_(weight), mlp[0].bias.copy_(bias)
        assert torch.equal(mlp(x), call(x, weight, bias, "tanh", backend))


def test_rows_without_features_are_the_bias():
    x, weight, bias = torch.ones(5, 0), torch.ones(3, 0), torch.arange(3.0)
    assert torch.equal(functional.linear(x, weight, bias, "cpp"), bias.expand(5, 3))
