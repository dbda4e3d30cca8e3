"""`qk_norm_rope`, `qk_attention` and `swiglu`: their formulas, the error rule, and their errors."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fastdit import functional, reference
from fastdit.testing import check_against_oracle, relative_error

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NORMS = ("none", "layer", "rms")
EPS = 1e-3
by_norm = pytest.mark.parametrize("norm", NORMS)
by_rope = pytest.mark.parametrize("rope", [False, True], ids=["still", "turned"])
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def lay_out(qkv, view):
    """Return the same values, with gaps between rows, at an odd address, or channels far apart."""
    if view == "contiguous":
        return qkv
    if view == "strided":
        return torch.cat([qkv, qkv.new_zeros(*qkv.shape[:2], 7)], dim=-1)[..., :-7]
    if view == "offset":
        return torch.cat([qkv.new_zeros(1), qkv.flatten()])[1:].view(qkv.shape)
    return qkv.mT.contiguous().mT


def make(norm, rope, B=3, N=5, h=2, d=8, dtype=torch.float64, view="contiguous"):
    """Return (qkv, q_weight, q_bias, k_weight, k_bias) and a table whose angles mean nothing."""
    weights = [torch.randn(d).to(dtype) for _ in range(4)]
    if norm != "layer":
        weights[1] = weights[3] = None
    if norm == "none":
        weights[0] = weights[2] = None
    angles = 3 * torch.randn(N, d // 2, dtype=torch.float64)
    table = torch.stack([angles.cos(), angles.sin()]).float() if rope else None
    return [lay_out(torch.randn(B, N, 3 * h * d).to(dtype), view), *weights], table


def by_hand(qkv, h, q_weight, q_bias, k_weight, k_bias, rope, eps):
    """Compute every element by itself, with Python's floats."""
    B, N, D3 = qkv.shape
    d = D3 // (3 * h)
    out = qkv.clone()
    for b in range(B):
        for n in range(N):
            for part, weight, bias in ((0, q_weight, q_bias), (1, k_weight, k_bias)):
                for head in range(h):
                    first = part * h * d + head * d
                    x = qkv[b, n, first : first + d].tolist()
                    if weight is not None:
                        mean = sum(x) / d if bias is not None else 0.0
                        size = math.sqrt(sum((e - mean) ** 2 for e in x) / d + eps)
                        x = [(e - mean) / size * w for e, w in zip(x, weight.tolist(), strict=True)]
                    if bias is not None:
                        x = [e + s for e, s in zip(x, bias.tolist(), strict=True)]
                    for i in range(d // 2 if rope is not None else 0):
                        cos, sin = rope[0, n, i].item(), rope[1, n, i].item()
                        a, c = x[2 * i], x[2 * i + 1]
                        x[2 * i], x[2 * i + 1] = a * cos - c * sin, a * sin + c * cos
                    out[b, n, first : first + d] = torch.tensor(x, dtype=qkv.dtype)
    return out


@by_norm
@by_rope
@pytest.mark.parametrize("backend", [None, "reference"])
def test_each_element_is_that_of_the_formula(norm, rope, backend):
    tensors, table = make(norm, rope)
    expected = by_hand(tensors[0], 2, *tensors[1:], table, EPS)
    actual = functional.qk_norm_rope(tensors[0], 2, *tensors[1:], table, EPS, backend)
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)
    single = [None if t is None else t.float() for t in tensors]
    actual = functional.qk_norm_rope(single[0], 2, *single[1:], table, EPS, backend)
    assert actual.dtype == torch.float32 and relative_error(actual, expected) < 1e-6


