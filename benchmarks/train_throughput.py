"""Training on the coloured shapes: the plain eager loop beside fastdit's, in one process.

    python benchmarks/train_throughput.py                 # images per second
    python benchmarks/train_throughput.py --seeds 0 1 2   # then train fully, and judge

Images per second: the loops take an epoch each in turn, round by round; figures are medians, the
ratio is the median of the rounds' ratios. With --seeds each loop then trains from the same initial
weights on the same images, once a seed; the order of the images and the noise are each loop's
own. The judge looks at 160 samples of each trained model, ten a class.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Iterator
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
from fastdit import reference
from fastdit.data import LABEL_NAMES, coloured_shapes, judge
from fastdit.diffusion import TerminalSNRWarning
from fastdit.train import PUBLISHED_LOSS, Recipe, Trainer

CPU = torch.device("cpu")
SAMPLES_PER_CLASS = 10
BASELINE, EAGER, COMPILED = "plain eager", "fastdit eager", "fastdit compiled"
RATE_COLUMNS = {
    "way": "",
    "images/s": ".0f",
    "min": ".0f",
    "max": ".0f",
    "ratio": ".2f",
    "first step s": ".1f",
}
QUALITY_COLUMNS = {"way": "", "seed": "d", "final loss": ".4f", "colour": ".3f", "shape": ".3f"}


class PlainLoop:
    """Textbook PyTorch: a DataLoader, AdamW, clipping, a cosine rate by step."""

    def __init__(self, recipe: Recipe, initial: dict[str, Tensor]) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.model = reference.DiT()
        self.model.load_state_dict(initial)
        self.scheduler = fastdit.DiffusionScheduler(recipe.T, schedule=recipe.schedule)
        data = TensorDataset(*coloured_shapes(recipe.per_class, recipe.seed))
        self.loader = DataLoader(data, recipe.batch_size, shuffle=True)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        self.total_steps = recipe.epochs * len(self.loader)
        self.rate = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.total_steps)
        self.losses: list[float] = []
        self._batches = self._endless()

    def _endless(self) -> Iterator[list[Tensor]]:
        while True:
            yield from self.loader

    def train_step(self) -> None:
        x0, y = next(self._batches)
        t = torch.randint(self.recipe.T, (len(x0),))
        eps = torch.randn_like(x0)
        loss = F.mse_loss(self.model(self.scheduler.q_sample(x0, t, eps), t, y), eps)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.rate.step()
        self.losses.append(loss.item())


def make_loop(way: str, recipe: Recipe) -> PlainLoop | Trainer:
    trainer = Trainer(fastdit.DiTConfig(), recipe, compile=way == COMPILED)
    return PlainLoop(recipe, trainer.model.state_dict()) if way == BASELINE else trainer


def measure_rates(ways: list[str], recipe: Recipe, rounds: int) -> list[dict[str, Any]]:
    loops = {way: make_loop(way, recipe) for way in ways}
    first = {way: seconds(loop.train_step, CPU) for way, loop in loops.items()}
    steps = -(-16 * recipe.per_class // recipe.batch_size)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    with tqdm(total=rounds * len(ways), leave=False) as bar:
        for _ in range(rounds):
            for way, loop in loops.items():
                bar.set_description(way)
                start = time.perf_counter()
                for _ in range(steps):
                    loop.train_step()
                rates[way].append(16 * recipe.per_class / (time.perf_counter() - start))
                bar.update()
    return [
        {
            "way": way,
            "images/s": statistics.median(own),
            "min": min(own),
            "max": max(own),
            "ratio": median_ratio(own, rates[BASELINE]),
            "first step s": first[way],
            "rates": own,
        }
        for way, own in rates.items()
    ]


def learn(way: str, recipe: Recipe) -> dict[str, Any]:
    """Train fully, then sample and judge."""
    loop = make_loop(way, recipe)
    for _ in tqdm(range(loop.total_steps), desc=f"{way}, seed {recipe.seed}", leave=False):
        loop.train_step()
    epoch_losses = torch.as_tensor(loop.losses).view(recipe.epochs, -1).mean(1).tolist()
    labels = torch.arange(len(LABEL_NAMES)).repeat_interleave(SAMPLES_PER_CLASS)
    accuracy = judge(fastdit.Sampler(loop.model, loop.scheduler)(labels), labels)
    return {
        "way": way,
        "seed": recipe.seed,
        "final loss": epoch_losses[-1],
        "epoch losses": epoch_losses,
        "colour": accuracy.colour,
        "shape": accuracy.shape,
    }


def print_summary(rows: list[dict[str, Any]], epochs: int) -> None:
    by_way: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_way.setdefault(row["way"], []).append(row)
    final = {way: [row["final loss"] for row in own] for way, own in by_way.items()}
    spread = max(final[BASELINE]) - min(final[BASELINE])
    print(f"\n{BASELINE}: mean final loss {statistics.mean(final[BASELINE]):.4f}, ", end="")
    print(f"spread over the seeds {spread:.4f}")
    difference = statistics.mean(final[EAGER]) - statistics.mean(final[BASELINE])
    print(f"{EAGER}: mean final loss {difference:+.4f} from that")
    lines = [
        {"epoch": epoch, "published": PUBLISHED_LOSS[epoch]}
        | {
            way: statistics.mean(row["epoch losses"][epoch - 1] for row in own)
            for way, own in by_way.items()
        }
        for epoch in PUBLISHED_LOSS
        if epoch <= epochs
    ]
    print("\nloss by epoch, mean over the seeds (the published run drew another set)")
    print(table({"epoch": "d", "published": ".4f"} | dict.fromkeys(by_way, ".4f"), lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed epochs of each loop")
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="train fully, once a seed")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help="of a full training")
    parser.add_argument("--per-class", type=int, default=Recipe.per_class)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args()
    for name in ("rounds", "epochs", "per_class"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    warnings.simplefilter("ignore", TerminalSNRWarning)  # the recipe is the seed's, on purpose
    facts = machine(CPU)
    print_machine(facts)
    ways = [BASELINE, EAGER] + [COMPILED] * (not args.no_compile)
    print(f"images/s, epochs of {16 * args.per_class} images; ratio is to {BASELINE}")
    with fresh_compile_cache():
        rates = measure_rates(ways, Recipe(epochs=1000, per_class=args.per_class), args.rounds)
    print(table(RATE_COLUMNS, rates))
    learned: list[dict[str, Any]] = []
    if args.seeds:
        recipes = [
            Recipe(epochs=args.epochs, seed=seed, per_class=args.per_class) for seed in args.seeds
        ]
        learned = [learn(way, recipe) for recipe in recipes for way in (BASELINE, EAGER)]
        print(f"\n{args.epochs} epochs, seeds {args.seeds}; accuracies on 160 samples")
        print(table(QUALITY_COLUMNS, learned))
        print_summary(learned, args.epochs)
    if args.json:
        write_json(args.json, facts, vars(args), rates=rates, learned=learned)


if __name__ == "__main__":
    main()
