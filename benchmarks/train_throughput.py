"""Training side by side in one process: the plain loop, the same compiled, and fastdit's.

    python benchmarks/train_throughput.py                 # images per second, MFU, memory, loss
    python benchmarks/train_throughput.py --seeds 0 1 2   # then train the toy fully, and judge
    python benchmarks/train_throughput.py --preset DiT-XL/2 --batch 64 --precision bfloat16 \\
        --way "plain compiled" "fastdit compiled"

The loops take some steps each in turn, round by round, and all stay in memory; figures are medians,
ratios, to the plain loop, eager and compiled, where these are among the loops, medians of the
rounds' ratios. All begin at the same weights; the order of the images and the noise are each loop's
own. Batches are timed one after the other. A loop that fails or runs out of memory is a row that
says so, and takes no part in later batches. The file of --json is written anew after every turn.
MFU is of the rate of a large matrix product, measured in
the same process. Memory is the allocator's peak on CUDA; on a CPU it is counted: weights,
gradients, optimizer state, and what a forward keeps for its backward. With --seeds the judge looks
at 160 samples of each trained toy, ten a class.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _harness import (
    Results,
    attempt,
    fresh_compile_cache,
    machine,
    median_ratio,
    print_machine,
    seconds,
    table,
)
from _loops import (
    BASELINE,
    COMPILED,
    EAGER,
    PLAIN_COMPILED,
    WAYS,
    Loop,
    RandomLatents,
    Task,
    Weights,
    initial_weights,
    make_loop,
)
from torch import Tensor
from tqdm import tqdm

import fastdit
from fastdit import flops
from fastdit.cli.train import PUBLISHED_LOSS
from fastdit.data.shapes import LABEL_NAMES, judge
from fastdit.diffusion import TerminalSNRWarning
from fastdit.train.recipe import RECIPES, Recipe
from fastdit.train.runtime import PRECISIONS
from fastdit.train.sources import Shapes, Source

SAMPLES_PER_CLASS = 10
FIGURE = "images/s"
RATE_COLUMNS = {
    "way": "",
    FIGURE: ".0f",
    "min": ".0f",
    "max": ".0f",
    "ratio": ".2f",
    "to compiled": ".2f",
    "MFU": ".3f",
    "memory MiB": ".1f",
    "loss": ".3f",
    "first step s": ".1f",
}
QUALITY_COLUMNS = {"way": "", "seed": "d", "final loss": ".4f", "colour": ".3f", "shape": ".3f"}


Row = dict[str, Any]


class Turns(NamedTuple):
    rounds: int
    steps: int  # of each


def memory(loop: Loop, device: torch.device) -> float:
    """MiB that a step takes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        own = _state_bytes(loop)
        loop.train_step()
        return (torch.cuda.max_memory_allocated(device) - before + own) / 2**20
    kept: dict[int, int] = {}  # by address: several nodes may keep one tensor

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loop.train_step()
    weights = {p.untyped_storage().data_ptr() for p in loop.model.parameters()}
    activations = sum(n for address, n in kept.items() if address not in weights)
    return (activations + _state_bytes(loop)) / 2**20


