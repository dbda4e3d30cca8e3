"""Training side by side in one process: the plain loop, the same compiled, and fastdit's.

    python benchmarks/train_throughput.py                 # images per second, MFU, memory, loss
    python benchmarks/train_throughput.py --seeds 0 1 2   # then train the toy fully, and judge
    python benchmarks/train_throughput.py --preset DiT-XL/2 --batch 64 --precision bfloat16 \\
        --way "plain compiled" "fastdit compiled"

The loops take some steps each in turn, round by round, and all stay in memory; figures are medians,
the ratio is the median of the rounds' ratios. All begin at the same weights; the order of the
images and the noise are each loop's own. MFU is of the rate of a large matrix product, measured in
the same process. Memory is the allocator's peak on CUDA; on a CPU it is counted: weights,
gradients, optimizer state, and what a forward keeps for its backward. With --seeds the judge looks
at 160 samples of each trained toy, ten a class.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _harness import (
    fresh_compile_cache,
    machine,
    median_ratio,
    print_machine,
    seconds,
    table,
    write_json,
)
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import fastdit
from fastdit import DiTConfig, reference, work
from fastdit.cli_train import PUBLISHED_LOSS
from fastdit.data import LABEL_NAMES, judge
from fastdit.diffusion import TerminalSNRWarning
from fastdit.losses import diffusion_loss
from fastdit.recipe import RECIPES, Recipe
from fastdit.runtime import PRECISIONS, Runtime
from fastdit.sources import Samples, Shapes, Source
from fastdit.train import Trainer

SAMPLES_PER_CLASS = 10
LATENTS = 512  # drawn for a published model; none is looked at
BASELINE, PLAIN_COMPILED = "plain eager", "plain compiled"
EAGER, BLOCK, COMPILED = "fastdit eager", "fastdit by block", "fastdit compiled"
COMPILE = {EAGER: "none", BLOCK: "block", COMPILED: "whole"}
WAYS = (BASELINE, PLAIN_COMPILED, *COMPILE)
RATE_COLUMNS = {
    "way": "",
    "images/s": ".0f",
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


class RandomLatents:
    """Stands for ImageNet's latents: the shape of a preset's, and noise."""

    identity = {"kind": "random"}

    def __init__(self, config: DiTConfig) -> None:
        self.sample_shape = config.sample_shape
        self.label_names = tuple(map(str, range(config.num_classes)))
        own = torch.Generator().manual_seed(0)
        self.means = torch.randn(LATENTS, *config.sample_shape, generator=own)
        self.stds = torch.full_like(self.means, 0.1)
        self.labels = torch.randint(config.num_classes, (LATENTS,), generator=own)

    def __len__(self) -> int:
        return LATENTS

    def take(self, rows: Tensor) -> Samples:
        return Samples(self.means[rows], self.stds[rows], self.labels[rows])


@dataclass(frozen=True)
class Task:
    """What all loops train."""

    config: DiTConfig
    recipe: Recipe
    source: Source
    device: torch.device
    precision: str = "float32"
    checkpointing: bool = False


class PlainLoop:
    """Textbook PyTorch: a DataLoader, AdamW, clipping, a cosine rate by step."""

    def __init__(self, task: Task, initial: dict[str, Tensor], compiled: bool) -> None:
        recipe, device = task.recipe, task.device
        torch.manual_seed(recipe.seed)
        self.task, self.recipe = task, recipe
        self.model = reference.DiT.from_config(task.config).to(device)
        self.model.load_state_dict(initial)
        self._predict = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.scheduler = fastdit.DiffusionScheduler(recipe.T, device, schedule=recipe.schedule)
        mean, std, labels = task.source.take(torch.arange(len(task.source)))
        data = TensorDataset(mean, torch.zeros(len(mean)) if std is None else std, labels)
        self._drawn = std is not None
        self.loader = DataLoader(data, recipe.batch_size, shuffle=True, drop_last=True)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        self.rate = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, recipe.steps)
        self.losses: list[float] = []
        self._batches = self._endless()

    def _endless(self) -> Iterator[list[Tensor]]:
        while True:
            yield from self.loader

    def train_step(self) -> None:
        mean, std, y = (part.to(self.task.device) for part in next(self._batches))
        x0 = mean + std * torch.randn_like(mean) if self._drawn else mean
        t = torch.randint(self.recipe.T, (len(x0),), device=x0.device)
        eps = torch.randn_like(x0)
        x_t = self.scheduler.q_sample(x0, t, eps)
        dtype = PRECISIONS[self.task.precision]
        with torch.autocast(x0.device.type, dtype, enabled=dtype is not None):
            out = self._predict(x_t, t, y)
        if self.task.config.learn_sigma:
            loss = diffusion_loss(out.float(), x0, x_t, t, eps, self.scheduler)
        else:
            loss = F.mse_loss(out.float(), eps)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip or torch.inf)
        self.optimizer.step()
        self.rate.step()
        self.losses.append(loss.item())


class FusedLoop(Trainer):
    """fastdit's own trainer, asked for its losses."""

    def __init__(self, task: Task, compile: str) -> None:
        runtime = Runtime(task.device, task.precision, compile, task.checkpointing)  # type: ignore[arg-type]
        super().__init__(task.config, task.recipe, task.source, runtime=runtime)

    @property
    def losses(self) -> list[float]:
        return self.history[0, : self.step].tolist()


