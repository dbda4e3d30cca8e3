"""The public ops: the error rule against float64, and errors that name the argument."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fastdit import functional, reference
from fastdit.ops import dispatch
from fastdit.testing import check_against_oracle

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = [(1, 1, 64), (3, 5, 72), (3, 16, 64), (1, 63, 384), (3, 300, 96), (2, 130, 36)]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-N{}-D{}".format(*s))


def inputs_of(op, shape, dtype):
    """Return an op's inputs; the modulation is chunk views of one tensor, as in the model."""
    B, N, D = shape
    if op == "attention":
        return [torch.randn(B, N, 3 * D).to(dtype)]
    x, y = torch.randn(2, B, N, D).to(dtype)
    gate, scale, shift = torch.randn(B, 3 * D).to(dtype).chunk(3, dim=1)
    return [x, scale, shift] if op == "layer_norm_modulate" else [x, y, gate, scale, shift]


def outputs_and_gradients(module, op, inputs, upstream, **options):
    """Return all outputs and all inputs' gradients, flattened."""
    leaves = [i.detach().requires_grad_() for i in inputs]
    outs = getattr(module, op)(*leaves, 4 if op == "attention" else 1e-5, **options)
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.autograd.backward(outs, [upstream] * len(outs))
    return [t.detach().flatten() for t in (*outs, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize(
    "op", ["layer_norm_modulate", "gated_residual_layer_norm_modulate", "attention"]
)
@by_shape
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [*((dtype, None) for dtype in DTYPES.values()), (torch.float32, "cpp")],
    ids=[*DTYPES, "float32-cpp"],
)
def test_ops_and_their_gradients_meet_the_error_rule(op, shape, dtype, backend):
    if (op, backend) == ("attention", "cpp"):
        pytest.skip("attention has no C++ kernel")
    runs = []
    torch.manual_seed(0)
    elements = shape[0] * shape[2]  # of the smallest tensor, a modulation's gradient
    for _ in range(-(-4096 // elements)):
        inputs, upstream = inputs_of(op, shape, dtype), torch.randn(shape).to(dtype)
        exact = [i.double() for i in inputs]
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


@pytest.mark.parametrize("n_heads", [1, 3, 8], ids="h{}".format)
def test_float64_attention_is_softmax_attention(n_heads):
    """Compare with the formula in a loop over images, heads and queries."""
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


def layer_norm_modulate_by_hand(x, scale, shift, eps):
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + eps).sqrt() * (1 + scale[:, None]) + shift[:, None]


def strided_inputs():
    """Return x and y as transposes and the modulation as chunks, none of them contiguous."""
    x, y = torch.randn(2, 33, 5, 3, dtype=torch.float64).permute(0, 3, 2, 1)
    gate, scale, shift = torch.randn(3, 3 * 33, dtype=torch.float64).chunk(3, dim=1)
    assert not any(t.is_contiguous() for t in (x, y, gate, scale, shift))
    return x + 4, y, gate, scale, shift


def test_float64_layer_norm_modulate_is_its_formula():
    x, _, _, scale, shift = strided_inputs()
    expected = layer_norm_modulate_by_hand(x, scale, shift, 1e-3)
    actual = functional.layer_norm_modulate(x, scale, shift, 1e-3)
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_float64_gated_residual_layer_norm_modulate_is_its_formula():
    x, y, gate, scale, shift = strided_inputs()
    residual = torch.stack([x[b] + gate[b] * y[b] for b in range(3)])
    expected = layer_norm_modulate_by_hand(residual, scale, shift, 1e-3)
    actual = functional.gated_residual_layer_norm_modulate(x, y, gate, scale, shift, 1e-3)
    assert torch.allclose(actual[0], residual, rtol=1e-12, atol=1e-12)
    assert torch.allclose(actual[1], expected, rtol=1e-12, atol=1e-12)


def test_mixed_dtypes_keep_the_residual_and_follow_the_modulation():
    x = torch.randn(2, 4, 8)
    y, (gate, scale, shift) = torch.randn(2, 4, 8).bfloat16(), torch.randn(3, 2, 8).bfloat16()
    residual, modulated = functional.gated_residual_layer_norm_modulate(x, y, gate, scale, shift)
    assert (residual.dtype, modulated.dtype) == (torch.float32, torch.bfloat16)
    assert functional.layer_norm_modulate(x, scale, shift).dtype == torch.bfloat16


def leaves(*shapes):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_gradients_equal_finite_differences():
    tokens, vector = (2, 3, 4), (2, 4)
    gated = functional.gated_residual_layer_norm_modulate
    assert torch.autograd.gradcheck(lambda qkv: functional.attention(qkv, 2), leaves((2, 3, 12)))
    assert torch.autograd.gradcheck(functional.layer_norm_modulate, leaves(tokens, vector, vector))
    assert torch.autograd.gradcheck(gated, leaves(tokens, tokens, vector, vector, vector))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_one_token_attends_to_itself_alone(backend):
    qkv = torch.randn(3, 1, 96, requires_grad=True)
    out = functional.attention(qkv, 2, backend=backend)
    out.sum().backward()
    assert torch.equal(out, qkv[..., 64:])
    assert not qkv.grad[..., :64].any() and (qkv.grad[..., 64:] == 1).all()


def test_heads_too_wide_for_the_kernels_run_in_plain_pytorch():
    qkv = torch.randn(2, 5, 3 * 136)
    expected = reference.attention(qkv, 1)
    assert torch.allclose(functional.attention(qkv, 1), expected, atol=1e-5)


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
        (lambda: functional.attention(x, 0), "n_heads: expected at least 1, got 0"),
        (
            lambda: functional.layer_norm_modulate(x, m.to("meta"), m),
            "scale: expected x's device cpu, got meta",
        ),
        (
            lambda: functional.attention(torch.zeros(1, 2, 48).to(torch.float8_e4m3fn), 2),
            "qkv: expected a float dtype, got torch.float8_e4m3fn",
        ),
        (
            lambda: functional.layer_norm_modulate(x, m, m, backend="cuda"),
            "backend: expected one of reference, cpp, triton; got 'cuda'",
        ),
        (
            lambda: functional.attention(torch.zeros(1, 2, 3 * 136), 1, backend="triton"),
            "backend: 'triton' takes head dims up to 128, got 136",
        ),
        (
            lambda: functional.layer_norm_modulate(x.double(), m, m, backend="triton"),
            "backend: 'triton' computes in float32, got float64; use backend='reference'",
        ),
        (
            lambda: functional.attention(torch.zeros(1, 1, 48, device="meta"), 1, backend="triton"),
            "backend: 'triton' expects tensors on CUDA (or TRITON_INTERPRET=1 for the CPU), got",
        ),
        (
            lambda: functional.gated_residual_layer_norm_modulate(x, y.int(), m, m, m),
            "y: expected a float dtype, got torch.int32",
        ),
    ],
)
def test_bad_arguments_are_value_errors_that_name_them(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


@pytest.mark.parametrize("op", ["layer_norm_modulate", "gated_residual_layer_norm_modulate"])
def test_function_transforms_differentiate_the_ops(op):
    """A custom op would give no tangent to torch.func.jvp and no gradient to torch.func.grad."""
    torch.manual_seed(0)
    inputs = inputs_of(op, (50, 33, 64), torch.float32)  # runs in C++ by default

    def out(*tensors):
        result = getattr(functional, op)(*tensors)
        return result[1] if isinstance(result, tuple) else result

    _, tangent = torch.func.jvp(out, tuple(inputs), tuple(torch.ones_like(t) for t in inputs))
    h = 1e-3
    difference = (out(*(t + h for t in inputs)) - out(*(t - h for t in inputs))) / (2 * h)
    assert torch.allclose(tangent, difference, atol=1e-2)
    leaves = [t.detach().requires_grad_() for t in inputs]
    out(*leaves).square().sum().backward()
    gradient = torch.func.grad(lambda x: out(x, *inputs[1:]).square().sum())(inputs[0])
    assert torch.allclose(gradient, leaves[0].grad, rtol=1e-4, atol=1e-4)

    for backend in ("triton", "cpp"):
        named = functools.partial(getattr(functional, op), backend=backend)
        with pytest.raises(ValueError, match=f"backend: '{backend}' supports neither torch.func's"):
            torch.func.jvp(named, tuple(inputs), tuple(torch.ones_like(t) for t in inputs))


def test_naming_the_reference_backend_builds_no_cpp(monkeypatch):
    monkeypatch.setattr(dispatch, "has_cpp", lambda: pytest.fail("the C++ was asked for"))
    for op in ("layer_norm_modulate", "gated_residual_layer_norm_modulate"):
        getattr(functional, op)(*inputs_of(op, (50, 33, 64), torch.float32), backend="reference")


def test_a_compiled_layer_norm_is_one_graph_for_all_batches():
    """No guard compares the size of the input with that from which the C++ is worth its call."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(functional.layer_norm_modulate, backend=counter, dynamic=True)
    for batch in (2, 50, 200):
        modulation = torch.randn(batch, 64)
        compiled(torch.randn(batch, 16, 64), modulation, modulation)
    assert counter.frame_count == 1