def _state_bytes(loop: Loop) -> int:
    """Weights, their gradients, the optimizer's state."""
    state = [t for entry in loop.optimizer.state.values() for t in entry.values()]
    parameters = list(loop.model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    return sum(t.nbytes for t in (*parameters, *gradients, *state))


def measure_batch(
    ways: list[str], task: Task, initial: Weights, turns: Turns, peak: float, results: Results
) -> list[str]:
    """Add a row a way to the results; the ways that are left."""
    batch = task.recipe.batch_size
    rows: dict[str, Row] = {way: {"way": way, "batch": batch} for way in ways}
    loops: dict[str, Loop] = {}
    for way, row in rows.items():

        def begin(way: str = way, row: Row = row) -> Loop:
            loop = make_loop(way, task, initial)
            row["first step s"] = seconds(loop.train_step, task.device)
            row["memory MiB"] = memory(loop, task.device)
            return loop

        results["rows"].append(row)
        if (loop := attempt(row, FIGURE, begin)) is not None:
            loops[way] = loop
        results.write()
    rates: dict[str, list[float]] = {way: [] for way in loops}
    with tqdm(total=turns.rounds * len(loops), leave=False) as bar:
        for _ in range(turns.rounds):
            for way, loop in list(loops.items()):
                bar.set_description(way)

                def some(loop: Loop = loop) -> float:
                    steps = range(turns.steps)
                    return seconds(lambda: [loop.train_step() for _ in steps], task.device)

                if (taken := attempt(rows[way], FIGURE, some)) is None:
                    del loops[way], rates[way]
                else:
                    rates[way].append(turns.steps * batch / taken)
                    rows[way]["loss"] = statistics.mean(loop.losses[-turns.steps :])
                _fill(rows, rates, flops.training_flop(task.config, 1) / peak)
                results.write()
                bar.update()
    return list(loops)


def _fill(rows: dict[str, Row], rates: dict[str, list[float]], of_peak: float) -> None:
    """The figures of the turns so far; `of_peak` is the share of the peak of an image a second."""
    for way, own in rates.items():
        if not own:
            continue
        row, median = rows[way], statistics.median(own)
        row |= {FIGURE: median, "min": min(own), "max": max(own), "rates": own}
        row["MFU"] = median * of_peak
        for ratio, base in (("ratio", BASELINE), ("to compiled", PLAIN_COMPILED)):
            if whole := min(len(own), len(rates.get(base, ()))):
                row[ratio] = median_ratio(own[:whole], rates[base][:whole])


def measure_rates(
    ways: list[str], task: Task, batches: list[int], turns: Turns, results: Results
) -> None:
    """Rows of every batch, and the device's rate in a large product."""
    dtype = PRECISIONS[task.precision] or torch.float32
    peak = results["product FLOP/s"] = flops.product_rate(task.device, dtype)
    print(f"a large {task.precision} product: {peak / 1e9:.0f} GFLOP/s")
    initial = initial_weights(task)
    for batch in batches:
        own, first = replace(task.recipe, batch_size=batch), len(results["rows"])
        ways = measure_batch(ways, replace(task, recipe=own), initial, turns, peak, results)
        print(f"\nbatches of {batch}, {task.precision}; turns of {turns.steps} steps")
        print(table(RATE_COLUMNS, results["rows"][first:]), flush=True)
        gc.collect()  # a loop is a cycle, and its memory is the next batch's
        if task.device.type == "cuda":
            torch.cuda.empty_cache()


def learn(way: str, task: Task) -> dict[str, Any]:
    """Train fully, then sample and judge."""
    start, recipe = time.perf_counter(), task.recipe
    loop = make_loop(way, task, initial_weights(task))
    for _ in tqdm(range(recipe.steps), desc=f"{way}, seed {recipe.seed}", leave=False):
        loop.train_step()
    a_pass = len(task.source) // recipe.batch_size
    whole = torch.as_tensor(loop.losses)[: recipe.steps // a_pass * a_pass]
    labels = torch.arange(len(LABEL_NAMES)).repeat_interleave(SAMPLES_PER_CLASS)
    accuracy = judge(fastdit.Sampler(loop.model, loop.scheduler)(labels), labels)
    return {
        "way": way,
        "seed": recipe.seed,
        "final loss": whole[-a_pass:].mean().item(),
        "losses by pass": whole.view(-1, a_pass).mean(1).tolist(),
        "colour": accuracy.colour,
        "shape": accuracy.shape,
        "seconds": time.perf_counter() - start,
    }


def print_summary(rows: list[dict[str, Any]]) -> None:
    by_way: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_way.setdefault(row["way"], []).append(row)
    final = {way: [row["final loss"] for row in own] for way, own in by_way.items()}
    spread = max(final[BASELINE]) - min(final[BASELINE])
    print(f"\n{BASELINE}: mean final loss {statistics.mean(final[BASELINE]):.4f}, ", end="")
    print(f"spread over the seeds {spread:.4f}")
    for way in by_way.keys() - {BASELINE}:
        difference = statistics.mean(final[way]) - statistics.mean(final[BASELINE])
        print(f"{way}: mean final loss {difference:+.4f} from that")
    passes = len(rows[0]["losses by pass"])
    lines = [
        {"pass": number, "published": PUBLISHED_LOSS[number]}
        | {
            way: statistics.mean(row["losses by pass"][number - 1] for row in own)
            for way, own in by_way.items()
        }
        for number in PUBLISHED_LOSS
        if number <= passes
    ]
    print("\nloss by pass over the set, mean over the seeds (the published run drew another set)")
    print(table({"pass": "d", "published": ".4f"} | dict.fromkeys(by_way, ".4f"), lines))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="toy", choices=fastdit.PRESETS)
    parser.add_argument("--batch", nargs="+", type=int, help="images a step  [the recipe's]")
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--checkpointing", action="store_true", help="in fastdit's loops")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each loop")
    parser.add_argument("--steps", type=int, default=25, help="of a turn")
    parser.add_argument("--way", nargs="+", choices=WAYS, help="[all]")
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="train the toy fully")
    parser.add_argument("--full-steps", type=int, default=Recipe.steps, help="of a full training")
    parser.add_argument("--per-class", type=int, default=200, help="coloured shapes of each class")
    parser.add_argument("--device", type=torch.device, help="[the GPU, if there is one]")
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args(argv)
    for name in ("rounds", "steps", "full_steps", "per_class"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if min(args.batch or [1]) < 1:
        parser.error(f"--batch: expected at least 1, got {args.batch}")
    if args.seeds and args.preset != "toy":
        parser.error("--seeds: only the toy is trained fully")
    if args.device is None:
        args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return args


def main() -> None:
    args = parse()
    warnings.simplefilter("ignore", TerminalSNRWarning)  # the recipe is the seed's, on purpose
    facts = machine(args.device)
    print_machine(facts)
    toy = args.preset == "toy"
    config = fastdit.PRESETS[args.preset]
    recipe = replace(RECIPES["seed" if toy else "dit"], steps=100_000, label_dropout=0.0, ema=None)
    batches = args.batch or [recipe.batch_size]
    source: Source = Shapes(args.per_class) if toy else RandomLatents(config)
    if max(batches) > len(source):
        raise SystemExit(f"--batch: expected at most {len(source)}, got {max(batches)}")
    task = Task(config, recipe, source, args.device, args.precision, args.checkpointing)
    ways = list(dict.fromkeys(args.way or WAYS))
    results = Results(args.json, facts, vars(args), rows=[], learned=[])
    with fresh_compile_cache():
        measure_rates(ways, task, batches, Turns(args.rounds, args.steps), results)
    for seed in args.seeds:
        for way in (BASELINE, COMPILED if COMPILED in ways else EAGER):
            full = replace(RECIPES["seed"], steps=args.full_steps, seed=seed)
            own = replace(task, recipe=full, source=Shapes(args.per_class, seed))
            results["learned"].append(learn(way, own))
            results.write()
    if learned := results["learned"]:
        print(f"\n{args.full_steps} steps, seeds {args.seeds}; accuracies over 160 samples")
        print(table(QUALITY_COLUMNS, learned))
        print_summary(learned)
    results.write()
    sys.exit(any(row.get(FIGURE) == "failed" for row in results["rows"]))


if __name__ == "__main__":
    main()
