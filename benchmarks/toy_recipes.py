"""What each change from the toy's published recipe to `--recipe sharp` contributes.

    python benchmarks/toy_recipes.py --json results.json

Each row adds one change to the row above it, trains from the same seed on the same 3,200 images,
and lets the judge look at samples of the result. Rows with the same recipe share one training.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import _harness as harness
import torch
from _harness import Results, Row, positive, table

from fastdit import DiTConfig
from fastdit.diffusion import TerminalSNRWarning
from fastdit.model import DiT
from fastdit.train.monitor import Monitor
from fastdit.train.recipe import RECIPES, SHOWINGS, Recipe, Showing
from fastdit.train.runtime import Runtime
from fastdit.train.samples import shapes_sampler
from fastdit.train.sources import Shapes
from fastdit.train.trainer import Trainer

COLUMNS = harness.columns("recipe; steps: ,d; minutes: .1f; loss: .4f; colour, shape: .3f")


class Change(NamedTuple):
    """One row: its name, and how a model is trained and sampled with this change."""

    name: str
    recipe: Recipe
    showing: Showing
    averaged: bool = False  # whether the averaged weights are sampled


def changes(scale: float) -> list[Change]:
    published, final = RECIPES["seed"], RECIPES["sharp"]
    steps = max(2, round(final.steps * scale))
    seed = replace(published, steps=max(1, round(published.steps * scale)))
    longer = replace(seed, steps=steps)
    faster = replace(longer, lr=final.lr, warmup=min(final.warmup, steps - 1))
    sharp = replace(final, steps=steps, warmup=faster.warmup)
    cosine = replace(sharp, label_dropout=0.0)
    plain, guided = SHOWINGS["seed"], SHOWINGS["sharp"]
    clipped = replace(guided, guidance=None)
    return [
        Change("seed", seed, plain),
        Change("+ more steps", longer, plain),
        Change("+ a higher rate, with warm-up", faster, plain),
        Change("+ cosine schedule, clipped samples", cosine, clipped),
        Change("+ averaged weights", cosine, clipped, averaged=True),
        Change("+ dropped labels", sharp, clipped, averaged=True),
        Change("+ guidance: sharp", sharp, guided, averaged=True),
    ]


def measure(
    recipe: Recipe, rows: Iterable[Change], source: Shapes, runtime: Runtime, per_class: int
) -> list[Row]:
    config = replace(DiTConfig(), null_class=recipe.label_dropout > 0)
    trainer = Trainer(config, recipe, source, runtime=runtime)
    start = time.perf_counter()
    losses = trainer.run(Monitor(progress=True)).losses
    minutes = (time.perf_counter() - start) / 60
    a_pass = math.ceil(len(source) / recipe.batch_size)
    facts = {"steps": recipe.steps, "minutes": minutes, "loss": losses[-a_pass:].mean().item()}
    measured = []
    for row in rows:
        model = trainer.sampling_model() if row.averaged else trainer.model
        assert isinstance(model, DiT)
        sample = shapes_sampler(config, trainer.scheduler, row.showing, per_class)
        measured.append({"recipe": row.name, **facts, **sample(model).measured})
    return measured


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of every recipe's steps")
    parser.add_argument("--per-class", type=int, default=40, help="judged samples of each class")
    parser.add_argument("--images", type=positive, default=200, help="for training, of each class")
    parser.add_argument("--compile", default="whole", choices=["none", "block", "whole"])
    args = parser.parse_args()
    if args.scale <= 0 or args.per_class < 4:
        parser.error("expected --scale above 0, --per-class of at least 4")
    warnings.simplefilter("ignore", TerminalSNRWarning)  # the seed recipe has it on purpose
    results = Results.of(args, torch.device("cpu"))
    runtime = Runtime(compile=args.compile)
    for recipe, group in itertools.groupby(changes(args.scale), lambda change: change.recipe):
        rows = measure(recipe, group, Shapes(args.images), runtime, args.per_class)
        results.add(*rows)
        print(table(COLUMNS, rows), flush=True)
    print(f"\n{16 * args.per_class} samples of each; the loss is the mean of the last pass")
    print(table(COLUMNS, results["rows"]))


if __name__ == "__main__":
    main()
