"""Images per second of every way to sample, side by side, with the error beside the speed.

    python benchmarks/sample_throughput.py
    python benchmarks/sample_throughput.py --preset DiT-S/8 --batch 1 4 --steps 10

The ways are timed in turn, round by round, in one process; figures are medians over the rounds,
and ratios, to the reference eager and compiled where these are among the ways, medians of the
rounds' ratios. Each way's first images are held against the reference in float64 with the same
noise: all of a batch on a CPU, the first two on a GPU. Weights are random and none is zero: a fresh
DiT returns zeros, and neither speed nor error would mean much. The file of --json is written anew
after every run, and a way that fails or runs out of memory is a row that says so.
The share is that of the floor of `roofline.py`, whose ceilings are measured in the same process.
"FMA share", of the C++ trajectory, is the model's FLOP a second over what multiply-adds on
registers alone reach, measured after each of its runs.

Ways: the plain model in the plain loop, eager, compiled for each batch size, or (on CUDA, where it
is named) compiled with max-autotune and CUDA graphs; diffusers' DiT of the same sizes with its DDPM
scheduler, which is another network and has no error here; fastdit in each of its executions.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import roofline
import torch
from _harness import (
    DTYPES,
    Results,
    attempt,
    fresh_compile_cache,
    machine,
    median_ratio,
    print_machine,
    seconds,
    table,
)
from _ways import (
    BASELINE,
    COMPILED,
    MAX_AUTOTUNE,
    TRAJECTORY,
    WAYS,
    Case,
    Way,
    obstacle,
    trajectory_obstacle,
)
from tqdm import tqdm

import fastdit
from fastdit import flops, testing
from fastdit.diffusion import TerminalSNRWarning
from fastdit.kernels import cpu

FIGURE = "images/s"
COLUMNS = {
    "way": "",
    "batch": "d",
    FIGURE: ".1f",
    "min": ".1f",
    "max": ".1f",
    "ms/step": ".2f",
    "ratio": ".2f",
    "to compiled": ".2f",
    "share": ".2f",
    "FMA share": ".2f",
    "error": ".1e",
    "compile s": ".1f",
}
MEMORY_COLUMNS = {"peak MiB": ".0f", "parts MiB": ".0f"}  # what a way adds to the model; on CUDA
Row = dict[str, Any]


class Measurement:
    """All ways at one batch: rows that fill as they are timed, and the floor of a step."""

    def __init__(self, case: Case, batch: int, names: list[str], write: Callable[[], None]) -> None:
        self.case, self.batch, self._write = case, batch, write
        self.labels = case.labels(batch)
        facts = {"preset": case.preset, "dtype": str(case.dtype).removeprefix("torch.")}
        self.rows: dict[str, Row] = {name: {**facts, "way": name, "batch": batch} for name in names}
        self.times: dict[str, list[float]] = {}
        self.peaks: list[float] = []  # what multiply-adds reach, after each trajectory on a CPU

    def first_run(self, name: str) -> Row:
        """Make the way and sample once, for its compilation, memory and error."""
        row, on_gpu = self.rows[name], self.case.device.type == "cuda"

        def sample() -> Way:
            # Made anew, so that what each holds is seen; compiled code is kept by PyTorch.
            way, kept = WAYS[name](self.case), []
            before = torch.cuda.memory_allocated() if on_gpu else 0
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            row["first run s"] = seconds(
                lambda: kept.append(way(self.labels, None)), self.case.device
            )
            if on_gpu:
                row["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            self._judge(name, way, kept[0])
            return way

        if (way := attempt(row, FIGURE, sample)) is not None:
            self.times[name] = []
            if name == "fastdit graph":
                parts = (self.batch, self.case.dtype, self.case.scheduler.T)
                row["parts"] = roofline.memory_parts(self.case.cfg, *parts)
                row["parts MiB"] = sum(row["parts"].values()) / 2**20
        self._write()
        return way

    def _judge(self, name: str, way: Way, images: torch.Tensor) -> None:
        if name.startswith("diffusers"):
            return
        judged = self.case.judged(self.batch)
        if name.startswith("reference"):
            images = way(self.labels, self.case.noise(self.batch))
        oracle = self.case.oracle(judged)
        self.rows[name]["error"] = testing.relative_error(images[:judged], oracle)

    def time(self, name: str, way: Way) -> bool:
        """One timed run more; False where it failed."""
        call = lambda: seconds(lambda: way(self.labels, None), self.case.device)  # noqa: E731
        taken = attempt(self.rows[name], FIGURE, call)
        if taken is None:
            del self.times[name]
        else:
            self.times[name].append(taken)
            if name == TRAJECTORY and self.case.device.type == "cpu":
                self.peaks.append(cpu.peak_flop_per_second())
            self._fill()
        self._write()
        return taken is not None

    def _fill(self) -> None:
        """The figures of the runs so far; ratios, of the rounds that all ways have run."""
        for name, times in self.times.items():
            row = self.rows[name]
            if not times:
                continue
            median = statistics.median(times)
            row |= {FIGURE: self.batch / median, "min": self.batch / max(times)}
            row |= {"max": self.batch / min(times), "seconds": times}
            row["ms/step"] = median / self.case.scheduler.T * 1e3
            for ratio, base in (("ratio", BASELINE), ("to compiled", "reference compiled")):
                if whole := min(len(times), len(self.times.get(base, ()))):
                    row[ratio] = median_ratio(self.times[base][:whole], times[:whole])
            if name == TRAJECTORY and self.peaks:
                flop = flops.flop(self.case.cfg, self.batch) * self.case.scheduler.T
                achieved = [flop / taken for taken in times[: len(self.peaks)]]
                row |= {"FMA share": median_ratio(achieved, self.peaks), "FMA peaks": self.peaks}
            if name in COMPILED:
                row["compile s"] = max(0.0, row["first run s"] - median)  # 0 where it was there

    def add_floor(self, floor: Row) -> None:
        for name in self.times:
            self.rows[name]["share"] = floor["floor s"] * 1e3 / self.rows[name]["ms/step"]
        self._write()


def measure(
    case: Case, names: list[str], batch: int, rounds: int, bar: tqdm, results: Results
) -> None:
    """Add a row a way to the results, and the floor of a step."""
    own = Measurement(case, batch, names, results.write)
    ways: dict[str, Way] = {}
    for name in names:
        bar.set_description(f"batch {batch}, {name}, first run")
        results["rows"].append(own.rows[name])
        if (way := own.first_run(name)) is not None:
            ways[name] = way
        bar.update()
    for i in range(rounds):
        for name, way in list(ways.items()):
            bar.set_description(f"batch {batch}, {name}, round {i + 1} of {rounds}")
            if not own.time(name, way):
                del ways[name]
            bar.update()
    bar.set_description(f"batch {batch}, floor")
    floor: Row = {"preset": case.preset, "rows": batch}
    results["floors"].append(floor)
    of_step = lambda: roofline.measure(case.cfg, batch, case.dtype, case.device)  # noqa: E731
    if (measured := attempt(floor, "floor s", of_step)) is not None:
        floor |= measured
        own.add_floor(floor)
    bar.update()
    results.write()


def run(case: Case, args: argparse.Namespace, results: Results) -> None:
    """Add the rows and the floors of a preset in a dtype."""
    dtype = str(case.dtype).removeprefix("torch.")
    print(
        f"\n{case.preset}: {case.scheduler.T} steps, {dtype}; error is against the float64 "
        f"reference with the same noise; ratio is to {BASELINE}, share that of the floor"
    )
    chosen, first = list(args.way), len(results["rows"])
    reason = trajectory_obstacle(case) if TRAJECTORY in chosen else None
    if reason:
        print(f"without {TRAJECTORY}, which {reason}")
        chosen.remove(TRAJECTORY)
    with tqdm(total=len(args.batch) * (1 + len(chosen) * (1 + args.rounds)), leave=False) as bar:
        for batch in args.batch:
            measure(case, chosen, batch, args.rounds, bar, results)
    memory = MEMORY_COLUMNS if case.device.type == "cuda" else {}
    print(table(COLUMNS | memory, results["rows"][first:]))


def make_case(preset: str, dtype: str, args: argparse.Namespace, device: torch.device) -> Case:
    steps = args.steps or (200 if preset == "toy" else 50)
    schedule = "linear" if preset == "toy" else "cosine"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TerminalSNRWarning)  # random weights: no samples to spoil
        scheduler = fastdit.DiffusionScheduler(steps, device, schedule)
    return Case(preset, fastdit.PRESETS[preset], scheduler, DTYPES[dtype], device)


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
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument(
        "--way",
        nargs="+",
        choices=WAYS,
        metavar="NAME",
        help=f"one or more of {', '.join(WAYS)}; default: all that can run here but {MAX_AUTOTUNE}",
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each way")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="needs fastdit[plots]")
    args = parser.parse_args(argv)
    for name in ("batch", "steps", "rounds"):
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    obstacles = {way: obstacle(way, args.device) for way in WAYS}
    for way in args.way or ():
        if obstacles[way]:
            parser.error(f"--way: {way!r} {obstacles[way]}")
    default = [way for way in WAYS if not obstacles[way] and way != MAX_AUTOTUNE]
    args.way = list(dict.fromkeys(args.way or default))
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: needs matplotlib; pip install 'fastdit[plots]'")
    return args


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    facts = machine(device)
    print_machine(facts)
    results = Results(args.json, facts, vars(args), rows=[], floors=[])
    with fresh_compile_cache():
        if set(args.way) & set(COMPILED):  # the compiler's own start is no way's compile time
            torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
        for preset in args.preset:
            for dtype in args.dtype:
                torch._dynamo.reset()
                run(make_case(preset, dtype, args, device), args, results)
    if args.plot:
        plot(args.plot, facts, results["rows"])
    sys.exit(any(row.get(FIGURE) == "failed" for row in results["rows"]))


if __name__ == "__main__":
    main()
