"""`cross_attention` and `joint_attention`: their formulas, padding, the error rule, errors."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fastdit import functional, reference
from fastdit.testing import check_against_oracle, relative_error

EPS = 1e-3
LENGTHS = torch.tensor([2, 7, 5])
by_lengths = pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
by_norm = pytest.mark.parametrize("norm", [False, True], ids=["plain", "normed"])


def make_cross(B=3, N=5, M=7, h=2, d=6, dtype=torch.float64):
    """Return queries, and keys and values that are a layer's slice of those of all layers."""
    kv = torch.randn(B, 4, M, 2 * h * d).to(dtype)[:, 1]
    return [torch.randn(B, N, h * d).to(dtype), kv]


def make_joint(norm, B=3, N=5, M=7, h=2, d=6, dtype=torch.float64):
    """Return both packed tensors, of which the text's has gaps between rows, and the weights."""
    text = torch.randn(B, M, 3 * h * d + 4).to(dtype)[..., :-4]
    weights = [1 + torch.randn(d).to(dtype) / 2 if norm else None for _ in range(4)]
    return [torch.randn(B, N, 3 * h * d).to(dtype), text, *weights]


def joint(function, lengths, h=2, **options):
    """Return a function of the tensors that `make_joint` returns."""

    def call(image, text, *weights):
        return function(image, text, h, weights, lengths, EPS, **options)

    return call


def attend_by_hand(q, keys, values):
    """One query [d] and lists of keys and values [d], with Python's floats."""
    scores = [math.exp(sum(map(math.prod, zip(q, k, strict=True))) / len(q) ** 0.5) for k in keys]
    weighted = ([p * x for x in v] for p, v in zip(scores, values, strict=True))
    return [sum(column) / sum(scores) for column in zip(*weighted, strict=True)]


def norm_by_hand(x, weight):
    if weight is None:
        return x
    size = math.sqrt(sum(e * e for e in x) / len(x) + EPS)
    return [e / size * w for e, w in zip(x, weight.tolist(), strict=True)]


@by_lengths
@pytest.mark.parametrize("backend", [None, "reference"])
def test_each_element_of_cross_attention_is_that_of_the_formula(ragged, backend):
    q, kv = make_cross()
    lengths, d = LENGTHS if ragged else None, 6
    expected = torch.empty_like(q)
    for b, own in enumerate(LENGTHS.tolist() if ragged else [7] * 3):
        for head in (slice(0, d), slice(d, 2 * d)):
            keys = kv[b, :own, :12][:, head].tolist()
            values = kv[b, :own, 12:][:, head].tolist()
            for n in range(5):
                found = attend_by_hand(q[b, n, head].tolist(), keys, values)
                expected[b, n, head] = torch.tensor(found, dtype=q.dtype)
    actual = functional.cross_attention(q, kv, 2, lengths, backend)
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)
    actual = functional.cross_attention(q.float(), kv.float(), 2, lengths, backend)
    assert actual.dtype == torch.float32 and relative_error(actual, expected) < 1e-6


@by_lengths
@by_norm
@pytest.mark.parametrize("backend", [None, "reference"])
def test_each_element_of_joint_attention_is_that_of_the_formula(norm, ragged, backend):
    image, text, *weights = make_joint(norm)
    lengths, d = LENGTHS if ragged else None, 6
    expected = torch.zeros(3, 5, 12).double(), torch.zeros(3, 7, 12).double()
    for b, own in enumerate(LENGTHS.tolist() if ragged else [7] * 3):
        for first in (0, d):
            q, k, v = [], [], []
            for rows, (q_weight, k_weight) in (
                (image[b], weights[:2]),
                (text[b, :own], weights[2:]),
            ):
                for row in rows:
                    parts = [row[i * 12 + first : i * 12 + first + d].tolist() for i in range(3)]
                    q.append(norm_by_hand(parts[0], q_weight))
                    k.append(norm_by_hand(parts[1], k_weight))
                    v.append(parts[2])
            found = torch.tensor([attend_by_hand(one, k, v) for one in q], dtype=torch.float64)
            expected[0][b, :, first : first + d] = found[:5]
            expected[1][b, :own, first : first + d] = found[5:]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        tensors = [None if t is None else t.to(dtype) for t in (image, text, *weights)]
        actual = joint(functional.joint_attention, lengths, backend=backend)(*tensors)
        for own, exact in zip(actual, expected, strict=True):
            assert own.dtype == dtype
            assert torch.allclose(own.double(), exact, rtol=tolerance, atol=tolerance)


