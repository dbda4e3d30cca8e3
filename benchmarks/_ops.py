"""The ops and shapes that the benchmarks time: inputs, ways to run them, work to be done."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from _harness import DTYPES as MODEL_DTYPES
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdit import functional, reference
from fastdit.update import Guidance

OPS = (
    "layer_norm_modulate",
    "gated_residual_layer_norm_modulate",
    "rms_norm_modulate",
    "gated_residual_rms_norm_modulate",
    "attention",
    "sampler_update",
    "qk_norm_rope",
    "swiglu",
    "cross_attention",
    "joint_attention",
)
PLAIN_LN, GATED_LN, PLAIN_RMS, GATED_RMS, ATTENTION, UPDATE, QK, SWIGLU, CROSS, JOINT = OPS
SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
# "mixed" is for the sampler update: the state is float32, the model's output bfloat16.
DTYPES = MODEL_DTYPES | {"mixed": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    It is (B, N, D); for attention and `qk_norm_rope` (B, N, h, d); for the update (B, C, H, W); for
    `swiglu` (B, N, M), with M the width of the output; for attention to texts (B, N, M, h, d), with
    M the tokens of a text, of which the last has half.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.op}-{self.size}-{self.dtype}"

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))


_ROWS = ((64, 256, 1152), (256, 256, 1152), (256, 256, 384), (1024, 64, 64))
FULL = (
    *(Case(op, shape) for op in (PLAIN_LN, GATED_LN) for shape in _ROWS),
    *(Case(op, (64, 256, 1152), "float32") for op in (PLAIN_LN, GATED_LN)),
    *(Case(op, (64, 256, 1152)) for op in (PLAIN_RMS, GATED_RMS)),
    *(Case(ATTENTION, (B, N, 16, 72)) for B, N in ((64, 256), (16, 1024))),
    *(Case(ATTENTION, shape) for shape in ((64, 256, 16, 64), (16, 1024, 12, 64))),
    Case(ATTENTION, (64, 256, 16, 64), "float32"),
    Case(UPDATE, (64, 4, 32, 32), "mixed"),
    Case(UPDATE, (256, 3, 16, 16), "float32"),
    *(Case(QK, shape) for shape in ((64, 256, 16, 72), (64, 256, 16, 64), (1024, 16, 4, 16))),
    *(Case(SWIGLU, shape) for shape in ((64, 256, 3072), (64, 256, 2730), (1024, 16, 170))),
    *(Case(CROSS, shape) for shape in ((16, 1024, 120, 16, 72), (4, 4096, 300, 16, 72))),
    *(Case(JOINT, shape) for shape in ((16, 1024, 333, 24, 64), (4, 4096, 333, 24, 64))),
)
# The toy when it samples and when it trains, DiT-S/4, DiT-XL/2.
_CPU_ROWS = ((64, 16, 64), (256, 16, 64), (8, 64, 384), (2, 256, 1152))
# RMSNorm in training: the toy, S/4 and B/2.
_CPU_RMS_ROWS = ((256, 16, 64), (16, 64, 384), (4, 256, 768))
CPU = (
    *(Case(op, shape, "float32") for op in (PLAIN_LN, GATED_LN) for shape in _CPU_ROWS),
    *(Case(op, shape, "float32") for op in (PLAIN_RMS, GATED_RMS) for shape in _CPU_RMS_ROWS),
    *(Case(ATTENTION, shape, "float32") for shape in ((64, 16, 4, 16), (4, 256, 6, 64))),
    Case(UPDATE, (64, 3, 16, 16), "float32"),
    Case(UPDATE, (16, 4, 32, 32), "mixed"),
    *(Case(QK, shape, "float32") for shape in ((64, 16, 4, 16), (8, 64, 6, 64))),
    *(Case(SWIGLU, shape, "float32") for shape in ((64, 16, 170), (8, 64, 1024))),
    Case(CROSS, (4, 256, 120, 6, 64), "float32"),
    Case(JOINT, (2, 256, 77, 6, 64), "float32"),
)
QUICK = (
    Case(PLAIN_LN, (2, 16, 72)),
    Case(GATED_LN, (2, 16, 72), "float32"),
    Case(PLAIN_RMS, (2, 16, 72), "float32"),
    Case(GATED_RMS, (2, 16, 72)),
    Case(ATTENTION, (2, 20, 2, 72)),
    Case(ATTENTION, (2, 16, 2, 16), "float32"),
    Case(UPDATE, (3, 4, 8, 8), "mixed"),
    Case(UPDATE, (3, 3, 8, 8), "float32"),
    Case(QK, (2, 20, 2, 72)),
    Case(SWIGLU, (2, 16, 72)),
    Case(CROSS, (2, 20, 12, 2, 72)),
    Case(JOINT, (2, 20, 12, 2, 16)),
)


def work(case: Case, backward: bool) -> tuple[int, int]:
    """Return the bytes that the op must move and the FLOP of its matrix products.

    Each input is read once and each output written once. Statistics are not counted, since a way
    may keep or recompute them. Ops without matrix products have 0 FLOP, since bytes bound them.
    """
    item = 4 if case.dtype == "float32" else 2
    if case.op == UPDATE:
        B, E = case.shape[0], math.prod(case.shape[1:])
        # x, eps; x_next, x0. "mixed" has guidance and learned variance: eps twice, and v.
        return B * E * (3 * 4 + 3 * 2 if case.dtype == "mixed" else 4 * 4), 0
    if case.op == ATTENTION:
        B, N, h, d = case.shape
        D = h * d
        if backward:  # qkv, out, dout; dqkv. S, dP, dQ, dK, dV are 2 B N^2 D each.
            return 8 * B * N * D * item, 10 * B * N * N * D
        return 4 * B * N * D * item, 4 * B * N * N * D  # qkv; out. S and O.
    if case.op in (CROSS, JOINT):
        B, N, M, h, d = case.shape
        texts = sum(_lengths(case))  # tokens of all texts that are no padding
        # In cross-attention q, kv; out. q, kv, out, dout; dq, dkv. Otherwise as in attention.
        tokens = (2 * B * N + 2 * texts) if case.op == CROSS else 4 * (B * N + texts)
        pairs = N * texts if case.op == CROSS else sum((N + own) ** 2 for own in _lengths(case))
        return 2 ** int(backward) * tokens * h * d * item, (10 if backward else 4) * pairs * h * d
    if case.op == QK:
        # qkv; out. dout, q, k; dqkv. Weights and angles are too few to count.
        return math.prod(case.shape) * (8 if backward else 6) * item, 0
    if case.op == SWIGLU:
        return math.prod(case.shape) * (5 if backward else 3) * item, 0  # x; out. dout, x; dx
    B, N, D = case.shape
    tokens, modulation = {
        (PLAIN_LN, False): (2, 2),  # x; h. scale, shift
        (PLAIN_LN, True): (3, 3),  # dh, x; dx. scale; dscale, dshift
        (GATED_LN, False): (4, 3),  # x, y; r, h. gate, scale, shift
        (GATED_LN, True): (6, 5),  # dr, dh, r, y; dx, dy. gate, scale; dgate, dscale, dshift
    }[case.op.replace("rms", "layer"), backward]  # a weight [D] is next to nothing
    return (tokens * B * N * D + modulation * B * D) * item, 0


def _lengths(case: Case) -> list[int]:
    """Return the tokens of each text that are no padding: all, but half of the last."""
    B, _, M, *_ = case.shape
    return [M] * (B - 1) + [M // 2]


def inputs(case: Case, device: torch.device, seed: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Return the positional tensors, none of which is zero, and the keyword arguments.

    A backward computes the gradients of the former, and of the latter where they ask for one.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype = DTYPES[case.dtype]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    if case.op == ATTENTION:
        B, N, h, d = case.shape
        return [randn(B, N, 3 * h * d)], {"n_heads": h}
    if case.op in (CROSS, JOINT):
        B, N, M, h, d = case.shape
        lengths = torch.tensor(_lengths(case), device=device)
        if case.op == CROSS:
            kv = randn(B, 2, M, 2 * h * d)[:, 1]  # a layer's slice of all, as PixArt has it
            return [randn(B, N, h * d), kv], {"n_heads": h, "lengths": lengths}
        norms = tuple(randn(d) for _ in range(4))
        both = [randn(B, N, 3 * h * d), randn(B, M, 3 * h * d)]
        return both, {"n_heads": h, "norms": norms, "lengths": lengths, "eps": 1e-6}
    if case.op == QK:  # with all that it can do
        B, N, h, d = case.shape
        names = ("q_weight", "q_bias", "k_weight", "k_bias")
        options: dict[str, Any] = {name: randn(d).requires_grad_() for name in names}
        angles = randn(N, d // 2, dtype=torch.float32)
        rope = torch.stack([angles.cos(), angles.sin()])
        return [randn(B, N, 3 * h * d)], {"n_heads": h, "rope": rope, "eps": 1e-6} | options
    if case.op == SWIGLU:
        B, N, M = case.shape
        return [randn(B, N, 2 * M)], {}
    if case.op == UPDATE:
        B, C, H, W = case.shape
        guided = case.dtype == "mixed"
        x = randn(*case.shape, dtype=torch.float32)
        out = randn(2 * B, 2 * C, H, W) if guided else randn(*case.shape)
        row = (1.3, -0.7, 1.25, 0.4, 0.3, 0.5, -0.2, 0.6, -1.5, -0.5)
        coefficients = torch.tensor([row] * 8, device=device)
        seeds = torch.arange(2 * B, device=device).view(B, 2) + seed
        options = {"seeds": seeds, "guidance": Guidance(4.0, channels=3) if guided else None}
        return [x, out, coefficients, torch.tensor(5, device=device)], options
    B, N, D = case.shape
    modulation = randn(B, 6 * D).chunk(6, dim=1)  # views, as in a DiT
    weight = [randn(D)] if case.op in (PLAIN_RMS, GATED_RMS) else []
    if case.op in (PLAIN_LN, PLAIN_RMS):
        return [randn(B, N, D), *modulation[:2], *weight], {"eps": 1e-6}
    return [randn(B, N, D), randn(B, N, D), *modulation[:3], *weight], {"eps": 1e-6}


def ways(case: Case, quick: bool) -> list[str]:
    compiled = not quick or case == next(own for own in QUICK if own.op == case.op)
    sdpa = SDPA if case.op == ATTENTION else ()
    return ["eager", "fastdit", *(["compiled"] if compiled else []), *sdpa]


def make(way: str, op: str, device: torch.device) -> Callable[..., Any]:
    if way in SDPA:
        return functools.partial(_sdpa, SDPA[way])
    if way == "fastdit":
        # On a GPU the kernels must run or raise; on a CPU the package chooses.
        backend = "triton" if device.type == "cuda" else None
        return functools.partial(getattr(functional, op), backend=backend)
    plain = getattr(reference, op)
    return plain if way == "eager" else torch.compile(plain, fullgraph=True, dynamic=False)


def _sdpa(backend: SDPBackend, qkv: Tensor, n_heads: int) -> Tensor:
    B, N, D3 = qkv.shape
    q, k, v = qkv.view(B, N, 3, n_heads, D3 // (3 * n_heads)).permute(2, 0, 3, 1, 4)
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(B, N, D3 // 3)


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@functools.lru_cache(maxsize=1)
def oracle(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    tensors, options = inputs(case, device, seed=0)

    def exact(value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        if isinstance(value, tuple):
            return tuple(map(exact, value))
        return value.detach().double() if floats else value

    arguments, options = map(exact, tensors), {name: exact(v) for name, v in options.items()}
    return tuple(t.cpu() for t in outputs(getattr(reference, case.op)(*arguments, **options)))


def copies(moved: int, device: torch.device) -> int:
    """Return how many inputs of `moved` bytes exceed twice the L2 cache; on a CPU return 1."""
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, 1 + 2 * cache // moved)
