"""Every launch configuration of the kernels on DiT's shapes, side by side. Needs a GPU.

    python benchmarks/_tune.py --group xl --json rows.json

Triton's `do_bench` does the timing and clears the L2 cache before each launch. The two attention
backwards are passes of one launcher, so that each is timed with the other at its default. All
configurations are compiled on all CPUs before the first is timed. The file is rewritten after each
of them. `_advice.py` derives from the rows what should change in the code.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import _harness as harness
import torch
import triton
from _advice import print_advice
from _harness import Results, attempt
from _ops import ATTENTION, PLAIN_LN, QK, SWIGLU, UPDATE, Case, inputs
from triton.runtime._async_compile import AsyncCompileMode

from fastdit import PRESETS, DiffusionScheduler, DiTConfig
from fastdit.flops import products
from fastdit.kernels import (
    adaln,
    adaln_configs,
    aot,
    qk_norm_rope,
    sampling,
    swiglu,
    trajectory,
)
from fastdit.kernels import attention as attn
from fastdit.kernels import attention_configs as sizes
from fastdit.kernels.common import arch
from fastdit.kernels.shape import Shape
from fastdit.kernels.trajectory_configs import trajectory_configs
from fastdit.ops.trajectory import kernel_shape
from fastdit.solvers import DDPM

Launch = Callable[[triton.Config], Any]
FIGURE = "us"
TRAJECTORY_STEPS = 20


@dataclass(frozen=True)
class Contest:
    """One kernel on one shape; `prepare` makes the inputs and returns the launch of a config."""

    kernel: str
    shape: str
    dtype: str
    configs: list[triton.Config]
    prepare: Callable[[], Launch]


def contests(group: str, device: torch.device) -> Iterator[Contest]:
    """Yield the contests of a group, those for sampling first."""
    if group == "xl":
        rows = (128, 32, 2)
        for B in rows:
            yield from _attention(Case(ATTENTION, (B, 256, 16, 72)), device, ("fwd",))
            yield from _layer_norm(Case(PLAIN_LN, (B, 256, 1152)), device, ("fwd",))
        for B in rows[:2]:
            yield from _attention(Case(ATTENTION, (B, 256, 16, 72)), device, ("dq", "dkv"))
            yield from _layer_norm(Case(PLAIN_LN, (B, 256, 1152)), device, ("bwd",))
    elif group == "trajectory":
        for B in (1, 132, 1056):
            yield _trajectory(PRESETS["toy"], B, device)
    else:
        for D in (384, 768):
            yield from _layer_norm(Case(PLAIN_LN, (64, 256, D)), device, ("fwd", "bwd"))
        for shape in ((16, 1024, 16, 72), (64, 256, 16, 64), (64, 64, 16, 72)):
            yield from _attention(Case(ATTENTION, shape), device, ("fwd", "dq", "dkv"))
        yield _update(Case(UPDATE, (64, 4, 32, 32), "mixed"), device)
        for d in (72, 64):
            yield from _qk_norm_rope(Case(QK, (64, 256, 16, d)), device)
        yield from _swiglu(Case(SWIGLU, (64, 256, 3072)), device)
        for changes in ({"img_size": 32}, {"hidden": 128}):
            yield _trajectory(DiTConfig(**changes), 132, device)


def _layer_norm(case: Case, device: torch.device, passes: tuple[str, ...]) -> Iterator[Contest]:
    D = case.shape[-1]
    configs = {
        "fwd": adaln_configs.norm_modulate_fwd_configs(D),
        "bwd": adaln_configs.norm_modulate_bwd_configs(D),
    }

    def prepare(gated: bool, backward: bool) -> Launch:
        (x, scale, shift), _ = inputs(case, device, seed=0)
        y, dh, dr = (torch.randn_like(x) for _ in range(3))
        residual = (y, torch.randn_like(scale)) if gated else None
        if not backward:
            return lambda c: adaln.norm_modulate_fwd(x, scale, shift, 1e-6, None, residual, c)
        # These stand for the forward's statistics, whose values do not affect the time.
        given = dh, x, scale, torch.zeros(2, *case.shape[:2], device=device).unbind()
        of_residual = (dr, *residual) if residual else None
        return lambda c: adaln.norm_modulate_bwd(*given, residual=of_residual, config=c)

    for name in passes:
        for gated in (True, False):
            kernel = f"{'gated_residual_' if gated else ''}layer_norm_modulate_{name}"
            make = functools.partial(prepare, gated, name == "bwd")
            yield Contest(kernel, case.size, case.dtype, configs[name], make)


def _attention(case: Case, device: torch.device, passes: tuple[str, ...]) -> Iterator[Contest]:
    _, N, h, d = case.shape
    on = (torch.bfloat16, arch(device))
    configs = {
        "fwd": sizes.attention_fwd_configs(N, *on),
        "dq": sizes.attention_dq_bwd_configs(N, *on),
        "dkv": sizes.attention_dkv_bwd_configs(N, d, *on),
    }

    def prepare(name: str) -> Launch:
        (qkv,), _ = inputs(case, device, seed=0)
        if name == "fwd":
            return lambda c: attn.attention_fwd(qkv, h, c)
        out, dout = (qkv.new_empty(*qkv.shape[:2], h * d).normal_() for _ in range(2))
        lse = torch.zeros(case.shape[0], h, N, device=device)
        return lambda c: attn.attention_bwd(dout, qkv, out, lse, h, **{name: c})

    for name in passes:
        kernel = f"attention_{name}" + ("" if name == "fwd" else "_bwd")
        make = functools.partial(prepare, name)
        yield Contest(kernel, case.size, case.dtype, configs[name], make)


def _update(case: Case, device: torch.device) -> Contest:
    def prepare() -> Launch:
        tensors, options = inputs(case, device, seed=0)
        guidance = (options["guidance"].scale, options["guidance"].channels)
        return lambda c: sampling.sampler_update(
            *tensors, seeds=options["seeds"], guidance=guidance, config=c
        )

    configs = sampling.sampler_update_configs()
    return Contest("sampler_update", case.size, case.dtype, configs, prepare)


def _qk_norm_rope(case: Case, device: torch.device) -> Iterator[Contest]:
    h, d = case.shape[2:]
    configs = {
        "fwd": qk_norm_rope.qk_norm_rope_fwd_configs(d),
        "bwd": qk_norm_rope.qk_norm_rope_bwd_configs(d),
    }

    def prepare(backward: bool) -> Launch:
        (qkv,), options = inputs(case, device, seed=0)
        names = ("q_weight", "q_bias", "k_weight", "k_bias")
        given = h, tuple(options[name].detach() for name in names), options["rope"], 1e-6
        if not backward:
            return lambda c: qk_norm_rope.qk_norm_rope_fwd(qkv, *given, c)
        dout = torch.randn_like(qkv)
        return lambda c: qk_norm_rope.qk_norm_rope_bwd(dout, qkv, *given, c)

    for name, own in configs.items():
        make = functools.partial(prepare, name == "bwd")
        yield Contest(f"qk_norm_rope_{name}", case.size, case.dtype, own, make)


def _swiglu(case: Case, device: torch.device) -> Iterator[Contest]:
    def prepare(backward: bool) -> Launch:
        (x,), _ = inputs(case, device, seed=0)
        if not backward:
            return lambda c: swiglu.swiglu_fwd(x, c)
        dout = torch.randn(case.shape, device=device, dtype=x.dtype)
        return lambda c: swiglu.swiglu_bwd(dout, x, c)

    for name in ("fwd", "bwd"):
        make = functools.partial(prepare, name == "bwd")
        configs = swiglu.swiglu_configs(case.shape[-1])
        yield Contest(f"swiglu_{name}", case.size, case.dtype, configs, make)


def _trajectory(cfg: DiTConfig, B: int, device: torch.device) -> Contest:
    """Make the contest of a model like the toy in bfloat16; float32 has one configuration."""
    (integers, floats), dtype = kernel_shape(cfg), torch.bfloat16
    *numbers, tanh = integers
    shape = Shape(*numbers, bool(tanh), *floats)

    def prepare() -> Launch:
        def randn(*size: int) -> torch.Tensor:
            return 0.1 * torch.randn(size, device=device)

        table = DDPM().table(DiffusionScheduler(TRAJECTORY_STEPS, schedule="cosine"), None)
        by_step = randn(TRAJECTORY_STEPS, 1, shape.width).to(dtype)
        by_label = randn(cfg.num_classes, shape.width).to(dtype)
        rows = torch.arange(B, device=device) % cfg.num_classes
        seeds = torch.arange(2 * B, device=device).view(B, 2)
        x = randn(B, cfg.img_size**2, cfg.in_channels)
        # Weights of all products, positions, biases of the layers and of the last product.
        weights = sum(p.inner * p.columns * p.times for p in products(cfg, 1))
        weights += shape.tokens * cfg.hidden + 9 * cfg.hidden * cfg.n_layers + shape.out_features
        tensors = (x, torch.zeros_like(x), randn(weights).to(dtype), by_step, by_label, rows)
        others = (table.coefficients.to(device), 0, seeds, None, None, shape)
        return lambda c: trajectory.trajectory(*tensors, *others, c)

    size = f"{B}x{shape.tokens}x{cfg.hidden}"
    configs = trajectory_configs(shape, dtype, arch(device))
    return Contest("trajectory", size, "bfloat16", configs, prepare)


def precompile(jobs: Iterable[Contest]) -> None:
    """Compile all configurations in parallel; a failure is reported when its timing fails."""
    with (
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        AsyncCompileMode(pool, ignore_errors=True),
    ):
        for contest in jobs:
            attempt({}, FIGURE, functools.partial(_warm_up, contest))


def _warm_up(contest: Contest) -> None:
    launch = contest.prepare()
    for config in contest.configs:
        for made in aot.record(functools.partial(launch, config)):
            made.kernel.warmup(grid=made.grid, **made.args, **made.options)


def compare(contest: Contest, device: torch.device, results: Results) -> None:
    """Add a row for each configuration, the default first."""
    launch: Launch | None = None
    for i, config in enumerate(contest.configs):
        values = {k: v for k, v in config.all_kwargs().items() if v is not None}
        row = {"kernel": contest.kernel, "shape": contest.shape, "dtype": contest.dtype}
        row |= {"arch": sizes.family_of(arch(device)), "values": values}
        row["default"] = "default" if i == 0 else ""
        results["rows"].append(row)

        def time(config: triton.Config = config) -> tuple[float, ...]:
            nonlocal launch
            launch = launch or contest.prepare()
            return triton.testing.do_bench(lambda: launch(config), quantiles=[0.5, 0.2, 0.8])

        if (times := attempt(row, FIGURE, time)) is not None:
            row |= {name: t * 1e3 for name, t in zip((FIGURE, "p20", "p80"), times, strict=True)}
        results.write()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("--group", choices=("xl", "trajectory", "others"), default="xl")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    if not torch.cuda.is_available():
        sys.exit("_tune.py: expected a GPU, found none")
    device = torch.device("cuda")
    results = Results.of(args, device)
    precompile(contests(args.group, device))
    for contest in contests(args.group, device):
        compare(contest, device, results)
    print_advice(results["rows"])
    sys.exit(results.has_failures(FIGURE))


if __name__ == "__main__":
    main()