def results(function, tensors, upstream, h, *rest):
    """Return the output and the gradients of qkv and of all weights."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(leaves[0], h, *leaves[1:], *rest)
    out.backward(upstream)
    return [out.detach(), *(t.grad for t in leaves if t is not None)]


def check_pooled(function, batches, h, rope):
    """Apply the error rule to the output and each gradient, pooled over batches of tensors.

    Plain ops take all tensors in qkv's dtype. A weight's gradient that is too small even when
    pooled is left to the other cases.
    """
    plain, exact_rope, runs = reference.qk_norm_rope, None if rope is None else rope.double(), []
    for tensors, upstream in batches:
        same, exact = (
            [None if t is None else t.to(dtype) for t in tensors]
            for dtype in (tensors[0].dtype, torch.float64)
        )
        runs.append(
            (
                results(function, tensors, upstream, h, rope, EPS),
                results(plain, same, upstream, h, rope, EPS),
                results(plain, exact, upstream.double(), h, exact_rope, EPS),
            )
        )
    columns = [list(zip(*column, strict=True)) for column in zip(*runs, strict=True)]
    for pooled in zip(*columns, strict=True):
        triple = [torch.cat([t.flatten() for t in tensors]) for tensors in pooled]
        if triple[0].numel() >= 4096:
            check_against_oracle(*triple)


CASES = [
    ("layer", True, 72, 5, "strided"),
    ("rms", True, 64, 7, "contiguous"),
    ("rms", False, 8, 33, "offset"),
    ("layer", False, 8, 33, "apart"),
    ("none", True, 8, 33, "offset"),
    ("none", True, 64, 7, "apart"),
]


@by_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda c: "{}-rope{:d}-d{}-N{}-{}".format(*c))
def test_it_meets_the_error_rule(case, dtype):
    norm, rope, d, N, view = case
    batches = []
    for _ in range(-(-4096 // d) if d >= 64 else 2):  # enough to judge the weights' gradients
        tensors, table = make(norm, rope, 3, N, 2, d, dtype, view)
        batches.append((tensors, torch.randn(tensors[0].shape).to(dtype)))
    check_pooled(functional.qk_norm_rope, batches, 2, table)


@pytest.mark.parametrize("norm", NORMS[1:])
def test_under_autocast_float32_weights_meet_the_error_rule_of_bfloat16(norm):
    batches = []
    for _ in range(64):
        tensors, table = make(norm, True, 2, 5, 2, 64, torch.float32)
        tensors[0] = tensors[0].bfloat16()
        batches.append((tensors, torch.randn(tensors[0].shape).bfloat16()))

    def under_autocast(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            out = functional.qk_norm_rope(*arguments)
        assert out.dtype == torch.bfloat16
        return out

    check_pooled(under_autocast, batches, 2, table)


@by_norm
@by_rope
@pytest.mark.parametrize("N", [1, 5], ids="N{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_qk_attention_is_attention_of_the_normed_and_turned(norm, rope, N, dtype):
    tensors, table = make(norm, rope, N=N, dtype=dtype)
    upstream = torch.randn(3, N, 16).to(dtype)

    def composed(*arguments):
        return reference.attention(reference.qk_norm_rope(*arguments), arguments[1])

    exact = [None if t is None else t.double() for t in tensors]
    expected = results(
        composed, exact, upstream.double(), 2, None if table is None else table.double(), EPS
    )
    actual = results(functional.qk_attention, tensors, upstream, 2, table, EPS)
    for own, other in zip(actual, expected, strict=True):
        assert own.dtype == dtype
        # Some gradients are zero, such as a key's bias that is not turned: softmax ignores it.
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        assert torch.allclose(own.double(), other, rtol=tolerance, atol=tolerance)


def test_qk_attention_has_the_dtype_of_attention():
    """qkv's, or under autocast autocast's, whatever the weights' is."""
    tensors, table = make("rms", True, dtype=torch.float32)
    for own in (torch.float32, torch.bfloat16):
        qkv = tensors[0].to(own)
        assert functional.qk_attention(qkv, 2, *tensors[1:], table).dtype == own
        with torch.autocast("cpu", torch.bfloat16):
            assert functional.qk_attention(qkv, 2, *tensors[1:], table).dtype == torch.bfloat16


def test_scores_depend_on_differences_of_rows_and_columns_alone():
    """One query and one key at each place, so that scores can be compared between places."""
    rows, columns, d = 5, 4, 16
    q, k = torch.randn(2, d, dtype=torch.float64)
    qkv = torch.cat([q, k, q]).expand(1, rows * columns, 3 * d)
    table = functional.rope_table(d, (rows, columns)).double()
    turned = functional.qk_norm_rope(qkv, 1, rope=table)
    scores = turned[0, :, :d] @ turned[0, :, d : 2 * d].T
    scores = scores.view(rows, columns, rows, columns)
    expected = {}
    for n in range(rows):
        for m in range(columns):
            for i in range(rows):
                for j in range(columns):
                    first = expected.setdefault((n - i, m - j), scores[n, m, i, j])
                    assert abs(scores[n, m, i, j] - first) < 1e-5
    assert torch.stack(list(expected.values())).std() > 0.1
    assert torch.allclose(scores[2, 1, 2, 1], q @ k)


def test_it_compiles_whole_and_has_the_same_gradients():
    tensors, table = make("rms", True, dtype=torch.float32)
    for function, width in ((functional.qk_norm_rope, 48), (functional.qk_attention, 16)):
        upstream = torch.randn(3, 5, width)
        counter = CompileCounter()
        compiled = torch.compile(function, backend=counter, fullgraph=True)
        actual = results(compiled, tensors, upstream, 2, table, EPS)
        assert counter.frame_count == 1
        for own, eager in zip(
            actual, results(function, tensors, upstream, 2, table, EPS), strict=True
        ):
            assert relative_error(own, eager) < 1e-6


def test_gradients_equal_finite_differences():
    tensors, table = make("layer", True, B=1, N=2, h=1, d=4)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(
        lambda *own: functional.qk_norm_rope(own[0], 1, *own[1:], table), leaves
    )
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(functional.swiglu, [x])


