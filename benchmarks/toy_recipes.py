"""What each change from the toy's published recipe to `--recipe sharp` bought.

    python benchmarks/toy_recipes.py --json results.json

Each row adds one change to those above it, trains from the same seed on the same 3,200 images, and
lets the judge look at samples of the result. Raw weights and averaged ones, with guidance and
without, are those of one training where nothing else differs.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _harness import machine, print_machine, table, write_json

from fastdit import DiTConfig
from fastdit.diffusion import TerminalSNRWarning
from fastdit.model import DiT
from fastdit.train.monitor import Monitor
from fastdit.train.recipe import RECIPES, SHOWINGS, Recipe, Showing
from fastdit.train.runtime import Runtime
from fastdit.train.samples import shapes_sampler
from fastdit.train.sources import Shapes
from fastdit.train.trainer import Trainer

COLUMNS = {
    "recipe": "",
    "steps": ",d",
    "minutes": ".1f",
    "loss": ".4f",
    "colour": ".3f",
    "shape": ".3f",
}
SHARP, SHOWING = RECIPES["sharp"], SHOWINGS["sharp"]


def trainings(scale: float) -> list[tuple[Recipe, list[tuple[str, Showing, bool]]]]:
    """Recipes, each with the ways to sample it: what the row is called, how, and whether from the
    averaged weights."""
    steps = max(2, round(SHARP.steps * scale))
    seed = replace(RECIPES["seed"], steps=max(1, round(RECIPES["seed"].steps * scale)))
    longer = replace(seed, steps=steps)
    faster = replace(longer, lr=SHARP.lr, warmup=min(SHARP.warmup, steps - 1))
    sharp = replace(SHARP, steps=steps, warmup=faster.warmup)
    cosine = replace(sharp, label_dropout=0.0)
    plain, clipped = SHOWINGS["seed"], replace(SHOWING, guidance=None)
    return [
        (seed, [("seed", plain, False)]),
        (longer, [("+ more steps", plain, False)]),
        (faster, [("+ a higher rate, with warm-up", plain, False)]),
        (
            cosine,
            [
                ("+ cosine schedule, clipped samples", clipped, False),
                ("+ averaged weights", clipped, True),
            ],
        ),
        (
            sharp,
            [
                ("+ dropped labels", clipped, True),
                ("+ guidance: sharp", SHOWING, True),
            ],
        ),
    ]


def measure(
    recipe: Recipe, ways: list[tuple[str, Showing, bool]], source: Shapes, options: dict[str, Any]
) -> list[dict[str, Any]]:
    config = replace(DiTConfig(), null_class=recipe.label_dropout > 0)
    trainer = Trainer(config, recipe, source, runtime=options["runtime"])
    start = time.perf_counter()
    losses = trainer.run(Monitor(progress=True)).losses
    minutes = (time.perf_counter() - start) / 60
    a_pass = math.ceil(len(source) / recipe.batch_size)
    rows = []
    for name, showing, averaged in ways:
        model = trainer.sampling_model() if averaged else trainer.model
        assert isinstance(model, DiT)
        sample = shapes_sampler(config, trainer.scheduler, showing, options["per_class"])
        rows.append(
            {
                "recipe": name,
                "steps": recipe.steps,
                "minutes": minutes,
                "loss": losses[-a_pass:].mean().item(),
                **sample(model).measured,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of every recipe's steps")
    parser.add_argument("--per-class", type=int, default=40, help="samples that are judged")
    parser.add_argument("--images", type=int, default=200, help="trained on, of each class")
    parser.add_argument("--compile", default="whole", choices=["none", "block", "whole"])
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args()
    if args.scale <= 0 or args.per_class < 4 or args.images < 1:
        parser.error("expected --scale above 0, --per-class of at least 4, --images of at least 1")
    warnings.simplefilter("ignore", TerminalSNRWarning)  # the seed's, on purpose
    facts = machine(torch.device("cpu"))
    print_machine(facts)
    options = {"runtime": Runtime(compile=args.compile), "per_class": args.per_class}
    rows: list[dict[str, Any]] = []
    for recipe, ways in trainings(args.scale):
        rows += measure(recipe, ways, Shapes(args.images), options)
        print(table(COLUMNS, rows[-len(ways) :]), flush=True)
        if args.json:
            write_json(args.json, facts, vars(args), rows=rows)
    print(f"\n{16 * args.per_class} samples of each; the loss is that of the last pass")
    print(table(COLUMNS, rows))


if __name__ == "__main__":
    main()
