"""`cross_attention` and `joint_attention` in Triton: the error rule, padding, tracing, launches."""

import os

import pytest
import torch
from torch.library import opcheck

from fastdit import functional, reference
from fastdit.kernels import attention_configs as sizes
from fastdit.kernels import common, text_attention, text_attention_backward
from fastdit.ops import text_attention as ops
from fastdit.testing import check_against_oracle, relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPS = 1e-3


def make(kind, B, N, M, h, d):
    """Return the tensors of "cross", "joint" or "normed", the text's as the models lay it out."""
    if kind == "cross":
        return [torch.randn(B, N, h * d), torch.randn(B, 3, M, 2 * h * d)[:, 1]]
    weights = [1 + torch.randn(d) / 2 for _ in range(4 if kind == "normed" else 0)]
    text = torch.randn(B, M, 3 * h * d + 8)[..., :-8]
    return [torch.randn(B, N, 3 * h * d), text, *weights]


def run(module, kind, tensors, h, lengths, **backend):
    """Return the outputs and the gradients of all tensors, under one upstream gradient."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    if kind == "cross":
        outs = (module.cross_attention(*leaves, h, lengths, **backend),)
    else:
        norms = tuple(leaves[2:]) or (None,) * 4
        outs = module.joint_attention(*leaves[:2], h, norms, lengths, EPS, **backend)
    own = torch.Generator().manual_seed(1)
    upstream = [torch.randn(out.shape, generator=own).to(out) for out in outs]
    return [t.detach().cpu() for t in (*outs, *torch.autograd.grad(outs, leaves, upstream))]


# Queries and keys of several tiles, of which texts fill all or end in the first; a head dim of one
# piece and of two.
CASES = [
    ("cross", "float32", 3, 20, 25, 1, 72, True),
    ("cross", "bfloat16", 3, 70, 130, 1, 64, True),
    ("cross", "float16", 2, 128, 40, 1, 72, False),
    ("joint", "float32", 2, 19, 21, 2, 64, False),
    ("joint", "bfloat16", 3, 65, 70, 1, 72, True),
    ("normed", "bfloat16", 3, 65, 70, 1, 64, True),
    ("normed", "float16", 2, 64, 67, 1, 72, False),
    ("normed", "float32", 3, 20, 21, 1, 72, True),
]
LARGE = [
    pytest.param((kind, dtype, 3, N, M, 4, d, True), marks=pytest.mark.gpu)
    for kind in ("cross", "joint", "normed")
    for dtype in DTYPES
    for N, M in ((1024, 120), (300, 333))
    for d in (64, 72, 128)
]


@pytest.mark.parametrize(
    "case", [*CASES, *LARGE], ids=lambda c: "{}-{}-B{}-N{}-M{}-h{}-d{}".format(*c)
)
def test_text_attention_and_its_gradients_meet_the_error_rule(case, device):
    kind, dtype, B, N, M, h, d, ragged = case
    lengths = (torch.arange(B) * (M - 1) // (B - 1) + 1).flip(0).to(device) if ragged else None
    tensors = [t.to(device, DTYPES[dtype]) for t in make(kind, B, N, M, h, d)]
    actual = run(functional, kind, tensors, h, lengths, backend="triton")
    plain = run(reference, kind, tensors, h, lengths)
    oracle = run(reference, kind, [t.double() for t in tensors], h, lengths)
    for own, other, exact in zip(actual, plain, oracle, strict=True):
        if exact.numel() >= 4096:
            check_against_oracle(own, other, exact)
        else:  # the weights of norms, and a text's few tokens, are too few to be judged
            assert (
                relative_error(own, exact)
                <= 4 * relative_error(other, exact) + torch.finfo(own.dtype).eps
            )
    if ragged:
        padded = [actual[1]] if kind == "cross" else [actual[1], actual[3]]
        padded = [actual[2]] if kind == "cross" else padded
        for t in padded:
            assert not any(t[b, n:].any() for b, n in enumerate(lengths.tolist()))


@pytest.mark.parametrize("kind", ["cross", "normed"])
def test_nan_in_padding_reaches_no_output_and_no_gradient(kind, device):
    lengths = torch.tensor([5, 2], device=device)
    tensors = [t.to(device) for t in make(kind, 2, 3, 5, 1, 16)]
    expected = run(functional, kind, tensors, 1, lengths, backend="triton")
    tensors[1][1, 2:] = float("nan")
    actual = run(functional, kind, tensors, 1, lengths, backend="triton")
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("kind", ["cross", "normed"])
def test_opcheck_is_clean_for_attention_to_texts(kind, device):
    """With gradients asked for, opcheck also runs the backward as a compiler sees it."""
    tensors = [t.to(device).requires_grad_() for t in make(kind, 2, 3, 5, 2, 16)]
    lengths = torch.tensor([5, 2], device=device)
    plain = [t.detach() for t in tensors]
    if kind == "cross":
        opcheck(ops.cross_attention, (*tensors, 2, lengths))
        out, lse = ops.cross_attention(*plain, 2, lengths)
        opcheck(ops.cross_attention_backward, (out, *plain, out, lse, 2, lengths))
        return
    opcheck(ops.joint_attention, (*tensors[:2], 2, *tensors[2:], lengths, EPS))
    image, text, lse = ops.joint_attention(*plain[:2], 2, *plain[2:], lengths, EPS)
    given = image, text, *plain[:2], image, text, lse, 2, *plain[2:], lengths, EPS
    opcheck(ops.joint_attention_backward, given)


@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_every_text_attention_configuration_computes_the_same(kind, device):
    """The tuner may choose any of them; 16-bit tiles take float32 tensors too."""
    N, M, h, d = 70, 40, 1, 24
    tensors = [t.to(device) for t in make(kind, 1, N, M, h, d)]
    lengths, on = torch.tensor([33], device=device), (N, torch.bfloat16, common.arch(device))
    none = (None,) * 4
    expected = run(reference, kind, [t.double() for t in tensors], h, lengths)
    outs = 1 if kind == "cross" else 2
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator).to(device) for t in expected[:outs]]

    def compare(actual, exact):
        for own, other in zip(actual, exact, strict=True):
            assert relative_error(own, other) < 1e-6

    for config in sizes.text_attention_fwd_configs(*on):
        if kind == "cross":
            *found, lse = text_attention.cross_attention_fwd(*tensors, h, lengths, config)
        else:
            *found, lse = text_attention.joint_attention_fwd(
                *tensors, h, none, lengths, EPS, config
            )
        compare(found, expected[:outs])
    pairs = [(dq, None) for dq in sizes.text_attention_dq_bwd_configs(*on)]
    pairs += [(None, dkv) for dkv in sizes.text_attention_dkv_bwd_configs(*on)]
    for pair in pairs:
        if kind == "cross":
            given = *upstream, *tensors, *found, lse, h, lengths
            gradients = text_attention_backward.cross_attention_bwd(*given, pair)
        else:
            given = tuple(upstream), tuple(tensors), tuple(found), lse, h, none, lengths, EPS
            *gradients, _ = text_attention_backward.joint_attention_bwd(*given, pair)
        compare(gradients, expected[outs:])


def test_attention_to_texts_compiles_whole(device):
    """A graph of both ops, with their gradients, is that of the ops; one output is not used."""
    cross = [t.to(device).requires_grad_() for t in make("cross", 2, 3, 5, 2, 16)]
    joint = [t.to(device).requires_grad_() for t in make("normed", 2, 3, 5, 2, 16)]
    lengths, gradients = torch.tensor([5, 2], device=device), []

    def call(q, kv, image, text, *norms):
        found, _ = functional.joint_attention(image, text, 2, norms, lengths, EPS)
        return found + functional.cross_attention(q, kv, 2, lengths)

    for function in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        loss = function(*cross, *joint).square().sum()
        gradients.append(torch.autograd.grad(loss, cross + joint))
    for actual, expected in zip(*gradients, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_second_derivative_of_attention_to_texts_is_refused(device):
    q, kv = (t.to(device).requires_grad_() for t in make("cross", 2, 3, 5, 2, 16))
    image, text = (t.to(device).requires_grad_() for t in make("joint", 2, 3, 5, 2, 16))
    for leaf, out in (
        (q, functional.cross_attention(q, kv, 2, backend="triton")),
        (image, functional.joint_attention(image, text, 2, backend="triton")[0]),
    ):
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="use backend='reference'"):
            gradient.sum().backward()


def test_an_empty_batch_of_texts_is_an_empty_result(device):
    for kind in ("cross", "normed"):
        tensors = [t.to(device) for t in make(kind, 0, 3, 5, 2, 16)]
        found = run(functional, kind, tensors, 2, None, backend="triton")
        assert all(t.shape[0] == 0 for t in found[:2])
        assert not any(t.any() for t in found[-4:])


def test_a_first_tile_of_keys_without_weight_is_finite_in_cross_attention(contracted, device):
    """When all keys so far score -inf, a running softmax must not compute -inf - -inf."""
    q, kv = torch.full((1, 3, 1), 1e25), torch.ones(1, 300, 2)
    kv[0, :128, 0] = -1e25
    kv[0, :, 1] = torch.randn(300)
    actual = functional.cross_attention(q.to(device), kv.to(device), 1, backend="triton")
    assert relative_error(actual, reference.cross_attention(q.double(), kv.double(), 1)) < 1e-5
