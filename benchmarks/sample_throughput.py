"""Images per second of every way to sample, side by side, with the error beside the speed.

    python benchmarks/sample_throughput.py
    python benchmarks/sample_throughput.py --preset DiT-S/8 --batch 1 4 --steps 10

The ways are timed in turn, round by round, in one process; figures are medians over the rounds,
ratios are medians of the rounds' ratios. Before the rounds each way samples once with recorded
noise, and that result is held against the reference in float64 with the same noise. Weights are
random and none is zero: a fresh DiT returns zeros, and neither speed nor error would mean much.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _harness import (
    fresh_compile_cache,
    machine,
    median_ratio,
    print_machine,
    seconds,
    table,
    write_json,
)
from torch import Tensor, nn
from tqdm import tqdm

import fastdit
from fastdit import reference, testing
from fastdit.diffusion import TerminalSNRWarning
from fastdit.sampler import EXECUTIONS

BASELINE = "reference eager"
COMPILED = "reference compiled"
REFERENCE_WAYS = {BASELINE: "eager", COMPILED: "compiled"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
COLUMNS = {
    "way": "",
    "batch": "d",
    "images/s": ".1f",
    "min": ".1f",
    "max": ".1f",
    "ms/step": ".2f",
    "ratio": ".2f",
    "error": ".1e",
    "compile s": ".1f",
}


@dataclass
class Case:
    """One model on one device, and how long and in what dtype it is sampled."""

    preset: str
    model: fastdit.DiT
    scheduler: fastdit.DiffusionScheduler
    dtype: torch.dtype
    device: torch.device
    plain: reference.DiT = field(init=False)

    def __post_init__(self) -> None:
        self.plain = reference.DiT.from_config(self.model.cfg).to(self.device)
        self.plain.load_state_dict(self.model.state_dict())
        if self.dtype == torch.float64:
            self.plain.double()

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def labels(self, batch: int) -> Tensor:
        return torch.arange(batch, device=self.device) % self.model.cfg.num_classes

    def recorded(self, batch: int) -> tuple[Tensor, Tensor]:
        """(x_T, noise) for one error run."""
        shape = (self.scheduler.T + 1, batch, *self.model.cfg.sample_shape)
        z = torch.randn(shape, generator=torch.Generator().manual_seed(batch)).to(self.device)
        return z[0], z[1:]


# A way: (labels, x_T, noise) -> images; with x_T and noise None it makes its own.
Way = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def reference_way(case: Case, compiled: bool) -> Way:
    """The plain loop; in 16 bits under autocast, as its users run it."""
    model: nn.Module = case.plain
    if compiled:
        # One graph a batch size is the fastest it gets; fullgraph: it never falls back unseen.
        model = torch.compile(model, dynamic=False, fullgraph=True)

    def sample(labels: Tensor, x_T: Tensor | None, noise: Tensor | None) -> Tensor:
        if x_T is None:
            shape = (len(labels), *case.model.cfg.sample_shape)
            x_T = torch.randn(shape, device=case.device, dtype=case.state_dtype)
        low_precision = case.dtype == torch.bfloat16
        with torch.autocast(case.device.type, torch.bfloat16, enabled=low_precision):
            x_T = x_T.to(case.state_dtype)
            return reference.sample(model, case.scheduler, x_T, labels, noise)

    return sample


def fastdit_way(case: Case, execution: str) -> Way:
    model = fastdit.DiT.from_config(case.model.cfg).to(case.device)
    model.load_state_dict(case.model.state_dict())
    sampler = fastdit.Sampler(model.to(case.dtype), case.scheduler, execution=execution)

    def sample(labels: Tensor, x_T: Tensor | None, noise: Tensor | None) -> Tensor:
        return sampler(labels, x_T=x_T, noise=noise)

    return sample


def measure(
    case: Case, ways: dict[str, Way], batch: int, rounds: int, bar: tqdm
) -> list[dict[str, Any]]:
    """One row a way."""
    labels = case.labels(batch)
    x_T, noise = case.recorded(batch)
    bar.set_description(f"batch {batch}, float64 oracle")
    exact = reference.DiT.from_config(case.model.cfg).to(case.device)
    exact.load_state_dict(case.model.state_dict())
    oracle = reference.sample(exact.double(), case.scheduler, x_T.double(), labels, noise.double())
    del exact
    bar.update()

    rows: dict[str, dict[str, Any]] = {}
    for name, sample in ways.items():
        bar.set_description(f"batch {batch}, {name}, first run")
        rows[name] = {"preset": case.preset, "way": name, "batch": batch}
        start = time.perf_counter()
        try:
            result = sample(labels, x_T, noise)
            rows[name]["error"] = testing.relative_error(result, oracle)
            rows[name]["first run s"] = time.perf_counter() - start
        except torch.cuda.OutOfMemoryError:
            rows[name]["images/s"] = "out of memory"
        except torch._dynamo.exc.TorchDynamoException as error:
            rows[name]["images/s"] = "did not compile"
            print(f"{name}, batch {batch}: {str(error).splitlines()[0]}")
        bar.update()

    timed = {name: way for name, way in ways.items() if "error" in rows[name]}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for i in range(rounds):
        for name, sample in timed.items():
            bar.set_description(f"batch {batch}, {name}, round {i + 1} of {rounds}")
            times[name].append(seconds(lambda s=sample: s(labels, None, None), case.device))
            bar.update()
    for name, row in rows.items():
        if name in times:
            row |= figures(case, batch, times[name], times.get(BASELINE))
            if name == COMPILED:
                row["compile s"] = row["first run s"] - statistics.median(times[name])
    return list(rows.values())


def figures(
    case: Case, batch: int, times: list[float], baseline: list[float] | None
) -> dict[str, Any]:
    median = statistics.median(times)
    return {
        "images/s": batch / median,
        "min": batch / max(times),
        "max": batch / min(times),
        "ms/step": median / case.scheduler.T * 1e3,
        "ratio": median_ratio(baseline, times) if baseline else None,
        "seconds": times,
    }


def run(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    ways = {
        name: reference_way(case, compiled=name == COMPILED)
        for name, execution in REFERENCE_WAYS.items()
        if execution in args.execution or name == BASELINE
    }
    ways |= {f"fastdit {e}": fastdit_way(case, e) for e in EXECUTIONS if e in args.execution}
    print(
        f"\n{case.preset}: {case.scheduler.T} steps, {args.dtype}; error is against the float64 "
        f"reference with the same noise; ratio is to {BASELINE}"
    )
    rows = []
    total = len(args.batch) * (1 + len(ways) * (1 + args.rounds))
    with tqdm(total=total, leave=False) as bar:
        for batch in args.batch:
            rows += measure(case, ways, batch, args.rounds, bar)
    print(table(COLUMNS, rows))
    return rows


def build(preset: str, args: argparse.Namespace, device: torch.device) -> Case:
    steps = args.steps or (200 if preset == "toy" else 50)
    schedule = "linear" if preset == "toy" else "cosine"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TerminalSNRWarning)  # random weights: no samples to spoil
        scheduler = fastdit.DiffusionScheduler(steps, device, schedule)
    model = fastdit.DiT.from_config(fastdit.PRESETS[preset])
    testing.randomize(model)
    return Case(preset, model.to(device), scheduler, DTYPES[args.dtype], device)


def plot(path: Path, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Images per second by batch, one group of bars a batch."""
    import matplotlib.pyplot as plt

    timed = [row for row in rows if "seconds" in row]
    presets = list(dict.fromkeys(row["preset"] for row in timed))
    figure, axes = plt.subplots(
        1, len(presets), figsize=(6 * len(presets), 4), squeeze=False, layout="constrained"
    )
    for axis, preset in zip(axes[0], presets, strict=True):
        own = [row for row in timed if row["preset"] == preset]
        names = list(dict.fromkeys(row["way"] for row in own))
        batches = list(dict.fromkeys(row["batch"] for row in own))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            bars = [row for row in own if row["way"] == name]
            places = [batches.index(row["batch"]) + i * width for row in bars]
            axis.bar(places, [row["images/s"] for row in bars], width, label=name)
        axis.set_xticks([b + 0.4 - width / 2 for b in range(len(batches))], batches)
        axis.set(xlabel="batch", ylabel="images/s", title=f"{preset} on {facts['device']}")
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument(
        "--preset",
        nargs="+",
        choices=fastdit.PRESETS,
        metavar="NAME",
        default=["toy", "DiT-S/2", "DiT-B/2", "DiT-XL/2"] if on_gpu else ["toy"],
        help=f"one or more of {', '.join(fastdit.PRESETS)}",
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64], metavar="B")
    parser.add_argument("--steps", type=int, help="default: 200 for the toy, 50 for the others")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    executions = ["compiled", *EXECUTIONS]
    parser.add_argument(
        "--execution",
        nargs="+",
        choices=executions,
        default=executions,
        help="ways to time besides the reference eager; 'compiled' is the reference's",
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each way")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="needs fastdit[plots]")
    args = parser.parse_args(argv)
    for name in ("batch", "steps", "rounds"):
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    if args.plot and not _has_matplotlib():
        parser.error("--plot: needs matplotlib; pip install 'fastdit[plots]'")
    return args


def _has_matplotlib() -> bool:
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    facts = machine(device)
    print_machine(facts)
    rows = []
    with fresh_compile_cache():
        for preset in args.preset:
            torch._dynamo.reset()
            try:
                rows += run(build(preset, args, device), args)
            except torch.cuda.OutOfMemoryError as error:
                print(f"{preset}: does not fit ({str(error).splitlines()[0]})")
    if args.json:
        write_json(args.json, facts, vars(args), rows=rows)
    if args.plot:
        plot(args.plot, facts, rows)


if __name__ == "__main__":
    main()