def results(call, tensors, upstream):
    """Return the outputs and the gradients of all tensors that are there."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    outs = call(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.autograd.backward(outs, [up.to(out) for up, out in zip(upstream, outs, strict=True)])
    return [*(out.detach() for out in outs), *(t.grad for t in leaves if t is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_they_meet_the_error_rule(dtype):
    lengths = torch.tensor([21, 3, 14])
    ups = [torch.randn(3, 33, 144), torch.randn(3, 21, 144)]
    sizes = {"N": 33, "M": 21, "d": 72, "dtype": dtype}

    def cross(function):
        return lambda q, kv: function(q, kv, 2, lengths)

    calls = [
        (
            make_cross(**sizes),
            cross(functional.cross_attention),
            cross(reference.cross_attention),
            ups[:1],
        ),
        (
            make_joint(True, **sizes),
            joint(functional.joint_attention, lengths),
            joint(reference.joint_attention, lengths),
            ups,
        ),
    ]
    for tensors, own, plain, upstream in calls:
        exact = results(plain, [t.double() for t in tensors], [up.to(dtype) for up in upstream])
        for triple in zip(
            results(own, tensors, upstream), results(plain, tensors, upstream), exact, strict=True
        ):
            if triple[0].dim() > 1:  # a weight [d] has too few elements to be judged
                check_against_oracle(*triple)


@by_norm
def test_padding_changes_nothing_and_gets_no_gradient(norm):
    """Whatever lies past a text's length, and beside the image in its batch."""
    ups = torch.randn(3, 5, 12), torch.randn(3, 7, 12)
    cases = [
        (make_cross(dtype=torch.float32), None, ups[:1]),
        (make_joint(norm, dtype=torch.float32), joint, ups),
    ]
    for tensors, kind, upstream in cases:

        def call(lengths, kind=kind):
            if kind is None:
                return lambda q, kv: functional.cross_attention(q, kv, 2, lengths)
            return joint(functional.joint_attention, lengths)

        before = results(call(LENGTHS), tensors, upstream)
        other = [t if t is None else t.clone() for t in tensors]
        for b, own in enumerate(LENGTHS.tolist()):
            other[1][b, own:] = 1e4
        outs = 1 if kind is None else 2
        for own, changed in zip(before, results(call(LENGTHS), other, upstream), strict=True):
            assert torch.equal(own, changed)
        assert not any(before[outs + 1][b, n:].any() for b, n in enumerate(LENGTHS.tolist()))
        if kind is not None:
            assert not any(before[1][b, n:].any() for b, n in enumerate(LENGTHS.tolist()))
        for b, own in enumerate(LENGTHS.tolist()):
            alone = [tensors[0][b : b + 1], tensors[1][b : b + 1, :own], *tensors[2:]]
            found = call(None)(*alone)
            image = found if kind is None else found[0]
            assert relative_error(before[0][b : b + 1], image) < 1e-6


