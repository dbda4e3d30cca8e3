"""What decides the outcome of a training, and the recipes that have a name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from fastdit.diffusion import SCHEDULES
from fastdit.errors import from_options, unknown_name
from fastdit.solvers import DDIM, DDPM, Solver
from fastdit.update import Guidance

MAX_SAMPLES = 2**32  # the index of a sample is one word of its noise's counter


@dataclass(frozen=True)
class Recipe:
    """What decides the outcome of a run, besides the model's config and the data.

    The defaults are the toy's published ones.

    Attributes:
        steps: of the optimizer.
        batch_size: samples a step, on all processes together.
        lr: AdamW's rate at its peak.
        lr_schedule: "cosine", from the peak to 0 over the steps after the warm-up, or "constant".
        warmup: steps over which the rate rises to its peak.
        weight_decay: AdamW's.
        clip: bound on the gradient's norm; None for no bound.
        ema: decay of the moving average of the weights; None keeps none. It begins shorter, at
            `(1 + step) / (10 + step)`, so that early averages are not of the first weights.
        label_dropout: share of labels replaced by the null label, for guidance.
        T: diffusion steps.
        schedule: a name in `fastdit.diffusion.SCHEDULES`.
        seed: of the weights, the order and the noise.
        name: the recipe in `RECIPES` that this one is, or was changed from; its samples are made
            as `SHOWINGS` says.

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
        for name in ("steps", "batch_size", "T"):
            _check_integer(name, getattr(self, name), 1, 2**31)
        _check_integer("warmup", self.warmup, 0, 2**31)
        _check_integer("seed", self.seed, 0, 2**63)
        _check_number("lr", self.lr, 0, math.inf, "a positive number")
        if self.clip is not None:
            _check_number("clip", self.clip, 0, math.inf, "a positive number, or None")
        if self.ema is not None:
            _check_number("ema", self.ema, 0, 1, "a number between 0 and 1, or None")
        if self.weight_decay != 0:
            _check_number("weight_decay", self.weight_decay, 0, math.inf, "at least 0")
        if self.label_dropout != 0:
            _check_number("label_dropout", self.label_dropout, 0, 1, "a share below 1")
        if not isinstance(self.schedule, str) or self.schedule not in SCHEDULES:
            raise unknown_name("schedule", self.schedule, SCHEDULES)
        for name in ("lr_schedule", "name"):
            choices = get_args(get_type_hints(Recipe)[name])
            if getattr(self, name) not in choices:
                raise unknown_name(name, getattr(self, name), choices)
        if self.warmup >= self.steps:
            raise ValueError(f"warmup: expected fewer than steps={self.steps}, got {self.warmup}")
        if self.steps * self.batch_size > MAX_SAMPLES:
            raise ValueError(
                f"steps: expected at most 2^32 samples in all, got {self.steps} steps of "
                f"{self.batch_size}"
            )

    @classmethod
    def from_dict(cls, options: dict[str, Any], complete: bool = False) -> Recipe:
        return from_options(cls, options, complete)

    def lr_at(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.lr_schedule == "constant":
            return self.lr
        done = (step - self.warmup) / (self.steps - self.warmup)
        return 0.5 * self.lr * (1 + math.cos(math.pi * done))

    def ema_at(self, step: int) -> float:
        """The average's decay after a step, counted from 0; it needs `ema`."""
        assert self.ema is not None
        return min(self.ema, (1 + step) / (10 + step))


@dataclass(frozen=True)
class Showing:
    """How the samples of a run are made.

    Attributes:
        solver: the solver, with its own options.
        steps: of the solver; None takes every timestep.
        guidance: classifier-free guidance, of models that have a null class.
    """

    solver: Solver = field(default_factory=DDPM)
    steps: int | None = None
    guidance: Guidance | None = None


def _check_integer(name: str, value: Any, low: int, limit: int) -> None:
    if type(value) is not int or not low <= value < limit:
        raise ValueError(f"{name}: expected an integer from {low} to {limit - 1:,}, got {value!r}")


def _check_number(name: str, value: Any, low: float, limit: float, expected: str) -> None:
    if type(value) not in (int, float) or not low < value < limit:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


# "dit" is Peebles & Xie 2023, section 4 and their code: constant rate, no clipping, no decay.
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
