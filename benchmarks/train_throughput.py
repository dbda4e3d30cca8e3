"""Training side by side in one process: the plain loop, the same compiled, and fastdit's.

    python benchmarks/train_throughput.py                 # images per second, MFU, memory, loss
    python benchmarks/train_throughput.py --seeds 0 1 2   # then train the toy fully, and judge
    python benchmarks/train_throughput.py --preset DiT-XL/2 --batch 64 --precision bfloat16 \\
        --way "plain compiled" "fastdit compiled"
    python benchmarks/train_throughput.py --options modern   # RMSNorm, SwiGLU, RoPE, qk-norm

The loops take turns of some steps each, round by round, and all stay in memory. Speeds are medians
over the rounds. Ratios are to the plain loop, eager and compiled, where these are among the loops;
they are medians of the ratios by round. All loops begin with the same weights; each has its own
order of images and its own noise. Batch sizes are timed one after the other. A loop that fails or
runs out of memory leaves a row that says so and is left out of later batch sizes. The file of
--json is rewritten after every turn. MFU is relative to the rate of a large matrix product in the
same process. Memory on CUDA is the allocator's peak; on a CPU it is counted: weights, gradients,
optimizer state, and what a forward keeps for its backward. With --seeds the judge looks at 160
samples of each trained toy, ten of each class.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import _harness as harness
import _loops as loops
import torch
from _harness import FIGURE, Results, Row, positive, seconds, table
from _loops import BASELINE, Loop, Task, Weights
from torch import Tensor
from tqdm import tqdm

import fastdit
from fastdit import flops
from fastdit.cli.losses import PUBLISHED_LOSS
from fastdit.data.shapes import LABEL_NAMES, judge
from fastdit.diffusion import TerminalSNRWarning
from fastdit.train.recipe import RECIPES, Recipe
from fastdit.train.runtime import PRECISIONS
from fastdit.train.sources import Shapes, Source

SAMPLES_PER_CLASS = 10
# The options of a block that are put in place of the preset's.
OPTIONS: dict[str, dict[str, Any]] = {
    "preset": {},
    "modern": {"norm": "rms", "mlp": "swiglu", "rope": True, "qk_norm": "rms"},
}
RATE_COLUMNS = harness.columns(
    f"way; {FIGURE}, min, max: .0f; ratio, to compiled: .2f; MFU: .3f; memory MiB: .1f; "
    "loss: .3f; first step s: .1f"
)
QUALITY_COLUMNS = harness.columns("way; seed: d; final loss: .4f; colour, shape: .3f")


class Turns(NamedTuple):
    rounds: int
    steps: int  # in each turn


def memory(loop: Loop, device: torch.device) -> float:
    """Return the MiB that a step needs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        own = _state_bytes(loop)
        loop.train_step()
        return (torch.cuda.max_memory_allocated(device) - before + own) / 2**20
    kept: dict[int, int] = {}  # by address, since several nodes may keep the same tensor

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
    """Return the bytes of weights, gradients and optimizer state."""
    state = [t for entry in loop.optimizer.state.values() for t in entry.values()]
    parameters = list(loop.model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    return sum(t.nbytes for t in (*parameters, *gradients, *state))


class Training(harness.SideBySide):
    """All loops, with one batch size."""

    BASES = {"ratio": BASELINE, "to compiled": loops.PLAIN_COMPILED}

    def __init__(
        self, ways: list[str], task: Task, initial: Weights, steps: int, results: Results
    ) -> None:
        batch = task.recipe.batch_size
        rows = {way: {"way": way, "batch": batch} for way in ways}
        super().__init__(rows, steps * batch, results)
        self.task, self.initial, self.steps = task, initial, steps

    def begin(self, name: str) -> Loop:
        loop = loops.make_loop(name, self.task, self.initial)
        self.rows[name]["first step s"] = seconds(loop.train_step, self.task.device)
        self.rows[name]["memory MiB"] = memory(loop, self.task.device)
        return loop

    def turn(self, name: str, way: Loop) -> float:
        steps = range(self.steps)
        taken = seconds(lambda: [way.train_step() for _ in steps], self.task.device)
        self.rows[name]["loss"] = statistics.mean(way.losses[-self.steps :])
        return taken

    def detail(self, name: str, times: list[float]) -> None:
        peak, flop = self.results["product FLOP/s"], flops.training_flop(self.task.config, 1)
        row = self.rows[name]
        row |= {"rates": [self.images / t for t in times], "MFU": row[FIGURE] * flop / peak}


def measure_rates(
    ways: list[str], task: Task, batches: list[int], turns: Turns, results: Results
) -> None:
    """Add the rows of all batch sizes, and the device's rate in a large matrix product."""
    dtype = PRECISIONS[task.precision] or torch.float32
    peak = results["product FLOP/s"] = flops.product_rate(task.device, dtype)
    print(f"a large {task.precision} product: {peak / 1e9:.0f} GFLOP/s")
    initial = loops.initial_weights(task)
    for batch in batches:
        first = len(results["rows"])
        own = replace(task, recipe=replace(task.recipe, batch_size=batch))
        with tqdm(total=len(ways) * (1 + turns.rounds), leave=False) as bar:
            ways = Training(ways, own, initial, turns.steps, results).run(turns.rounds, bar)
        print(f"\nbatches of {batch}, {task.precision}; turns of {turns.steps} steps")
        print(table(RATE_COLUMNS, results["rows"][first:]), flush=True)
        gc.collect()  # a loop is a reference cycle, and the next batch size needs its memory
        if task.device.type == "cuda":
            torch.cuda.empty_cache()


def learn(way: str, task: Task) -> Row:
    """Train fully, then sample and judge."""
    start, recipe = time.perf_counter(), task.recipe
    loop = loops.make_loop(way, task, loops.initial_weights(task))
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


def print_summary(rows: list[Row]) -> None:
    """Print each way's final loss and its loss by pass, as means over the seeds."""
    by_way: dict[str, list[Row]] = {}
    for row in rows:
        by_way.setdefault(row["way"], []).append(row)
    final = {way: [row["final loss"] for row in own] for way, own in by_way.items()}
    mean = statistics.mean(final[BASELINE])
    spread = max(final[BASELINE]) - min(final[BASELINE])
    print(f"\n{BASELINE}: mean final loss {mean:.4f}, spread over the seeds {spread:.4f}")
    for way in by_way.keys() - {BASELINE}:
        print(f"{way}: mean final loss {statistics.mean(final[way]) - mean:+.4f} from that")
    lines: list[Row] = []
    for number, published in PUBLISHED_LOSS.items():
        if number <= len(rows[0]["losses by pass"]):
            line: Row = {"pass": number, "published": published}
            for way, own in by_way.items():
                line[way] = statistics.mean(row["losses by pass"][number - 1] for row in own)
            lines.append(line)
    print("\nloss by pass over the set, mean over the seeds (the published run drew another set)")
    print(table({"pass": "d", "published": ".4f"} | dict.fromkeys(by_way, ".4f"), lines))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = harness.parser(__doc__, device=True)
    parser.add_argument("--preset", default="toy", choices=fastdit.PRESETS)
    parser.add_argument("--options", default="preset", choices=OPTIONS, help="of the blocks")
    parser.add_argument("--batch", nargs="+", type=positive, help="default: the recipe's")
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--checkpointing", action="store_true", help="in fastdit's loops")
    parser.add_argument("--rounds", type=positive, default=7, help="timed turns of each loop")
    parser.add_argument("--steps", type=positive, default=25, help="steps in a turn")
    parser.add_argument("--way", nargs="+", choices=loops.WAYS, help="default: all")
    own = parser.add_argument_group("the toy")
    own.add_argument("--seeds", type=int, nargs="*", default=[], help="also train fully")
    own.add_argument("--full-steps", type=positive, default=Recipe.steps, help="of a full training")
    own.add_argument("--per-class", type=positive, default=200, help="training images of a class")
    args = parser.parse_args(argv)
    if args.seeds and (args.preset != "toy" or args.options != "preset"):
        parser.error("--seeds: only the toy is trained fully")
    return args


def main() -> None:
    args = parse()
    warnings.simplefilter("ignore", TerminalSNRWarning)  # the seed recipe has it on purpose
    toy = args.preset == "toy"
    config = replace(fastdit.PRESETS[args.preset], **OPTIONS[args.options])
    recipe = replace(RECIPES["seed" if toy else "dit"], steps=100_000, label_dropout=0.0, ema=None)
    batches = args.batch or [recipe.batch_size]
    source: Source = Shapes(args.per_class) if toy else loops.RandomLatents(config)
    if max(batches) > len(source):
        raise SystemExit(f"--batch: expected at most {len(source)}, got {max(batches)}")
    task = Task(config, recipe, source, args.device, args.precision, args.checkpointing)
    ways = list(dict.fromkeys(args.way or loops.WAYS))
    results = Results.of(args, args.device, learned=[])
    with harness.fresh_compile_cache():
        measure_rates(ways, task, batches, Turns(args.rounds, args.steps), results)
    for seed in args.seeds:
        for way in (BASELINE, loops.COMPILED if loops.COMPILED in ways else loops.EAGER):
            full = replace(RECIPES["seed"], steps=args.full_steps, seed=seed)
            own = replace(task, recipe=full, source=Shapes(args.per_class, seed))
            results["learned"].append(learn(way, own))
            results.write()
    if learned := results["learned"]:
        print(f"\n{args.full_steps} steps, seeds {args.seeds}; accuracies over 160 samples")
        print(table(QUALITY_COLUMNS, learned))
        print_summary(learned)
    sys.exit(results.has_failures(FIGURE))


if __name__ == "__main__":
    main()
