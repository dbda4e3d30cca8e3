"""The error rule for every Triton op, forward and backward, against the float64 oracle.

On a GPU the full cross of dtypes, sizes and views runs, and under the interpreter a cover of it in
which every pair of choices occurs.
"""

import itertools
import math
import os
from dataclasses import astuple, dataclass
from types import SimpleNamespace

import pytest
import torch

from fastdit import functional, reference
from fastdit.testing import check_against_oracle, relative_error

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEADS = {64: 1, 72: 1, 384: 4, 1152: 16}  # head dims 64, 72, 96, 72
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OPS = ("layer_norm_modulate", "gated_residual_layer_norm_modulate", "attention")
RMS = ("rms_norm_modulate", "gated_residual_rms_norm_modulate")
QK, SWIGLU = "qk_norm_rope", "swiglu"
KINDS = ("layer", "layer rope", "rms", "rms rope", "rope")  # of QK: a norm, a rotation, or both


@dataclass(frozen=True)
class Case:
    dtype: str
    B: int
    N: int
    D: int
    view: str
    kind: str = ""

    def __str__(self):
        kind = f"-{self.kind.replace(' ', '-')}" if self.kind else ""
        return f"{self.dtype}-B{self.B}-N{self.N}-D{self.D}-{self.view}{kind}"

    def seeds(self, op):
        """Return how many seeds to pool so that the op's smallest tensor has 4096 elements.

        That tensor is a modulation's gradient, or an output; weights of norms have tests of their
        own. Under the interpreter a modulation's long sums are judged at N = 300 and D = 1152 only,
        since a long N elsewhere would take minutes.
        """
        if op in ("attention", QK, SWIGLU):
            width = 3 * self.D if op == QK else self.D
            return -(-4096 // (self.B * self.N * width))
        if INTERPRETED and (self.N == 256 or (self.N == 300 and self.D < 1152)):
            return 1
        return -(-4096 // (self.B * self.D))

    def cost(self, op):
        """Return roughly how many seconds the case takes under the interpreter."""
        if op == "attention":
            head = 0.1 + (8 if self.dtype == "float32" else 1) * (self.N / 300) ** 2
            return self.seeds(op) * self.B * HEADS[self.D] * head
        if op in (QK, SWIGLU):
            return self.seeds(op) * self.B * (0.1 + self.N * HEADS[self.D] / 300)
        return self.seeds(op) * self.B * self.N * (1 + self.D / 400) / 1000


VIEWS = ("contiguous", "strided", "offset")
CROSS = [
    Case(*choices)
    for choices in itertools.product(DTYPES, (1, 3), (1, 5, 16, 63, 256, 300), HEADS, VIEWS)
]
# Fewer lengths and widths suffice for RMSNorm's kernels, which are LayerNorm's with parts left out,
# and for programs that take heads or rows of any token.
RMS_CROSS, QK_CROSS, SWIGLU_CROSS = (
    [Case(*choices) for choices in itertools.product(DTYPES, (1, 3), *sizes, VIEWS, kinds)]
    for sizes, kinds in (
        (((1, 40), (72, 1152)), ("", "no shift")),
        (((1, 5, 63), (64, 72, 384)), KINDS),
        (((1, 5, 63), (64, 72, 384)), ("",)),
    )
)
CROSSES = dict.fromkeys(RMS, RMS_CROSS) | {QK: QK_CROSS, SWIGLU: SWIGLU_CROSS}


def cross(op):
    return CROSSES.get(op, CROSS)


def pairs(case):
    return set(itertools.combinations(enumerate(astuple(case)), 2))


def pairwise_cover(op):
    """Choose cases that cover every pair of choices, greedily by new pairs per second."""
    left = set().union(*map(pairs, cross(op)))
    chosen = []
    while left:
        best = max(cross(op), key=lambda c: len(pairs(c) & left) / (1 + c.cost(op)))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def full_cross():
    for op in (*OPS, *CROSSES):
        cover = pairwise_cover(op)
        for case in cross(op):
            marks = () if case in cover else pytest.mark.gpu
            yield pytest.param(op, case, marks=marks, id=f"{op}-{case}")


def lay_out(t, view):
    """Return the same values, with gaps between rows or at an odd address."""
    if view == "contiguous":
        return t
    if view == "strided":
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 8), float("nan"))
        wide[..., : t.shape[-1]] = t
        return wide[..., : t.shape[-1]]
    flat = t.new_full((t.numel() + 1,), float("nan"))
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


