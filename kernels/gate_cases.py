"""The launches that the package may make, each with what `gate.faults` must know to judge it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch
import triton
from torch import Tensor

from fastdit.kernels import (
    adaln,
    adaln_configs,
    attention,
    attention_configs,
    qk_norm_rope,
    sampling,
    swiglu,
    text_attention,
    text_attention_backward,
    trajectory,
)
from fastdit.kernels.columns import COLUMNS
from fastdit.kernels.shape import Shape
from fastdit.kernels.trajectory_configs import trajectory_configs

WIDTHS = (64, 72, 384, 1152)
HEAD_DIMS = (32, 64, 72, 80, 96, 128)
LENGTHS = (16, 64, 128, 256, 300)
_F32, _BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """A call of a launcher on "meta" tensors, and what its machine code must be like.

    Attributes:
        dot_flop: by kernel, the FLOP that its `tt.dot`s need, with each loop body counted once and
            columns padded to pieces; kernels on plain cores have no entry.
        rows: by kernel, the rows of a program's own tile; a warp group's instructions take 64.
        repeats: how often matrix work may be repeated by warps that are there for their registers.
        wide_loads: whether the widest load must have 128 bits, or 64 on gfx942. Float32 attention
            is not bound by its loads, and a pixel's 4 latent channels in 16 bits are 64.
    """

    label: str
    arch: str
    call: Callable[[], object]
    dot_flop: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    repeats: float = 1.0
    wide_loads: bool = True


def cases(arch: str, every: bool = False) -> Iterator[Case]:
    """Yield the default launch of each kernel and size, or every one that the tuner may choose."""
    yield from _adaln(arch, every)
    yield from _attention(arch, every)
    yield from _text_attention(arch, every)
    yield from _qk_norm_rope(arch, every)
    yield from _swiglu(arch, every)
    yield from _sampling(arch, every)
    yield from _trajectory(arch, every)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _chosen(configs: list[triton.Config], every: bool) -> list[triton.Config]:
    return configs if every else configs[:1]


def _name(config: triton.Config) -> str:
    sizes = "x".join(str(n) for n in config.kwargs.values())
    return f"{sizes} {config.num_warps}w {config.num_stages}s"


def _adaln(arch: str, every: bool) -> Iterator[Case]:
    """Yield cases with a float32 residual and bfloat16 branches, and with bfloat16 throughout.

    With `every`, both norms are compiled with a shift and without one.
    """
    B, N = 4, 256
    for D in WIDTHS:
        for dtype in (_F32, _BF16) if every else (_F32,):
            name = f"D{D} {'mixed' if dtype == _F32 else 'bf16'}"
            r, y = _meta(B, N, D, dtype=dtype), _meta(B, N, D, dtype=_BF16)
            gate, scale, shift = _meta(B, 3 * D, dtype=_BF16).chunk(3, dim=1)
            statistics = _meta(B, N, dtype=_F32)
            of_norm = {
                "": (None, shift, (statistics, statistics), None),
                "no shift ": (None, None, (statistics, statistics), None),
                "rms ": (_meta(D, dtype=dtype), shift, (None, statistics), arch),
                "rms no shift ": (_meta(D, dtype=dtype), None, (None, statistics), arch),
            }
            both = {"gated ": (r, y, gate), "plain ": None}
            # A gated RMSNorm needs the most registers; one of its kinds stands for both.
            few = ["rms gated "] if D in (72, 1152) else ["rms no shift gated "]
            for (norm, given), (form, residual) in product(of_norm.items(), both.items()):
                if not every and norm + form not in ("gated ", "plain ", *few):
                    continue
                weight, added, kept, rms_on = given
                choice = every and weight is None
                for config in _chosen(adaln_configs.norm_modulate_fwd_configs(D), choice):
                    arguments = (r, scale, added, 1e-5, weight, residual and residual[1:], config)
                    call = partial(adaln.norm_modulate_fwd, *arguments)
                    yield Case(f"{name} {norm}{form}{_name(config)}", arch, call)
                for config in _chosen(adaln_configs.norm_modulate_bwd_configs(D, rms_on), every):
                    arguments = (y, r, scale, kept, weight, residual, added is not None, config)
                    call = partial(adaln.norm_modulate_bwd, *arguments)
                    yield Case(f"{name} {norm}{form}{_name(config)}", arch, call)


def _attention(arch: str, every: bool) -> Iterator[Case]:
    B, h = 4, 16
    for d in HEAD_DIMS:
        lengths = LENGTHS if every or d == 72 else LENGTHS[-2:]
        sizes = [("bf16", N) for N in lengths] + [("fp32", 300)]
        sizes += [("tf32", 300)] if every or d == 72 else []
        for kind, N in sizes:
            dtype = _BF16 if kind == "bf16" else _F32
            qkv, out = _meta(B, N, 3 * h * d, dtype=dtype), _meta(B, N, h * d, dtype=dtype)
            lse = _meta(B, h, N, dtype=_F32)
            name = f"d{d} N{N} {kind}"
            precision = "tf32" if kind == "tf32" else "ieee"
            for config in _chosen(attention_configs.attention_fwd_configs(N, dtype, arch), every):
                either = ("attention_fwd_kernel", "attention_one_pass_fwd_kernel")
                needs = _needs(d, dtype, dict.fromkeys(either, (config, "BM", 2)))
                call = partial(_at, precision, attention.attention_fwd, qkv, h, config)
                label = f"{name} {_name(config)}"
                yield Case(label, arch, call, *needs, wide_loads=dtype == _BF16)
            dqs = attention_configs.attention_dq_bwd_configs(N, dtype, arch)
            dkvs = attention_configs.attention_dkv_bwd_configs(N, d, dtype, arch)
            for i in range(max(len(dqs), len(dkvs)) if every else 1):
                dq, dkv = dqs[min(i, len(dqs) - 1)], dkvs[min(i, len(dkvs) - 1)]
                both = {
                    "attention_dq_bwd_kernel": (dq, "BM", 3),
                    "attention_dkv_bwd_kernel": (dkv, "BN", 4),
                }
                needs, arguments = _needs(d, dtype, both), (out, qkv, out, lse, h, dq, dkv)
                call = partial(_at, precision, attention.attention_bwd, *arguments)
                label = f"{name} {_name(dq)}, {_name(dkv)}"
                yield Case(label, arch, call, *needs, wide_loads=dtype == _BF16)


# The head dim, tokens of the image and of the text, whether attention is joint, the precision, and
# whether texts have lengths: PixArt at about 512 pixels, and Stable Diffusion 3.
_TEXTS = (
    (72, 1000, 120, False, "bf16", True),
    (64, 1000, 333, True, "bf16", True),
    (64, 1000, 333, True, "fp32", True),
)


def _every_text() -> Iterator[tuple[int, int, int, bool, str, bool]]:
    """Yield what `_TEXTS` lists: lengths that tiles divide, that they do not, and short ones."""
    for d, joint in product(HEAD_DIMS, (False, True)):
        yield d, 1024, 120, joint, "bf16", True
        yield d, 1000, 333, joint, "bf16", False
        for kind in ("bf16", "fp32", "tf32"):
            yield d, 1000, 333, joint, kind, True
        if d in (64, 72):
            yield d, 40, 16, joint, "bf16", True


def _text_attention(arch: str, every: bool) -> Iterator[Case]:
    """Yield cross-attention and joint attention; where `every`, with all that they can do.

    The backward's norms are those of `_qk_norm_rope`.
    """
    B, h = 4, 16
    for d, N, M, joint, kind, ragged in _every_text() if every else _TEXTS:
        norms = [(_meta(d, dtype=_BF16),) * 4] if joint else []
        norms += [] if joint and not every else [(None,) * 4]
        dtype = _BF16 if kind == "bf16" else _F32
        precision = "tf32" if kind == "tf32" else "ieee"
        image = _meta(B, N, (3 if joint else 1) * h * d, dtype=dtype)
        text = _meta(B, M, (3 if joint else 2) * h * d, dtype=dtype)
        out, out_text = _meta(B, N, h * d, dtype=dtype), _meta(B, M, h * d, dtype=dtype)
        lse = _meta(B, h, N + M if joint else N, dtype=_F32)
        lengths, loops = _meta(B, dtype=torch.int64) if ragged else None, 2 if joint else 1
        name = f"d{d} N{N} M{M} {'joint' if joint else 'cross'}{' ragged' * ragged} {kind}"
        on = max(N, M), d, dtype, arch
        for config in _chosen(attention_configs.text_attention_fwd_configs(*on), every):
            needs = _needs(d, dtype, {"text_attention_fwd_kernel": (config, "BM", 2 * loops)})
            for weights in norms:
                if joint:
                    given = image, text, h, weights, lengths, 1e-6, config
                    call = partial(_at, precision, text_attention.joint_attention_fwd, *given)
                else:
                    given = image, text, h, lengths, config
                    call = partial(_at, precision, text_attention.cross_attention_fwd, *given)
                label = f"{name}{'' if weights[0] is None else ' normed'} {_name(config)}"
                yield Case(label, arch, call, *needs, wide_loads=dtype == _BF16)
        dqs = attention_configs.text_attention_dq_bwd_configs(*on)
        dkvs = attention_configs.text_attention_dkv_bwd_configs(*on)
        for i in range(max(len(dqs), len(dkvs)) if every else 1):
            dq, dkv = dqs[min(i, len(dqs) - 1)], dkvs[min(i, len(dkvs) - 1)]
            both = {
                "text_attention_dq_bwd_kernel": (dq, "BM", 3 * loops),
                "text_attention_dkv_bwd_kernel": (dkv, "BN", 4 * loops),
            }
            backward = text_attention_backward
            if joint:
                pairs = (out, out_text), (image, text), (out, out_text)
                given = *pairs, lse, h, (None,) * 4, lengths, 1e-6, (dq, dkv)
                call = partial(_at, precision, backward.joint_attention_bwd, *given)
            else:
                given = out, image, text, out, lse, h, lengths, (dq, dkv)
                call = partial(_at, precision, backward.cross_attention_bwd, *given)
            label = f"{name} {_name(dq)}, {_name(dkv)}"
            yield Case(label, arch, call, *_needs(d, dtype, both), wide_loads=dtype == _BF16)


def _at(precision: str, launch: Callable[..., object], *arguments: object) -> object:
    """Launch with a precision of float32 products."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        return launch(*arguments)
    finally:
        matmul.fp32_precision = before


