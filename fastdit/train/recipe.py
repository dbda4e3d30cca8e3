"""The settings that decide the outcome of a training run, and the named recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fastdit.diffusion import SCHEDULES
from fastdit.errors import check_fields, from_options, unknown_name
from fastdit.solvers import DDIM, DDPM, Solver
from fastdit.update import Guidance

MAX_SAMPLES = 2**32  # a sample's number is one 32-bit word of its noise's counter

_INTEGERS = {"steps": 1, "batch_size": 1, "T": 1, "warmup": 0, "seed": 0}  # the lowest values
_NOTHING = object()
# (name, what the value lies below, what else it may be, and both in words); it lies above 0.
_NUMBERS = (
    ("lr", math.inf, _NOTHING, "a positive number"),
    ("clip", math.inf, None, "a positive number, or None"),
    ("ema", 1, None, "a number between 0 and 1, or None"),
    ("weight_decay", math.inf, 0, "at least 0"),
    ("label_dropout", 1, 0, "a share below 1"),
)


@dataclass(frozen=True)
class Recipe:
    """The settings that decide the outcome of a run, besides the model's config and the data.

    The defaults are those that the toy was published with.

    Attributes:
        steps: number of optimizer steps.
        batch_size: samples per step, over all processes.
        lr: AdamW's peak learning rate.
        lr_schedule: "cosine", from the peak to 0 over the steps after the warm-up, or "constant".
        warmup: steps over which the learning rate rises to its peak.
        weight_decay: AdamW's weight decay.
        clip: bound on the gradient's norm; None for no bound.
        ema: decay of the moving average of the weights; None for no average. The first steps use
            the smaller `(1 + step) / (10 + step)`, so that the average soon forgets the initial
            weights.
        label_dropout: share of labels replaced by the null label, for guidance.
        T: number of diffusion steps.
        schedule: a name in `fastdit.diffusion.SCHEDULES`.
        seed: seed of the weights, the order of the images and the noise.
        name: the recipe in `RECIPES` that this one equals or was derived from; it chooses the entry
            of `SHOWINGS` by which samples are made.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    steps: int = 750
    batch_size: int = 128
    lr: float = 5e-4
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    ema: float | None = None
    label_dropout: float = 0.0
    T: int = 200
    schedule: str = "linear"
    seed: int = 0
    name: Literal["seed", "sharp", "dit"] = "seed"

    def __post_init__(self) -> None:
        for name, low in _INTEGERS.items():
            value, high = getattr(self, name), 2 ** (63 if name == "seed" else 31) - 1
            if type(value) is not int or not low <= value <= high:
                expected = f"an integer from {low} to {high:,}"
                raise ValueError(f"{name}: expected {expected}, got {value!r}")
        for name, limit, other, expected in _NUMBERS:
            value = getattr(self, name)
            if value != other and (type(value) not in (int, float) or not 0 < value < limit):
                raise ValueError(f"{name}: expected {expected}, got {value!r}")
        check_fields(self, "lr_schedule", "name")
        if self.schedule not in list(SCHEDULES):
            raise unknown_name("schedule", self.schedule, SCHEDULES)
        if self.warmup >= self.steps:
            raise ValueError(f"warmup: expected fewer than steps={self.steps}, got {self.warmup}")
        if (n := self.steps * self.batch_size) > MAX_SAMPLES:
            raise ValueError(f"steps: expected at most 2^32 samples in all, got {n:,}")

    @classmethod
    def from_dict(cls, options: dict[str, Any], complete: bool = False) -> Recipe:
        """Return a recipe from a plain dict; with `complete`, no field may be missing."""
        return from_options(cls, options, complete)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.lr_schedule == "constant":
            return self.lr
        done = (step - self.warmup) / (self.steps - self.warmup)
        return 0.5 * self.lr * (1 + math.cos(math.pi * done))

    def ema_at(self, step: int) -> float:
        """Return the average's decay after a step, counted from 0; `ema` must not be None."""
        assert self.ema is not None
        return min(self.ema, (1 + step) / (10 + step))


@dataclass(frozen=True)
class Showing:
    """How samples are made to show a run's progress.

    Attributes:
        solver: the solver and its options.
        steps: number of solver steps; None takes every timestep.
        guidance: classifier-free guidance, used if the model has a null class.
    """

    solver: Solver = field(default_factory=DDPM)
    steps: int | None = None
    guidance: Guidance | None = None


# "dit" follows Peebles & Xie 2023, section 4, and their code: constant learning rate, no gradient
# clipping, no weight decay.
RECIPES: dict[str, Recipe] = {
    "seed": Recipe(),
    "sharp": Recipe(
        steps=6000,
        lr=3e-3,
        warmup=200,
        ema=0.999,
        label_dropout=0.1,
        schedule="cosine",
        name="sharp",
    ),
    "dit": Recipe(
        steps=400_000,
        batch_size=256,
        lr=1e-4,
        lr_schedule="constant",
        clip=None,
        ema=0.9999,
        label_dropout=0.1,
        T=1000,
        name="dit",
    ),
}
SHOWINGS: dict[str, Showing] = {
    "seed": Showing(),
    "sharp": Showing(DDPM(clip=1.0), guidance=Guidance(3.0)),
    "dit": Showing(DDIM(), 50, Guidance(4.0, channels=3)),
}
