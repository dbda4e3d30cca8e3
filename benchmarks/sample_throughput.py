"""Images per second of every way to sample, side by side, with the error beside the speed.

    python benchmarks/sample_throughput.py
    python benchmarks/sample_throughput.py --preset DiT-S/8 --batch 1 4 --steps 10

All ways take turns, round by round, in one process; only OpenVINO and ONNX Runtime have a process
of their own each, which is idle while others are timed. Speeds are medians over the rounds.
Ratios are to the reference, eager and compiled, where these are among the ways; they are medians of
the ratios by round. The first images of each way are compared to the reference in float64 with the
same noise: on a CPU the whole batch, on a GPU the first two images. The weights are random and not
zero, since a fresh DiT returns zeros, which would prove nothing about speed or error. The file of
--json is rewritten after every run, and a way that fails or runs out of memory leaves a row that
says so. "share" is the time of the floor of `roofline.py`, whose ceilings are measured in the same
process, over the time of a step. "FMA share", for the C++ trajectory only, is the model's FLOP/s
over the FLOP/s of multiply-adds on registers, which are measured after each of its runs.

The ways are: the plain model in the plain loop, eager, compiled for each batch size, or (on CUDA,
only if it is named) compiled with max-autotune and CUDA graphs; the DiT of diffusers in the same
sizes with its DDPM scheduler, which is another network and has no error here; fastdit in each of
its executions; and, on a CPU in float32 and where `pip install 'fastdit[rivals]'` has added them,
OpenVINO and ONNX Runtime, which run the plain model with the same weights in the plain loop. They
convert it in their first run, and have as many threads as PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import _harness as harness
import _rivals as rivals
import _ways as ways
import roofline
import torch
from _harness import DTYPES, FIGURE, Results, Row, attempt, median_ratio, positive, seconds, table
from _ways import TRAJECTORY, Case, Way
from tqdm import tqdm

import fastdit
from fastdit import flops, testing
from fastdit.diffusion import TerminalSNRWarning
from fastdit.kernels import cpu

COLUMNS = harness.columns(
    f"way; batch: d; {FIGURE}, min, max: .1f; "
    "ms/step, ratio, to compiled, share, FMA share: .2f; error: .1e; compile s: .1f"
)
MEMORY_COLUMNS = harness.columns("peak MiB, parts MiB: .0f")  # beyond the model's own; CUDA only


class Sampling(harness.SideBySide):
    """All ways to sample one batch."""

    BASES = {"ratio": ways.BASELINE, "to compiled": "reference compiled"}

    def __init__(self, case: Case, batch: int, names: list[str], results: Results) -> None:
        facts = {"preset": case.preset, "dtype": str(case.dtype).removeprefix("torch.")}
        rows = {name: {**facts, "way": name, "batch": batch} for name in names}
        super().__init__(rows, batch, results)
        self.case, self.labels = case, case.labels(batch)
        self.peaks: list[float] = []  # FLOP/s of multiply-adds after each run of the trajectory
        self.processes = contextlib.ExitStack()  # of rivals; leaving it ends them

    def begin(self, name: str) -> Way:
        """Make the way and sample once, to find its compile time, memory and error."""
        row, case, images = self.rows[name], self.case, []
        on_gpu = case.device.type == "cuda"
        # A new way for each batch, so that its memory is seen; PyTorch keeps compiled code.
        way = ways.WAYS[name](case)
        if isinstance(way, rivals.Rival):
            self.processes.callback(way.close)
        before = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        row["first run s"] = seconds(lambda: images.append(way(self.labels, None)), case.device)
        if on_gpu:
            row["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        self._compare(name, way, images[0])
        if name == "fastdit graph":
            parts = roofline.memory_parts(case.cfg, self.images, case.dtype, case.scheduler.T)
            row |= {"parts": parts, "parts MiB": sum(parts.values()) / 2**20}
        return way

    def _compare(self, name: str, way: Way, images: torch.Tensor) -> None:
        if name.startswith("diffusers"):
            return
        judged = self.case.judged(self.images)
        if name.startswith("reference") or name in rivals.PACKAGES:
            images = way(self.labels, self.case.noise(self.images))
        oracle = self.case.oracle(judged)
        self.rows[name]["error"] = testing.relative_error(images[:judged], oracle)

    def turn(self, name: str, way: Way) -> float:
        if isinstance(way, rivals.Rival):
            return way.seconds(self.labels)
        taken = harness.settled_seconds(lambda: way(self.labels, None), self.case.device)
        if name == TRAJECTORY and self.case.device.type == "cpu":
            self.peaks.append(cpu.peak_flop_per_second())
        return taken

    def detail(self, name: str, times: list[float]) -> None:
        row, steps = self.rows[name], self.case.scheduler.T
        median = self.images / row[FIGURE]
        row |= {"seconds": times, "ms/step": median / steps * 1e3}
        if name == TRAJECTORY and self.peaks:
            flop = flops.flop(self.case.cfg, self.images) * steps
            achieved = [flop / taken for taken in times]
            row |= {"FMA share": median_ratio(achieved, self.peaks), "FMA peaks": self.peaks}
        if name in (*ways.COMPILED, *rivals.PACKAGES):
            row["compile s"] = max(0.0, row["first run s"] - median)  # 0 if compiled before

    def add_floor(self) -> None:
        """Measure the floor of a step, and add each way's share of it."""
        case, floor = self.case, {"preset": self.case.preset, "rows": self.images}
        self.results["floors"].append(floor)
        call = lambda: roofline.measure(case.cfg, self.images, case.dtype, case.device)  # noqa: E731
        if (measured := attempt(floor, "floor s", call)) is not None:
            floor |= measured
            for name in self.times:
                self.rows[name]["share"] = floor["floor s"] * 1e3 / self.rows[name]["ms/step"]
        self.results.write()