Loop = PlainLoop | FusedLoop


def make_loop(way: str, task: Task) -> Loop:
    if way in COMPILE:
        return FusedLoop(task, COMPILE[way])
    initial = FusedLoop(task, "none").model.state_dict()
    return PlainLoop(task, initial, way == PLAIN_COMPILED)


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


def measure_rates(
    ways: list[str], task: Task, rounds: int, steps: int
) -> tuple[float, list[dict[str, Any]]]:
    """The device's rate in a large product, and a row for each way."""
    device, batch = task.device, task.recipe.batch_size
    loops = {way: make_loop(way, task) for way in ways}
    first = {way: seconds(loop.train_step, device) for way, loop in loops.items()}
    takes = {way: memory(loop, device) for way, loop in loops.items()}
    peak = work.product_rate(device, PRECISIONS[task.precision] or torch.float32)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    with tqdm(total=rounds * len(ways), leave=False) as bar:
        for _ in range(rounds):
            for way, loop in loops.items():
                bar.set_description(way)

                def some(loop: Loop = loop) -> None:
                    for _ in range(steps):
                        loop.train_step()

                rates[way].append(steps * batch / seconds(some, device))
                bar.update()
    flop = work.training_flop(task.config, 1)
    compiled = rates.get(PLAIN_COMPILED)
    return peak, [
        {
            "way": way,
            "images/s": statistics.median(own),
            "min": min(own),
            "max": max(own),
            "ratio": median_ratio(own, rates[BASELINE]),
            "to compiled": median_ratio(own, compiled) if compiled else None,
            "MFU": statistics.median(own) * flop / peak,
            "memory MiB": takes[way],
            "loss": statistics.mean(loops[way].losses[-steps:]),
            "first step s": first[way],
            "rates": own,
        }
        for way, own in rates.items()
    ]


def learn(way: str, task: Task) -> dict[str, Any]:
    """Train fully, then sample and judge."""
    start, recipe = time.perf_counter(), task.recipe
    loop = make_loop(way, task)
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
    parser.add_argument("--batch", type=int, help="images a step  [the recipe's]")
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--checkpointing", action="store_true", help="in fastdit's loops")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each loop")
    parser.add_argument("--steps", type=int, default=25, help="of a turn")
    parser.add_argument("--way", nargs="+", choices=WAYS, help="beside the plain eager loop")
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="train the toy fully")
    parser.add_argument("--full-steps", type=int, default=Recipe.steps, help="of a full training")
    parser.add_argument("--per-class", type=int, default=200, help="coloured shapes of each class")
    parser.add_argument("--device", type=torch.device, help="[the GPU, if there is one]")
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args(argv)
    for name in ("rounds", "steps", "full_steps", "per_class"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
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
    recipe = replace(recipe, batch_size=args.batch or recipe.batch_size)
    source: Source = Shapes(args.per_class) if toy else RandomLatents(config)
    if recipe.batch_size > len(source):
        raise SystemExit(f"--batch: expected at most {len(source)}, got {recipe.batch_size}")
    task = Task(config, recipe, source, args.device, args.precision, args.checkpointing)
    ways = [BASELINE, *(way for way in args.way or WAYS if way != BASELINE)]
    print(f"batches of {recipe.batch_size}, {args.precision}; turns of {args.steps} steps")
    with fresh_compile_cache():
        peak, rows = measure_rates(ways, task, args.rounds, args.steps)
    print(f"a large {args.precision} product: {peak / 1e9:.0f} GFLOP/s")
    print(table(RATE_COLUMNS, rows))
    learned: list[dict[str, Any]] = []
    for seed in args.seeds:
        for way in (BASELINE, COMPILED if COMPILED in ways else EAGER):
            full = replace(RECIPES["seed"], steps=args.full_steps, seed=seed)
            own = replace(task, recipe=full, source=Shapes(args.per_class, seed))
            learned.append(learn(way, own))
    if learned:
        print(f"\n{args.full_steps} steps, seeds {args.seeds}; accuracies over 160 samples")
        print(table(QUALITY_COLUMNS, learned))
        print_summary(learned)
    if args.json:
        results = {"product FLOP/s": peak, "rows": rows, "learned": learned}
        write_json(args.json, facts, vars(args), **results)


if __name__ == "__main__":
    main()
