"""What only a GPU can show: bits that repeat, graph capture, memory, tensors past 2^31 elements."""

import pytest
import torch

import fastdit
from fastdit import functional
from fastdit.testing import randomize, relative_error

pytestmark = pytest.mark.gpu
XL = {"B": 8, "N": 256, "D": 1152}


def gated_inputs(B, N, D):
    x, y = torch.randn(2, B, N, D, device="cuda", dtype=torch.bfloat16)
    gate, scale, shift = torch.randn(B, 3 * D, device="cuda", dtype=torch.bfloat16).chunk(3, 1)
    return [x, y, gate, scale, shift]


def attention_inputs(B, N, D):
    return [torch.randn(B, N, 3 * D, device="cuda", dtype=torch.bfloat16)]


def run(op, inputs, *last):
    leaves = [t.detach().requires_grad_() for t in inputs]
    outs = getattr(functional, op)(*leaves, *last, backend="triton")
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    return [*outs, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(
    ("op", "make", "last"),
    [
        ("gated_residual_layer_norm_modulate", gated_inputs, ()),
        ("attention", attention_inputs, (16,)),
    ],
    ids=["layer-norm", "attention"],
)
def test_the_same_bits_every_run(op, make, last):
    inputs = make(**XL)
    first = run(op, inputs, *last)
    for _ in range(5):
        assert all(map(torch.equal, first, run(op, inputs, *last)))


def test_a_captured_forward_replays():
    model = fastdit.DiT(hidden=384, n_heads=6)
    randomize(model)
    model.cuda()
    x = torch.randn(4, 3, 16, 16, device="cuda")
    t, y = torch.randint(1000, (4,), device="cuda"), torch.randint(16, (4,), device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x, t, y)  # compiles the kernels, which may not happen in a capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x, t, y)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert relative_error(out, model(x, t, y)) < 1e-6


def test_a_forward_allocates_its_outputs_and_no_more():
    """Chunks of one modulation tensor are read in place, without a copy."""
    inputs = gated_inputs(**XL)
    functional.gated_residual_layer_norm_modulate(*inputs, backend="triton")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outs = functional.gated_residual_layer_norm_modulate(*inputs, backend="triton")
    torch.cuda.synchronize()
    needed = sum(t.numel() * t.element_size() for t in outs) + 2 * 4 * XL["B"] * XL["N"]
    assert torch.cuda.max_memory_allocated() - before <= needed + 4096


def test_tensors_past_2_to_the_31_elements():
    """The last sample, which lies beyond 2^31 elements, equals itself computed alone."""
    B, N, D = 15, 131_072, 1152
    x = torch.zeros(B, N, D, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[-1].normal_()
    scale, shift = torch.randn(2, B, D, device="cuda", dtype=torch.bfloat16)
    out = functional.layer_norm_modulate(x, scale, shift, backend="triton")
    alone = functional.layer_norm_modulate(x[-1:], scale[-1:], shift[-1:], backend="triton")
    assert torch.equal(out[-1], alone[0])


def test_attention_past_2_to_the_31_elements():
    B, N, h, d = 2500, 256, 16, 72
    qkv = torch.zeros(B, N, 3 * h * d, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    qkv[-1].normal_()
    out = functional.attention(qkv, h, backend="triton")
    alone = functional.attention(qkv[-1:].clone(), h, backend="triton")
    assert torch.equal(out[-1], alone[0])
