"""Every launch configuration on DiT's shapes: what `report.py --stage tune` times. GPU only.

Triton's `do_bench` times, with the L2 cache cleared before each launch. The two attention
backwards are passes of one launcher: either is timed with the other at its default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from _ops import ATTENTION, PLAIN_LN, UPDATE, Case, inputs
from torch import Tensor

from fastdit.kernels import adaln, sampling
from fastdit.kernels import attention as attn
from fastdit.kernels import attention_configs as sizes
from fastdit.kernels.common import arch

COLUMNS = {
    "kernel": "",
    "shape": "",
    "dtype": "",
    "config": "",
    "us": ".1f",
    "p20": ".1f",
    "p80": ".1f",
    "default": "",
}
_TOKENS = tuple(Case(PLAIN_LN, (64, 256, D)) for D in (384, 768, 1152))
_HEADS = tuple(
    Case(ATTENTION, shape)
    for shape in ((64, 256, 16, 72), (16, 1024, 16, 72), (64, 256, 16, 64), (64, 64, 16, 72))
)
_STATES = (Case(UPDATE, (64, 4, 32, 32), "mixed"),)

Job = tuple[str, Callable[[], list[dict[str, Any]]]]


def jobs() -> Iterator[Job]:
    """(name, what times its configurations) of each kernel and shape."""
    makers = ((_layer_norm, _TOKENS), (_attention, _HEADS), (_update, _STATES))
    for maker, cases in makers:
        for case in cases:
            yield f"{case}", lambda maker=maker, case=case: maker(case, torch.device("cuda"))


def _compare(
    kernel: str, case: Case, configs: list[triton.Config], launch: Callable[[Any], object]
) -> list[dict[str, Any]]:
    """A row a configuration, the fastest first, those that do not run last."""
    rows = []
    for i, config in enumerate(configs):
        names = ", ".join(f"{k} {v}" for k, v in config.all_kwargs().items() if v is not None)
        row = {"kernel": kernel, "shape": case.size, "dtype": case.dtype, "config": names}
        row["default"] = "default" if i == 0 else ""
        try:
            median, low, high = triton.testing.do_bench(
                lambda config=config: launch(config), quantiles=[0.5, 0.2, 0.8]
            )
            row |= {"us": median * 1e3, "p20": low * 1e3, "p80": high * 1e3}
        except Exception as error:  # too much shared memory, a compiler error: the others go on
            row |= {"us": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
        rows.append(row)
    return sorted(rows, key=lambda r: r["us"] if isinstance(r["us"], float) else float("inf"))


def _layer_norm(case: Case, device: torch.device) -> list[dict[str, Any]]:
    (x, scale, shift), _ = inputs(case, device, seed=0)
    y, dh, dr = (torch.randn_like(x) for _ in range(3))
    D, gate = case.shape[-1], torch.randn_like(scale)
    fwd, bwd = adaln.layer_norm_modulate_fwd_configs(D), adaln.layer_norm_modulate_bwd_configs(D)
    rows = []
    for name, residual in (("layer_norm", ()), ("gated_residual_layer_norm", (y, gate))):

        def forward(config: Any, residual: tuple[Tensor, ...] = residual) -> Any:
            return adaln.layer_norm_modulate_fwd(
                x, scale, shift, 1e-6, *(residual or (None, None)), config
            )

        r, _, mean, rstd = forward(None)
        gated = (dr, *residual) if residual else None

        def backward(config: Any, a: tuple = (dh, r, scale, mean, rstd, gated)) -> Any:
            return adaln.layer_norm_modulate_bwd(*a, config)

        rows += _compare(f"{name}_modulate_fwd", case, fwd, forward)
        rows += _compare(f"{name}_modulate_bwd", case, bwd, backward)
    return rows


def _attention(case: Case, device: torch.device) -> list[dict[str, Any]]:
    (qkv,), _ = inputs(case, device, seed=0)
    _, N, h, d = case.shape
    out, lse = attn.attention_fwd(qkv, h)
    a = (torch.randn_like(out), qkv, out, lse, h)
    on = (qkv.dtype, arch(device))
    fwd, dq = sizes.attention_fwd_configs(N, *on), sizes.attention_dq_bwd_configs(N, *on)
    dkv = sizes.attention_dkv_bwd_configs(N, d, *on)
    return [
        *_compare("attention_fwd", case, fwd, lambda c: attn.attention_fwd(qkv, h, c)),
        *_compare("attention_dq_bwd", case, dq, lambda c: attn.attention_bwd(*a, dq=c)),
        *_compare("attention_dkv_bwd", case, dkv, lambda c: attn.attention_bwd(*a, dkv=c)),
    ]


def _update(case: Case, device: torch.device) -> list[dict[str, Any]]:
    tensors, options = inputs(case, device, seed=0)
    guidance = (options["guidance"].scale, options["guidance"].channels)
    return _compare(
        "sampler_update",
        case,
        sampling.sampler_update_configs(),
        lambda c: sampling.sampler_update(
            *tensors, seeds=options["seeds"], guidance=guidance, config=c
        ),
    )