def _needs(
    d: int, dtype: torch.dtype, kernels: dict[str, tuple[triton.Config, str, int]]
) -> tuple[dict[str, float], dict[str, int]]:
    """Return (dot_flop, rows) of kernels, given by (config, own tile, products of two tiles)."""
    if dtype == _F32:
        return {}, {}
    width = sum(attention_configs.head_pieces(d))
    flop = {
        kernel: 2.0 * products * config.kwargs["BM"] * config.kwargs["BN"] * width
        for kernel, (config, _, products) in kernels.items()
    }
    return flop, {kernel: config.kwargs[own] for kernel, (config, own, _) in kernels.items()}


def _qk_norm_rope(arch: str, every: bool) -> Iterator[Case]:
    """Yield cases with a LayerNorm and a rotation; and where `every`, with less than that."""
    B, N, h = 4, 256, 16
    for d in HEAD_DIMS if every else (64, 72, 128):
        forwards, backwards = (
            _chosen(configs(d), every)
            for configs in (
                qk_norm_rope.qk_norm_rope_fwd_configs,
                qk_norm_rope.qk_norm_rope_bwd_configs,
            )
        )
        weight, rope = _meta(d, dtype=_F32), _meta(2, N, d // 2, dtype=_F32)
        layer, rms, none = (weight,) * 4, (weight, None) * 2, (None,) * 4
        kinds = [("bf16 layer rope", _BF16, layer, rope)]
        if every:
            kinds += [("fp32 layer rope", _F32, layer, rope), ("bf16 rms", _BF16, rms, None)]
            kinds += [("bf16 rope", _BF16, none, rope)]
        for kind, dtype, weights, table in kinds:
            qkv = _meta(B, N, 3 * h * d, dtype=dtype)
            given = h, weights, table, 1e-6
            for config in forwards:
                call = partial(qk_norm_rope.qk_norm_rope_fwd, qkv, *given, config)
                yield Case(f"d{d} {kind} {_name(config)}", arch, call)
            for config in backwards:
                call = partial(qk_norm_rope.qk_norm_rope_bwd, qkv, qkv, *given, config)
                yield Case(f"d{d} {kind} {_name(config)}", arch, call)


def _swiglu(arch: str, every: bool) -> Iterator[Case]:
    """Yield cases of XL and of the toy, whose rows of 170 are aligned to 4 bytes only."""
    for M in (3072, 170):
        for dtype in (_BF16, _F32) if every else (_BF16,):
            x, dout = _meta(4, 256, 2 * M, dtype=dtype), _meta(4, 256, M, dtype=dtype)
            name, wide = f"M{M} {'bf16' if dtype == _BF16 else 'fp32'}", M % 8 == 0
            for config in _chosen(swiglu.swiglu_configs(M), every):
                label = f"{name} {_name(config)}"
                forward = partial(swiglu.swiglu_fwd, x, config)
                yield Case(label, arch, forward, wide_loads=wide)
                backward = partial(swiglu.swiglu_bwd, dout, x, config)
                yield Case(label, arch, backward, wide_loads=wide)


def _sampling(arch: str, every: bool) -> Iterator[Case]:
    """Yield cases on XL's latents: tokens with guidance and a learned range, and plain images."""
    B, P, C = 4, 1024, 4
    for dtype in (_F32, _BF16):
        table, step = _meta(250, len(COLUMNS), dtype=_F32), _meta(dtype=torch.int64)
        seeds = _meta(B, 2, dtype=torch.int64)
        tokens, out = _meta(B, P, C, dtype=dtype), _meta(2 * B, P, 2 * C, dtype=_BF16)
        images = _meta(B, C, 32, 32, dtype=dtype)
        for config in _chosen(sampling.sampler_update_configs(), every):
            name = f"{'fp32' if dtype == _F32 else 'bf16'} {_name(config)}"
            guided = (tokens, out, table, step, None, seeds, None, (4.0, 3), config)
            plain = (images, images, table, step, images, None, None, None, config)
            for kind, arguments in (("guided learned", guided), ("two-step", plain)):
                call = partial(sampling.sampler_update, *arguments)
                yield Case(f"{kind} {name}", arch, call, wide_loads=False)


# Tokens, features, hidden size and head dim of models on pixels and latents; how they are sampled;
# the precision of their products. "guided learned" means a null label and a learned range; "given"
# means given noise, a modulation row for each step and label, and tanh GELU. `fastdit.ops.dispatch`
# refuses shapes beyond these.
TRAJECTORIES = (
    (16, 48, 64, 16, "", "bf16"),
    (16, 64, 64, 16, "guided learned", "bf16"),
    (64, 16, 64, 16, "", "bf16"),
    (64, 12, 64, 16, "given", "bf16"),
    (64, 16, 64, 16, "guided learned", "bf16"),
    (16, 64, 128, 32, "guided learned", "bf16"),
    (64, 16, 128, 32, "", "bf16"),
    (16, 64, 64, 32, "guided learned", "fp32"),
    (16, 64, 64, 16, "guided learned", "tf32"),
    (64, 16, 64, 16, "guided learned", "fp32"),
)
_LONG_PIXELS = ((64, 64, 64, 32, "guided learned", "bf16"), (64, 48, 64, 16, "given", "bf16"))
_LONG_WIDE_PIXELS = (64, 64, 128, 32, "guided learned", "bf16")
_FURTHER_TRAJECTORIES = {
    "sm_80": (),
    "sm_90": (*_LONG_PIXELS, _LONG_WIDE_PIXELS),
    "sm_100": _LONG_PIXELS,
    "gfx942": (*_LONG_PIXELS, _LONG_WIDE_PIXELS),
}


def _trajectory(arch: str, every: bool) -> Iterator[Case]:
    """Yield cases of four layers and eight steps."""
    for N, F, D, d, kind, precision in (*TRAJECTORIES, *_FURTHER_TRAJECTORIES[arch]):
        dtype = _BF16 if precision == "bf16" else _F32
        features = 2 * F if kind == "guided learned" else F
        tanh = kind == "given"
        sizes = N, F, features, 3 if F == 12 else 4, D, 4, D // d, 4 * D
        shape = Shape(*sizes, 6, False, 0, False, False, tanh, 1e-6, 1e-6, 1e-6)
        arguments = _trajectory_arguments(shape, kind, dtype)
        for config in _chosen(trajectory_configs(shape, dtype, arch), every):
            launch = partial(trajectory.trajectory, *arguments, shape, config)
            flop = {"trajectory_kernel": _trajectory_flop(shape, d, config)}
            yield Case(
                " ".join(filter(None, (f"N{N} F{F} D{D} d{d} {precision}", kind, _name(config)))),
                arch,
                partial(_at, "tf32" if precision == "tf32" else "ieee", launch),
                flop if dtype == _BF16 else {},
                {"trajectory_kernel": N},
                # 64 rows are work for four warps, but this residual stream needs eight to hold it.
                repeats=1.6 if N * D > 64 * 64 else 1.0,
            )


def _trajectory_arguments(shape: Shape, kind: str, dtype: torch.dtype) -> tuple[object, ...]:
    """Return the arguments for four images, eight steps and five labels."""
    B, K, R = 4, 8, 5
    guided, given = kind == "guided learned", kind == "given"
    N, F, C = shape.tokens, shape.features, shape.channels
    x = _meta(B, N * F // C, C, dtype=_F32)
    modulation = (
        _meta(K, R if given else 1, shape.width, dtype=_F32),
        None if given else _meta(R, shape.width, dtype=_F32),
        _meta(2 * B if guided else B, dtype=torch.int64),
    )
    seeds, noise = _meta(B, 2, dtype=torch.int64), _meta(K, *x.shape, dtype=_F32)
    weights, coefficients = _meta(shape.weights, dtype=dtype), _meta(K, len(COLUMNS), dtype=_F32)
    drawn = (None, noise) if given else (seeds, None)
    guidance = (4.0, 3) if guided else None
    return x, x, weights, *modulation, coefficients, 0, *drawn, guidance


def _trajectory_flop(shape: Shape, d: int, config: triton.Config) -> float:
    """Return the FLOP of the products, counting each loop body once: a group of heads, a chunk."""
    N, D = shape.tokens, shape.hidden
    heads, chunk, layers = (config.kwargs[name] for name in ("HEADS", "CHUNK", "STAGES"))
    ends = 2 * N * D * triton.next_power_of_2(shape.features)
    attention = heads * d * (4 * N * D + 2 * N * N)
    mlp = 2 * N * D * (4 * D if layers > 1 else chunk)
    return 2.0 * (ends + attention + mlp)
