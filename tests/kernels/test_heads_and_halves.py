"""Properties of qk_norm_rope, qk_attention and swiglu in Triton besides their numbers."""

import pytest
import torch
from torch.library import opcheck

from fastdit import functional, reference
from fastdit.kernels import qk_norm_rope, swiglu
from fastdit.ops import definitions
from fastdit.testing import relative_error


def qk_inputs(device, B=2, N=5, h=2, d=16, norm="layer", rope=True, requires_grad=False):
    """Return the arguments of `qk_norm_rope`; the weights are float32 as under autocast."""
    weights = list(torch.randn(4, d)) if norm != "none" else [None] * 4
    if norm == "rms":
        weights[1] = weights[3] = None
    leaves = [torch.randn(B, N, 3 * h * d), *weights]
    leaves = [None if t is None else t.to(device).requires_grad_(requires_grad) for t in leaves]
    angles = torch.randn(N, d // 2)
    table = torch.stack([angles.cos(), angles.sin()]).to(device) if rope else None
    return [leaves[0], h, *leaves[1:], table, 1e-3]


@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
def test_opcheck_is_clean_for_qk_norm_rope(norm, device):
    """With gradients asked for, opcheck also runs the backward as a compiler sees it."""
    arguments = qk_inputs(device, norm=norm, requires_grad=True)
    opcheck(definitions.qk_norm_rope, arguments)
    without = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    opcheck(definitions.qk_norm_rope_backward, (torch.randn_like(without[0]), *without))


def test_opcheck_is_clean_for_swiglu(device):
    x = torch.randn(2, 5, 12, device=device, requires_grad=True)
    opcheck(definitions.swiglu, (x,))
    opcheck(definitions.swiglu_backward, (torch.randn(2, 5, 6, device=device), x.detach()))


@pytest.mark.parametrize(("norm", "rope"), [("layer", True), ("rms", False)])
@pytest.mark.parametrize("d", [6, 72, 128], ids="d{}".format)
def test_every_qk_norm_rope_configuration_computes_the_same(d, rope, norm, device):
    """The norm's epsilon is large, so that one that is added to the wrong thing is seen."""
    qkv, h, *weights, table, _ = qk_inputs(device, 1, 67, 2, d, norm, rope)
    eps, dout = 0.1, torch.randn(1, 67, 6 * d, device=device)
    leaves = [None if t is None else t.double().requires_grad_() for t in (qkv, *weights)]
    exact = None if table is None else table.double()
    expected = reference.qk_norm_rope(leaves[0], h, *leaves[1:], exact, eps)
    expected.backward(dout.double())
    for config in qk_norm_rope.qk_norm_rope_fwd_configs(d):
        out = qk_norm_rope.qk_norm_rope_fwd(qkv, h, tuple(weights), table, eps, config)
        assert relative_error(out, expected) < 1e-6, config
    for config in qk_norm_rope.qk_norm_rope_bwd_configs(d):
        dqkv, dweights = qk_norm_rope.qk_norm_rope_bwd(
            dout, qkv, h, tuple(weights), table, eps, config
        )
        given = (leaf for leaf in leaves if leaf is not None)
        for actual, leaf in zip((dqkv, *dweights), given, strict=True):
            assert relative_error(actual, leaf.grad) < 1e-6, config


@pytest.mark.parametrize("M", [5, 64, 170, 1500], ids="M{}".format)
def test_every_swiglu_configuration_computes_the_same(M, device):
    x, dout = torch.randn(3, 11, 2 * M, device=device), torch.randn(3, 11, M, device=device)
    leaf = x.double().requires_grad_()
    expected = reference.swiglu(leaf)
    expected.backward(dout.double())
    for config in swiglu.swiglu_configs(M):
        assert relative_error(swiglu.swiglu_fwd(x, config), expected) < 1e-6, config
        assert relative_error(swiglu.swiglu_bwd(dout, x, config), leaf.grad) < 1e-6, config


def test_heads_of_zeros_have_finite_gradients_without_an_epsilon_elsewhere(device):
    """Lanes past the last head see zeros only, and with eps = 0 an infinite rstd."""
    qkv, h, *weights, table, _ = qk_inputs(device, norm="rms")
    dout = torch.randn_like(qkv)
    dqkv, dweights = qk_norm_rope.qk_norm_rope_bwd(dout, qkv, h, tuple(weights), table, 0.0)
    assert dqkv.isfinite().all() and dweights.isfinite().all()


def test_qk_norm_rope_keeps_dtypes(device):
    """As under bfloat16 autocast, qkv is bfloat16 and the weights are float32."""
    qkv, h, *others = qk_inputs(device, requires_grad=True)
    results = []
    for own, backend in ((torch.bfloat16, "triton"), (torch.bfloat16, "reference")):
        leaves = [t.detach().requires_grad_() for t in (qkv.to(own), *others[:4])]
        out = functional.qk_norm_rope(leaves[0], h, *leaves[1:], *others[4:], backend=backend)
        assert out.dtype == own
        out.backward(torch.ones_like(out))
        results.append([t.grad for t in leaves])
    for actual, plain in zip(*results, strict=True):
        assert actual.dtype == plain.dtype and relative_error(actual, plain) < 0.01


def test_a_rotary_table_that_asks_for_a_gradient_is_refused(device):
    qkv, h, *weights, table, eps = qk_inputs(device)
    table.requires_grad_()
    with pytest.raises(ValueError, match="backend: 'triton' has no gradient of the rotary table"):
        functional.qk_norm_rope(qkv, h, *weights, table, eps, "triton")
    functional.qk_norm_rope(qkv, h, *weights, table, eps).sum().backward()
    assert table.grad.abs().max() > 0


def test_second_derivatives_of_qk_norm_rope_and_swiglu_are_refused(device):
    arguments = qk_inputs(device, requires_grad=True)
    x = torch.randn(2, 8, device=device, requires_grad=True)
    for leaf, out in (
        (arguments[0], functional.qk_norm_rope(*arguments, backend="triton")),
        (x, functional.swiglu(x, backend="triton")),
    ):
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="use backend='reference'"):
            gradient.sum().backward()


def test_an_empty_batch_of_heads_or_rows_is_an_empty_result(device):
    arguments = qk_inputs(device, B=0, requires_grad=True)
    functional.qk_norm_rope(*arguments, backend="triton").sum().backward()
    assert arguments[0].grad.shape == (0, 5, 96) and not arguments[2].grad.any()
    x = torch.randn(0, 3, 8, device=device, requires_grad=True)
    functional.swiglu(x, backend="triton").sum().backward()
    assert x.grad.shape == x.shape


def test_qk_attention_runs_both_kernels(device):
    arguments = qk_inputs(device, requires_grad=True)
    with torch.profiler.profile() as profile:
        out = functional.qk_attention(*arguments)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["fastdit::qk_norm_rope"] == calls["fastdit::attention"] == 1
    assert relative_error(out, functional.qk_attention(*arguments, backend="reference")) < 1e-5


def test_heads_and_rows_compile_whole(device):
    """A graph of `qk_attention` and `swiglu`, with its gradients, is that of the ops."""
    qkv, h, *weights, table, eps = qk_inputs(device, requires_grad=True)
    gradients = []

    def call(qkv, *weights):
        return functional.swiglu(functional.qk_attention(qkv, h, *weights, table, eps))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for function in (compiled, call):
        loss = function(qkv, *weights).square().sum()
        gradients.append(torch.autograd.grad(loss, [qkv, *weights]))
    for actual, expected in zip(*gradients, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)