@pytest.mark.parametrize("way", ["eager", "compiled", "float64"])
def test_nan_in_padding_reaches_nothing(way):
    """Neither what is returned nor a gradient, of the weights of norms either."""
    dtype = torch.float64 if way == "float64" else torch.float32
    cross, both = make_cross(dtype=dtype), make_joint(True, dtype=dtype)

    def call(q, kv, *rest):
        image, text = joint(functional.joint_attention, LENGTHS)(*rest)
        return functional.cross_attention(q, kv, 2, LENGTHS), image, text

    run = torch.compile(call, backend="eager", fullgraph=True) if way == "compiled" else call
    upstream = [torch.randn(3, n, 12) for n in (5, 5, 7)]
    expected = results(run, cross + both, upstream)
    for text in (cross[1], both[1]):
        for b, own in enumerate(LENGTHS.tolist()):
            text[b, own:] = float("nan")
    for own, clean in zip(results(run, cross + both, upstream), expected, strict=True):
        assert torch.equal(own, clean)


def test_they_compile_whole_and_have_the_same_results():
    """One graph for both, in which lengths are a mask; the eager results have none."""
    cross, both = make_cross(dtype=torch.float32), make_joint(True, dtype=torch.float32)
    counter = CompileCounter()

    def call(q, kv, *rest):
        image, text = joint(functional.joint_attention, LENGTHS)(*rest)
        return functional.cross_attention(q, kv, 2, LENGTHS), image, text

    compiled = torch.compile(call, backend=counter, fullgraph=True)
    upstream = [torch.randn(3, n, 12) for n in (5, 5, 7)]
    actual = results(compiled, cross + both, upstream)
    assert counter.frame_count == 1
    for own, eager in zip(actual, results(call, cross + both, upstream), strict=True):
        assert relative_error(own, eager) < 1e-5


