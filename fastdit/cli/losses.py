"""The table of losses with which `fastdit train` ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastdit.train.changes import Numbering
from fastdit.train.recipe import Recipe
from fastdit.train.sources import Shapes, Source
from fastdit.train.trainer import TrainResult

# The mean squared error by pass over the set that the toy's author published for the seed recipe;
# that set differs from `fastdit.data.shapes` in detail.
PUBLISHED_LOSS = {1: 0.9147, 4: 0.2467, 8: 0.1685, 16: 0.1409, 24: 0.1262, 30: 0.1228}


def print_losses(
    result: TrainResult, recipe: Recipe, source: Source, changes: Sequence[dict[str, Any]] = ()
) -> None:
    """Print the mean loss of some passes, beside the published losses if they are comparable.

    Where the batch size or the data changed, these are the steps and passes since then.
    """
    at = Numbering.after(changes, recipe.batch_size)
    published = source.identity == Shapes(seed=recipe.seed).identity
    comparable = published and replace(recipe, seed=0) == Recipe() and not changes
    print("pass    step   loss" + "     published for this recipe, on another drawing" * comparable)

    def step_of(turn: int) -> int:
        """Return the number of steps after which a number of passes are complete."""
        taken = at.data_sample + turn * len(source) - at.sample
        return min(max(at.step + taken // recipe.batch_size, at.step), recipe.steps)

    passes = math.ceil((at.first(recipe.steps) - at.data_sample) / len(source))
    for number in sorted({*(n for n in PUBLISHED_LOSS if n < passes), passes}):
        first, last = step_of(number - 1), step_of(number)
        if last <= first:  # a step spans several passes, or these passes were before the change
            continue
        loss = result.losses[first:last].mean().item()
        beside = f"   {PUBLISHED_LOSS[number]:.4f}" if comparable else ""
        print(f"{number:4d} {last:7d}   {loss:.4f}{beside}")
    rate, first_step = result.images_per_second, result.first_step_seconds
    if not math.isnan(rate):
        print(f"{rate:.0f} images/s after a first step of {first_step:.1f} s")