qkv, w, table = torch.zeros(2, 3, 24), torch.zeros(4), torch.zeros(2, 3, 2)
WRONG = {
    "q_weight: expected shape [4], got [5]": (qkv, 2, torch.zeros(5), None, w),
    "k_weight: expected shape [4], got [1, 4]": (qkv, 2, w, None, w[None]),
    "k_weight: expected a tensor, as q_weight is, got None": (qkv, 2, w),
    "k_weight: expected None, as q_weight is, got a tensor": (qkv, 2, None, None, w),
    "k_bias: expected a tensor, as q_bias is, got None": (qkv, 2, w, w, w),
    "q_bias: expected None where q_weight is None, got a tensor": (qkv, 2, None, w, None, w),
    "q_weight: expected a float dtype, got torch.int64": (qkv, 2, w.long(), None, w),
    "k_bias: expected qkv's device cpu, got meta": (qkv, 2, w, w, w, w.to("meta")),
    "rope: expected shape [2, 3, 2], got [2, 4, 2]": (
        qkv,
        2,
        w,
        None,
        w,
        None,
        table.new_zeros(2, 4, 2),
    ),
    "rope: expected a float dtype, got torch.bool": (qkv, 2, w, None, w, None, table.bool()),
    "rope: expected qkv's device cpu, got meta": (qkv, 2, w, None, w, None, table.to("meta")),
    "rope: expected None for an odd head dim, 1, got a tensor": (qkv, 8, *[None] * 4, table),
    "qkv: expected a last dimension divisible by 3 * n_heads = 15, got 24": (qkv, 5, w, None, w),
    "n_heads: expected at least 1, got 0": (qkv, 0, w, None, w),
    "qkv: expected 3 dimensions [B, N, channels], got [3, 24]": (qkv[0], 2, w, None, w),
}


@pytest.mark.parametrize("function", [functional.qk_norm_rope, functional.qk_attention])
@pytest.mark.parametrize("message", WRONG)
def test_an_error_names_the_argument(function, message):
    with pytest.raises(ValueError) as error:
        function(*WRONG[message])
    assert str(error.value) == message


@pytest.mark.parametrize("function", [functional.qk_norm_rope, functional.qk_attention])
def test_triton_raises_where_it_cannot_run(function):
    with pytest.raises(ValueError, match=r"backend: 'triton' (expects|needs|computes)"):
        function(qkv.double(), 2, w, None, w, backend="triton")
    with pytest.raises(ValueError, match=r"backend: 'triton' takes head dims up to 128, got 136"):
        function(
            torch.zeros(1, 1, 3 * 136),
            1,
            w.new_zeros(136),
            None,
            w.new_zeros(136),
            backend="triton",
        )
    with pytest.raises(ValueError, match="backend: expected"):
        function(qkv, 2, w, None, w, backend="cpp")


@by_dtype
def test_swiglu_meets_the_error_rule(dtype):
    x, upstream = torch.randn(5, 33, 2 * 36), torch.randn(5, 33, 36)
    runs = []
    for swiglu, own in (
        (functional.swiglu, dtype),
        (reference.swiglu, dtype),
        (reference.swiglu, torch.float64),
    ):
        leaf = x.to(dtype).to(own).detach().clone().requires_grad_()
        out = swiglu(leaf)
        out.backward(upstream.to(dtype).to(own))
        runs.append((out.detach(), leaf.grad))
    for triple in zip(*runs, strict=True):
        check_against_oracle(*triple)


def test_float64_swiglu_is_its_formula():
    x = torch.randn(3, 7, 10, dtype=torch.float64).mT.contiguous().mT
    expected = torch.empty(3, 7, 5, dtype=torch.float64)
    for i in range(5):
        expected[..., i] = x[..., i] / (1 + (-x[..., i]).exp()) * x[..., 5 + i]
    assert torch.allclose(functional.swiglu(x), expected, rtol=1e-12, atol=1e-12)


def test_swiglu_compiles_whole():
    x, counter = torch.randn(3, 8), CompileCounter()
    compiled = torch.compile(functional.swiglu, backend=counter, fullgraph=True)
    assert torch.equal(compiled(x), functional.swiglu(x)) and counter.frame_count == 1


def test_swiglus_errors_name_the_argument():
    for x, message in (
        (torch.zeros(2, 7), "x: expected an even last dimension, got shape [2, 7]"),
        (torch.zeros(()), "x: expected an even last dimension, got shape []"),
        (torch.zeros(2, 4, dtype=torch.int64), "x: expected a float dtype, got torch.int64"),
    ):
        with pytest.raises(ValueError) as error:
            functional.swiglu(x)
        assert str(error.value) == message
    with pytest.raises(ValueError, match="backend: expected"):
        functional.swiglu(torch.zeros(2, 4), backend="cpp")
