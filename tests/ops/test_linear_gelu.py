"""`linear_gelu`: when the GELU is fused into the matrix product, and that its results agree."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdit
from fastdit import functional
from fastdit.ops import dispatch
from fastdit.testing import check_against_oracle, randomize


def inputs(device="cpu", dtype=torch.float32):
    x, weight, bias = torch.randn(3, 20, 72), torch.randn(96, 72) / 8, torch.randn(96)
    return [t.to(device, dtype) for t in (x, weight, bias)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_tanh_gelu_in_the_products_epilogue_obeys_the_error_rule(dtype):
    x, weight, bias = inputs("cuda", dtype)
    assert dispatch.fuses_gelu(x, weight, bias)
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    plain = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    check_against_oracle(functional.linear_gelu(x, weight, bias, "tanh"), plain, exact)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_on_a_cpu_it_is_the_two_plain_ops(approximate):
    x, weight, bias = inputs()
    expected = F.gelu(F.linear(x, weight, bias), approximate=approximate)
    assert torch.equal(functional.linear_gelu(x, weight, bias, approximate), expected)
    unbiased = F.gelu(F.linear(x, weight), approximate=approximate)
    assert torch.equal(functional.linear_gelu(x, weight, None, approximate), unbiased)


@pytest.fixture
def fused(monkeypatch):
    """Enable fusion on the CPU, where PyTorch fuses the exact GELU, and return the fused calls."""
    calls, addmm = [], torch._addmm_activation

    def counted(*arguments, **options):
        calls.append(arguments)
        return addmm(*arguments, **options)

    monkeypatch.setattr(torch, "_addmm_activation", counted)
    monkeypatch.setattr(functional.mlp, "fuses_gelu", lambda *_: True)
    return calls


@torch.no_grad()
def test_the_fused_product_has_the_shape_and_rows_of_a_linear(fused):
    x, weight, bias = inputs()
    expected = F.gelu(F.linear(x, weight, bias))
    assert torch.allclose(functional.linear_gelu(x, weight, bias, "tanh"), expected, atol=1e-5)
    assert len(fused) == 1
    row = functional.linear_gelu(x[0, 0], weight, bias, "tanh")
    assert torch.allclose(row, expected[0, 0], atol=1e-5) and len(fused) == 2
    functional.linear_gelu(x, weight, bias, "none")
    functional.linear_gelu(x, weight, None, "tanh")
    assert len(fused) == 2, "an exact GELU or a linear without bias cannot be fused"


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@torch.no_grad()
@pytest.mark.parametrize("change", ["none", "hook", "class", "activation"])
def test_a_changed_mlp_is_called_as_it_is_without_fusion(fused, change):
    model = fastdit.DiT(hidden=32, n_layers=1, n_heads=2, gelu="tanh")
    randomize(model)
    mlp = model.blocks[0].mlp
    if change == "hook":
        mlp[0].register_forward_hook(lambda module, given, out: 2 * out)
    if change == "class":
        mlp[0].__class__ = Doubled
    if change == "activation":
        mlp[1] = nn.SiLU()
    x = torch.randn(2, 5, 32)
    expected = nn.Sequential(*mlp)(x)
    assert torch.allclose(mlp(x), expected, atol=1e-3)
    assert len(fused) == (change == "none")
    assert torch.allclose(mlp[:1](x), mlp[0](x)), "a slice calls its layers in sequence"


class Quantised(torch.Tensor):
    """Stands for quantised weights, which support no op but F.linear."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def test_gelu_is_fused_only_with_plain_weights(monkeypatch):
    where = SimpleNamespace(type="cuda")
    tensors = [SimpleNamespace(device=where, dtype=torch.bfloat16, numel=lambda: 1)] * 3
    with torch.no_grad():
        assert dispatch.fuses_gelu(*tensors)
        assert not dispatch.fuses_gelu(*tensors[:2], torch.ones(2).as_subclass(Quantised))


def test_an_unknown_gelu_is_named():
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match="approximate: expected one of tanh, none; got 'erf'"):
        functional.linear_gelu(x, weight, None, "erf")