def run(case: Case, args: argparse.Namespace, results: Results) -> None:
    """Add the rows and the floors of one preset in one dtype."""
    dtype = str(case.dtype).removeprefix("torch.")
    print(
        f"\n{case.preset}: {case.scheduler.T} steps, {dtype}; error is to the float64 reference "
        f"with the same noise, ratio to {ways.BASELINE}, share to the floor of a step"
    )
    obstacles = {way: ways.case_obstacle(way, case) for way in args.way}
    for way, reason in obstacles.items():
        if reason:
            print(f"without {way}, which {reason}")
    chosen = [way for way in args.way if not obstacles[way]]
    first = len(results["rows"])
    with tqdm(total=len(args.batch) * (1 + len(chosen) * (1 + args.rounds)), leave=False) as bar:
        for batch in args.batch:
            sampling = Sampling(case, batch, chosen, results)
            with sampling.processes:
                sampling.run(args.rounds, bar)
            bar.set_description("floor")
            sampling.add_floor()
            bar.update()
    memory = MEMORY_COLUMNS if case.device.type == "cuda" else {}
    print(table(COLUMNS | memory, results["rows"][first:]))


def make_case(preset: str, dtype: str, args: argparse.Namespace) -> Case:
    steps = args.steps or (200 if preset == "toy" else 50)
    schedule = "linear" if preset == "toy" else "cosine"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TerminalSNRWarning)  # random weights: no samples to spoil
        scheduler = fastdit.DiffusionScheduler(steps, args.device, schedule)
    return Case(preset, fastdit.PRESETS[preset], scheduler, DTYPES[dtype], args.device)


def plot(path: Path, facts: Row, rows: list[Row]) -> None:
    """Plot images per second, with a group of bars for each batch."""
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
            axis.bar(places, [row[FIGURE] for row in bars], width, label=name)
        axis.set_xticks([b + 0.4 - width / 2 for b in range(len(batches))], batches)
        axis.set(xlabel="batch", ylabel=FIGURE, title=f"{preset} on {facts['device']}")
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = harness.parser(__doc__, device=True)
    add = parser.add_argument
    presets = ["toy", *(["DiT-S/2", "DiT-B/2", "DiT-XL/2"] if torch.cuda.is_available() else [])]
    of_presets = f"one or more of {', '.join(fastdit.PRESETS)}"
    named = {"nargs": "+", "metavar": "NAME"}
    add("--preset", **named, choices=fastdit.PRESETS, default=presets, help=of_presets)
    add("--batch", nargs="+", type=positive, default=[1, 16, 64], metavar="B")
    add("--steps", type=positive, help="default: 200 for the toy, 50 for others")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    of_ways = f"one or more of {', '.join(ways.WAYS)}"
    default = f"all that can run here except {ways.MAX_AUTOTUNE}"
    add("--way", **named, choices=ways.WAYS, help=f"{of_ways}; default: {default}")
    add("--rounds", type=positive, default=3, help="timed runs of each way")
    add("--plot", type=Path, metavar="PATH", help="needs fastdit[plots]")
    args = parser.parse_args(argv)
    obstacles: dict[str, Any] = {way: ways.obstacle(way, args.device) for way in ways.WAYS}
    for way in args.way or ():
        if obstacles[way]:
            parser.error(f"--way: {way!r} {obstacles[way]}")
    default = [way for way in ways.WAYS if not obstacles[way] and way != ways.MAX_AUTOTUNE]
    args.way = list(dict.fromkeys(args.way or default))
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: needs matplotlib; pip install 'fastdit[plots]'")
    return args


def main() -> None:
    args = parse()
    timed = [way for way in args.way if way in rivals.PACKAGES and "float32" in args.dtype]
    packages = [package for way in timed for package in rivals.PACKAGES[way]]
    results = Results.of(args, args.device, packages, floors=[])
    with harness.fresh_compile_cache():
        if set(args.way) & set(ways.COMPILED):  # compile times exclude the compiler's start
            torch.compile(lambda x: x + 1)(torch.ones(8, device=args.device))
        for preset in args.preset:
            for dtype in args.dtype:
                torch._dynamo.reset()
                run(make_case(preset, dtype, args), args, results)
    if args.plot:
        plot(args.plot, results.facts, results["rows"])
    sys.exit(results.has_failures(FIGURE))


if __name__ == "__main__":
    main()
