"""The public ops: the error rule against float64, and errors that name the argument."""

import pytest
import torch

from fastdit import functional, reference
from fastdit.testing import check_against_oracle

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = [(1, 1, 64), (3, 5, 72), (3, 16, 64), (1, 63, 384), (3, 300, 96)]
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-N{}-D{}".format(*s))


def inputs_of(op, shape, dtype, seed):
    """Modulation comes as chunk views of one tensor, as the model makes it."""
    B, N, D = shape
    torch.manual_seed(seed)
    if op == "attention":
        return (torch.randn(B, N, 3 * D).to(dtype),)
    x, y = torch.randn(2, B, N, D).to(dtype)
    gate, scale, shift = torch.randn(B, 3 * D).to(dtype).chunk(3, dim=1)
    return (x, scale, shift) if op == "layer_norm_modulate" else (x, y, gate, scale, shift)


def run(module, op, args):
    extra = 4 if op == "attention" else 1e-5
    out = getattr(module, op)(*args, extra)
    return torch.cat([o.flatten() for o in (out if isinstance(out, tuple) else (out,))])


@pytest.mark.parametrize(
    "op", ["layer_norm_modulate", "gated_residual_layer_norm_modulate", "attention"]
)
@by_shape
@by_dtype
def test_ops_meet_the_error_rule(op, shape, dtype):
    pooled = []
    for seed in range(-(-4096 // (shape[0] * shape[1] * shape[2]))):
        args = inputs_of(op, shape, dtype, seed)
        exact = run(reference, op, [a.double() for a in args])
        pooled.append((run(functional, op, args), run(reference, op, args), exact))
    check_against_oracle(*(torch.cat(column) for column in zip(*pooled, strict=True)))


@pytest.mark.parametrize("n_heads", [1, 3, 8], ids="h{}".format)
def test_float64_attention_is_softmax_attention(n_heads):
    """Against a loop over images, heads and queries: the formula at its barest."""
    qkv = torch.randn(2, 7, 3 * 24, dtype=torch.float64)
    d = 24 // n_heads
    expected = torch.empty(2, 7, 24, dtype=torch.float64)
    for b in range(2):
        for h in range(n_heads):
            q, k, v = (qkv[b, :, i * 24 + h * d : i * 24 + (h + 1) * d] for i in range(3))
            for n in range(7):
                weights = torch.exp(k @ q[n] / d**0.5)
                expected[b, n, h * d : (h + 1) * d] = weights / weights.sum() @ v
    assert torch.allclose(functional.attention(qkv, n_heads), expected, rtol=1e-12, atol=1e-13)


def test_float64_layer_norm_modulate_is_its_formula():
    x = torch.randn(3, 5, 33, dtype=torch.float64) + 4
    scale, shift = torch.randn(2, 3, 33, dtype=torch.float64)
    mean = x.sum(-1, keepdim=True) / 33
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / 33
    expected = (x - mean) / (variance + 1e-3).sqrt() * (1 + scale[:, None]) + shift[:, None]
    actual = functional.layer_norm_modulate(x, scale, shift, 1e-3)
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_mixed_dtypes_keep_the_residual_and_follow_the_modulation():
    x = torch.randn(2, 4, 8)
    y, (gate, scale, shift) = torch.randn(2, 4, 8).bfloat16(), torch.randn(3, 2, 8).bfloat16()
    residual, modulated = functional.gated_residual_layer_norm_modulate(x, y, gate, scale, shift)
    assert (residual.dtype, modulated.dtype) == (torch.float32, torch.bfloat16)
    assert functional.layer_norm_modulate(x, scale, shift).dtype == torch.bfloat16


@pytest.mark.parametrize("op", [functional.layer_norm_modulate, functional.attention])
def test_gradients_by_finite_differences(op):
    if op is functional.attention:
        assert torch.autograd.gradcheck(
            lambda qkv: op(qkv, 2), torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
        )
    else:
        x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        scale, shift = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in "ab")
        assert torch.autograd.gradcheck(op, (x, scale, shift))


x, y, m = torch.zeros(2, 3, 8), torch.zeros(2, 3, 8), torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: functional.layer_norm_modulate(x[0], m, m), "x: expected 3 dimensions"),
        (lambda: functional.layer_norm_modulate(x, m[:1], m), "scale: expected shape [2, 8], got"),
        (lambda: functional.layer_norm_modulate(x, m, m.int()), "shift: expected a float dtype"),
        (lambda: functional.layer_norm_modulate(x.int(), m, m), "x: expected a float dtype"),
        (
            lambda: functional.gated_residual_layer_norm_modulate(x, y[:, :1], m, m, m),
            "y: expected x's shape [2, 3, 8], got [2, 1, 8]",
        ),
        (
            lambda: functional.gated_residual_layer_norm_modulate(x, y, m[:, :4], m, m),
            "gate: expected shape [2, 8], got [2, 4]",
        ),
        (lambda: functional.attention(x, 2), "divisible by 3 * n_heads = 6, got 8"),
        (lambda: functional.attention(m, 2), "qkv: expected 3 dimensions"),
    ],
)
def test_bad_arguments_are_value_errors_that_name_them(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
