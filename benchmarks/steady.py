"""What a sampler keeps of its speed while other work has one of the CPUs.

    python benchmarks/steady.py

The model is sampled on one thread and on all of PyTorch's, with nothing beside it; then on all
threads beside a process that keeps the last CPU busy; and, where the extra `rivals` is installed,
beside the thread pool of ONNX Runtime in the same process, whose threads spin for a while after the
run that precedes every call. Each figure is from calls over about a second; all ways take turns.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import _harness as harness
import _rivals as rivals
import torch
from _harness import FIGURE, Results, Row, positive
from tqdm import tqdm

import fastdit
from fastdit import DiffusionScheduler, Sampler, reference, testing

CASES = {"toy": (1, 200), "DiT-S/4": (4, 10)}  # batch and steps
COLUMNS = harness.columns(
    f"model; batch, threads: d; beside; {FIGURE}, min, max: .1f; of one thread, of all threads: .2f"
)
ONE, ALL = "one", "all"
NOTHING, PROCESS, POOL = "nothing", "a busy process", "a spinning pool"
TURN_S = 1.0


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """Keep the last CPU of this process busy with another process."""
    last = max(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, {{{last}}})\nwhile True: pass"
    other = subprocess.Popen([sys.executable, "-c", code])
    try:
        time.sleep(0.2)
        yield
    finally:
        other.kill()
        other.wait()


def pool_run() -> Callable[[], Any]:
    """Return a call of ONNX Runtime that uses as many threads as PyTorch."""
    model = reference.DiT.from_config(fastdit.PRESETS["DiT-S/4"]).eval()
    inputs = torch.randn(1, *model.cfg.sample_shape), torch.tensor([5]), torch.tensor([1])
    network = rivals.onnxruntime_network(model, inputs, torch.get_num_threads())
    return lambda: network(*(value.numpy() for value in inputs))


def rate(sampler: Sampler, labels: list[int], before: Callable[[], Any] | None = None) -> float:
    """Return images per second; what `before` takes is not counted."""
    spent, calls = 0.0, 0
    while spent < TURN_S:
        if before is not None:
            before()
        start = time.perf_counter()
        sampler(labels)
        spent, calls = spent + time.perf_counter() - start, calls + 1
    return calls * len(labels) / spent


def turn(
    sampler: Sampler, labels: list[int], threads: str, beside: str, run: Callable[[], Any] | None
) -> float:
    every = torch.get_num_threads()
    torch.set_num_threads(1 if threads == ONE else every)
    try:
        with busy_process() if beside == PROCESS else contextlib.nullcontext():
            sampler(labels)
            return rate(sampler, labels, run if beside == POOL else None)
    finally:
        torch.set_num_threads(every)


def measure(preset: str, rounds: int, run: Callable[[], Any] | None, bar: tqdm) -> list[Row]:
    batch, steps = CASES[preset]
    model = fastdit.DiT.from_preset(preset)
    testing.randomize(model)
    sampler = Sampler(model, DiffusionScheduler(steps, schedule="cosine"))
    labels = [i % model.cfg.num_classes for i in range(batch)]
    ways = [(ONE, NOTHING), (ALL, NOTHING), (ALL, PROCESS), *([(ALL, POOL)] if run else [])]
    rates: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            rates[way].append(turn(sampler, labels, *way, run))
            bar.update()
    rows = []
    for (threads, beside), own in rates.items():
        row: Row = {"model": preset, "batch": batch, "beside": beside, "rates": own}
        row["threads"] = 1 if threads == ONE else torch.get_num_threads()
        row |= {FIGURE: statistics.median(own), "min": min(own), "max": max(own)}
        for name, base in (("of one thread", ONE), ("of all threads", ALL)):
            row[name] = harness.median_ratio(own, rates[base, NOTHING])
        rows.append(row)
    return rows


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=positive, default=5)
    args = parser.parse_args()
    cpu = torch.device("cpu")
    packages = [] if rivals.obstacle("onnxruntime", cpu) else rivals.PACKAGES["onnxruntime"]
    results = Results.of(args, cpu, packages)
    run = pool_run() if packages else None
    with tqdm(total=len(args.model) * args.rounds * (4 if run else 3), leave=False) as bar:
        for preset in args.model:
            for row in measure(preset, args.rounds, run, bar):
                results.add(row)
    print(harness.table(COLUMNS, results["rows"]))


if __name__ == "__main__":
    main()