def test_under_autocast_they_have_its_dtype():
    q, kv = make_cross(dtype=torch.float32)
    image, text, *weights = make_joint(True, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outs = [
            functional.cross_attention(q, kv.bfloat16(), 2, LENGTHS),
            *functional.joint_attention(image, text.bfloat16(), 2, tuple(weights), LENGTHS),
        ]
    assert [out.dtype for out in outs] == [torch.bfloat16] * 3


def test_an_empty_batch_is_an_empty_result():
    lengths = torch.zeros(0, dtype=torch.int64)
    assert functional.cross_attention(*make_cross(B=0), 2, lengths).shape == (0, 5, 12)
    for dtype in (torch.float32, torch.float64):
        image, text, *_ = make_joint(False, B=0, dtype=dtype)
        outs = functional.joint_attention(image, text, 2, lengths=lengths)
        assert [list(out.shape) for out in outs] == [[0, 5, 12], [0, 7, 12]]


def test_gradients_equal_finite_differences():
    q, kv = (t.requires_grad_() for t in make_cross(1, 2, 3, 1, 3))
    lengths = torch.tensor([2])
    assert torch.autograd.gradcheck(
        lambda *own: functional.cross_attention(*own, 1, lengths), (q, kv)
    )
    leaves = [t.requires_grad_() for t in make_joint(True, 1, 2, 3, 1, 3)]
    assert torch.autograd.gradcheck(joint(functional.joint_attention, lengths, 1), leaves)


q, kv, long = torch.zeros(2, 3, 8), torch.zeros(2, 4, 16), torch.tensor([4, 1])
CROSS = {
    "q: expected 3 dimensions [B, N, channels], got [3, 8]": (q[0], kv, 2),
    "kv: expected a float dtype, got torch.int64": (q, kv.long(), 2),
    "n_heads: expected at least 1, got 0": (q, kv, 0),
    "n_heads: expected at least 1, got 2.0": (q, kv, 2.0),
    "q: expected a tensor [B, N, channels], got list": ([1.0], kv, 2),
    "q: expected a last dimension divisible by n_heads = 3, got 8": (q, kv, 3),
    "kv: expected a last dimension of 2 * 8, keys and values as wide as q, got 15": (
        q,
        kv[..., 1:],
        2,
    ),
    "kv: expected q's batch of 2, got 1": (q, kv[:1], 2),
    "kv: expected at least 1 token, got 0": (q, kv[:, :0], 2),
    "kv: expected q's device cpu, got meta": (q, kv.to("meta"), 2),
    "kv: expected q's dtype torch.float32, got torch.bfloat16": (q, kv.bfloat16(), 2),
    "lengths: expected int64 of shape [2], got torch.int32 of [2]": (q, kv, 2, long.int()),
    "lengths: expected int64 of shape [2], got list": (q, kv, 2, [4, 1]),
    "lengths: expected int64 of shape [2], got torch.int64 of [1]": (q, kv, 2, long[:1]),
    "lengths: expected kv's device cpu, got meta": (q, kv, 2, long.to("meta")),
    "lengths: expected 1 to 4, the tokens of kv, got 0 to 3": (q, kv, 2, long - 1),
    "lengths: expected 1 to 4, the tokens of kv, got 2 to 5": (q, kv, 2, long + 1),
    "backend: expected one of reference, triton; got 'cpp'": (q, kv, 2, None, "cpp"),
}
image, text, w = torch.zeros(2, 3, 24), torch.zeros(2, 4, 24), torch.zeros(4)
JOINT = {
    "qkv_image: expected a last dimension divisible by 3 * n_heads = 15, got 24": (image, text, 5),
    "qkv_text: expected 3 dimensions [B, N, channels], got [4, 24]": (image, text[0], 2),
    "qkv_text: expected a last dimension of 24, as qkv_image has, got 12": (
        image,
        text[..., :12],
        2,
    ),
    "qkv_text: expected qkv_image's batch of 2, got 1": (image, text[:1], 2),
    "qkv_text: expected qkv_image's device cpu, got meta": (image, text.to("meta"), 2),
    "qkv_text: expected qkv_image's dtype torch.float32, got torch.float64": (
        image,
        text.double(),
        2,
    ),
    "norms: expected four tensors or four times None, got a tensor, a tensor, None, a tensor": (
        image,
        text,
        2,
        (w, w, None, w),
    ),
    "norms: expected four tensors or four times None, got a tensor, a tensor": (
        image,
        text,
        2,
        (w, w),
    ),
    "norms[2]: expected shape [4], got [3]": (image, text, 2, (w, w, w[1:], w)),
    "norms[3]: expected a float dtype, got torch.int64": (image, text, 2, (w, w, w, w.long())),
    "norms[0]: expected qkv_image's device cpu, got meta": (
        image,
        text,
        2,
        (w.to("meta"), w, w, w),
    ),
    "lengths: expected int64 of shape [2], got torch.float32 of [2]": (
        image,
        text,
        2,
        (None,) * 4,
        long.float(),
    ),
    "lengths: expected 1 to 4, the tokens of qkv_text, got 2 to 5": (
        image,
        text,
        2,
        (None,) * 4,
        long + 1,
    ),
}


@pytest.mark.parametrize("message", [*CROSS, *JOINT])
def test_an_error_names_the_argument(message):
    function = functional.cross_attention if message in CROSS else functional.joint_attention
    with pytest.raises(ValueError) as error:
        function(*{**CROSS, **JOINT}[message])
    assert str(error.value) == message


def test_triton_raises_where_it_cannot_run():
    wide = torch.zeros(1, 2, 136)
    for call, message in (
        (
            lambda: functional.cross_attention(q.double(), kv.double(), 2, backend="triton"),
            "computes in float32, got float64",
        ),
        (
            lambda: functional.cross_attention(wide, wide.repeat(1, 1, 2), 1, backend="triton"),
            "takes head dims up to 128, got 136",
        ),
        (
            lambda: functional.joint_attention(
                image, text, 2, tuple(w.double() for _ in range(4)), backend="triton"
            ),
            "(computes in float32, got float64|expects tensors on CUDA)",
        ),
    ):
        with pytest.raises(ValueError, match=f"backend: 'triton' {message}"):
            call()