def make_tensors(op, B, N, D, kind="", n_heads=1):
    """Return the inputs, some of which may be None, then the upstream gradient of each output."""
    if op == SWIGLU:
        return [torch.randn(B, N, 2 * D), torch.randn(B, N, D)]
    if op == QK:
        weights = list(torch.randn(4, D // n_heads)) if kind != "rope" else [None] * 4
        if "rms" in kind:
            weights[1] = weights[3] = None
        qkv, dout = torch.randn(2, B, N, 3 * D)
        return [qkv, *weights, dout]
    if op == "attention":
        return [torch.randn(B, N, 3 * D), torch.randn(B, N, D)]
    gate, scale, shift = torch.randn(3, B, D)
    x, y, dr, dh = torch.randn(4, B, N, D)
    weight = [1 + torch.randn(D) / 2] if op in RMS else []
    modulation = [scale, None if kind == "no shift" else shift, *weight]
    return [x, y, gate, *modulation, dr, dh] if "gated" in op else [x, *modulation, dh]


def change(tensors, function):
    return [t if t is None else function(t) for t in tensors]


def arguments_of(op, leaves, n_heads, kind):
    if op != QK:
        return *leaves, *{"attention": (n_heads,), SWIGLU: ()}.get(op, (1e-5,))
    qkv, *weights = leaves
    rope = None
    if "rope" in kind:
        pairs_of_a_head = qkv.shape[2] // (6 * n_heads)
        angles = torch.arange(qkv.shape[1])[:, None] * torch.linspace(0.1, 1, pairs_of_a_head)
        rope = torch.stack([angles.cos(), angles.sin()]).to(qkv.device)
        rope = rope.double() if qkv.dtype == torch.float64 else rope
    return qkv, n_heads, *weights, rope, 1e-5


def run(module, op, tensors, n_heads, kind="", **backend):
    """Return every output and every input's gradient, flattened."""
    count = len(tensors) - (2 if "gated" in op else 1)
    leaves = change(tensors[:count], lambda t: t.detach().requires_grad_())
    outs = getattr(module, op)(*arguments_of(op, leaves, n_heads, kind), **backend)
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.autograd.backward(outs, tensors[count:])
    gradients = (leaf.grad for leaf in leaves if leaf is not None)
    return [t.detach().flatten().cpu() for t in (*outs, *gradients)]


def check(op, batches, n_heads=1, plain=reference, kind=""):
    """Apply the error rule to the Triton op, pooled over batches of tensors."""
    runs = [
        (
            run(functional, op, tensors, n_heads, kind, backend="triton"),
            run(plain, op, tensors, n_heads, kind),
            run(reference, op, change(tensors, torch.Tensor.double), n_heads, kind),
        )
        for tensors in batches
    ]
    actual, plain, oracle = (
        [torch.cat(pooled) for pooled in zip(*column, strict=True)]
        for column in zip(*runs, strict=True)
    )
    for triple in zip(actual, plain, oracle, strict=True):
        if triple[0].numel() >= 4096:
            check_against_oracle(*triple)


@pytest.mark.parametrize(("op", "case"), list(full_cross()))
def test_ops_and_their_gradients_meet_the_error_rule(op, case, device):
    dtype, n_heads = DTYPES[case.dtype], HEADS[case.D]
    batches = [
        change(
            make_tensors(op, case.B, case.N, case.D, case.kind, n_heads),
            lambda t: lay_out(t.to(device, dtype), case.view),
        )
        for _ in range(case.seeds(op))
    ]
    check(op, batches, n_heads, kind=case.kind)


def test_gradients_of_head_norms_weights_meet_the_error_rule(device):
    """A weight has few elements, so that seeds are pooled; the last has several partial sums."""
    batches = [
        [t.to(device) for t in make_tensors(QK, B, N, 128, "layer rope")]
        for B, N in [(1, 3)] * 31 + [(2, 300)]
    ]
    check(QK, batches, kind="layer rope")


@pytest.mark.parametrize(
    "head_dim", [8, 16, 21, 32, 40, 48, 80, 88, 96, 112, 128], ids="d{}".format
)
def test_attention_takes_any_head_dim(head_dim, device):
    seeds = -(-4096 // (2 * 21 * 3 * head_dim))
    batches = [
        [t.to(device) for t in make_tensors("attention", 2, 21, 3 * head_dim)] for _ in range(seeds)
    ]
    check("attention", batches, n_heads=3)


def recomputed(qkv, dout, n_heads):
    """Return attention's gradient by plain ops that keep a row's log-sum-exp, not its weights."""
    B, N, width = dout.shape
    q, k, v = qkv.view(B, N, 3, n_heads, -1).permute(2, 0, 3, 1, 4)  # each [B, h, N, d]
    do, scale = dout.view(B, N, n_heads, -1).transpose(1, 2), q.shape[-1] ** -0.5
    s = q @ k.mT * (scale * math.log2(math.e))
    top = s.amax(-1, keepdim=True)
    lse = top + torch.exp2(s - top).sum(-1, keepdim=True).log2()
    p = torch.exp2(s - lse)
    ds = p * (do @ v.mT - (do * (p @ v)).sum(-1, keepdim=True))
    gradients = torch.stack([ds @ k * scale, ds.mT @ q * scale, p.mT @ do])
    return gradients.permute(1, 3, 0, 2, 4).reshape(qkv.shape)


def test_attention_survives_scores_that_overflow_an_exponential(device):
    """A row's scores are some thousands, or some thousands below zero, and differ by about one.

    The log-sum-exp is rounded at that size, and so are all weights of a row that the backward
    recomputes from it. So the gradient is judged beside plain ops that do the same, which agree
    with the formula in float64. The large product comes last in a head, so that the sum of the
    others is not rounded at its size.
    """
    qkv, dout = make_tensors("attention", 2, 40, 128)
    q, k, _ = qkv.view(2, 40, 3, 2, 64).unbind(2)
    q[..., -1] = torch.randn(2, 40, 2).sign() * (100 + 100 * torch.rand(2, 40, 2))
    k[..., -1] = 150
    tensors = [qkv.to(device), dout.to(device)]
    wide = [t.double() for t in tensors]
    out, gradient = run(functional, "attention", tensors, 2, backend="triton")
    plain, _ = run(reference, "attention", tensors, 2)
    oracle, exact = run(reference, "attention", wide, 2)
    assert relative_error(recomputed(*wide, 2).flatten(), exact) < 1e-10
    check_against_oracle(out, plain, oracle)
    check_against_oracle(gradient, recomputed(*tensors, 2).flatten().cpu(), exact)


@pytest.mark.parametrize("D", [33, 96, 600, 2048, 4096], ids="D{}".format)
@pytest.mark.parametrize("op", OPS[:2])
def test_layer_norm_takes_any_width(op, D, device):
    seeds = -(-4096 // (3 * D))
    check(op, [[t.to(device) for t in make_tensors(op, 3, 3, D)] for _ in range(seeds)])


@pytest.mark.parametrize("D", [96, 600, 4096], ids="D{}".format)
@pytest.mark.parametrize("op", RMS)
def test_rms_norm_takes_any_width(op, D, device):
    """Enough seeds are pooled for the weight's gradient, which sums over images and tokens."""
    check(op, [[t.to(device) for t in make_tensors(op, 3, 3, D)] for _ in range(-(-4096 // D))])


@pytest.mark.parametrize("op", RMS)
def test_the_gradient_of_a_weight_sums_over_chunks_of_tokens(op, device):
    """Programs of the backward take 32 tokens of an image."""
    check(op, [[t.to(device) for t in make_tensors(op, 2, 70, 1152)] for _ in range(4)])


@pytest.mark.parametrize("op", OPS[:2])
def test_layer_norm_needs_no_shift(op, device):
    batches = [make_tensors(op, 3, 5, 384, kind="no shift") for _ in range(4)]
    check(op, [change(tensors, lambda t: t.to(device)) for tensors in batches])


def two_passes(x, scale, shift, eps):
    """LayerNorm and modulation by the formula: the mean first, then the squares about it."""
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd * (1 + scale[:, None]) + shift[:, None]


def test_a_large_mean_does_not_cancel(device):
    """E[x^2] - mean^2 in one pass would lose every digit here.

    The remaining error is the rounding of the mean at its size, which depends on the order of a
    sum. The plain ops therefore take the kernel's two passes; PyTorch's own LayerNorm takes other
    ways on other devices.
    """
    batches = [[t.to(device) for t in make_tensors(OPS[0], 3, 5, 384)] for _ in range(4)]
    for x, *_ in batches:
        x += 1000
    plain = SimpleNamespace(layer_norm_modulate=two_passes)
    check(OPS[0], batches, plain=plain)


def test_mixed_dtypes_keep_a_float32_residual(device):
    """As under bfloat16 autocast, x is float32, and the branch and the modulation are bfloat16."""
    batches = []
    for _ in range(8):
        x, *rest, dr, dh = make_tensors(OPS[1], 3, 7, 192)
        batches.append([x, *(t.bfloat16() for t in rest), dr, dh.bfloat16()])
    check(OPS[1], [[t.to(device) for t in tensors] for tensors in batches])


def test_channels_may_lie_apart(device):
    """Activations and modulation are transposed, so that no stride is 1."""
    batches = [
        [
            t.to(device).transpose(0, -1).contiguous().transpose(0, -1)
            for t in make_tensors(OPS[1], 3, 7, 72)
        ]
        for _ in range(19)
    ]
    assert all(t.stride(-1) > 1 for t in batches[0])
    check(OPS[1], batches)
