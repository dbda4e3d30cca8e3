"""The settings that decide the outcome of a training run, and the named recipes."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from fastdit.diffusion import SCHEDULES, DiffusionScheduler
from fastdit.errors import check_fields, from_options, unknown_name
from fastdit.flow import FlowMatching, Process
from fastdit.solvers import DDIM, DDPM, Euler, Solver
from fastdit.train.flows import FlowTraining
from fastdit.update import Guidance

BETA1 = 0.9  # AdamW's decay of the gradients, in every recipe
MAX_SAMPLES = 2**32  # a sample's number is one 32-bit word of its noise's counter

# The lowest values of integers.
_INTEGERS = {
    "steps": 1,
    "batch_size": 1,
    "T": 1,
    "warmup": 0,
    "seed": 0,
    "align_depth": 1,
    "align_width": 1,
}
_NOTHING = object()
# (name, what the value lies below, what else it may be, and both in words); it lies above 0.
_NUMBERS = (
    ("lr", math.inf, _NOTHING, "a positive number"),
    ("clip", math.inf, None, "a positive number, or None"),
    ("ema", 1, None, "a number between 0 and 1, or None"),
    ("weight_decay", math.inf, 0, "at least 0"),
    ("label_dropout", 1, 0, "a share below 1"),
    ("beta2", 1, _NOTHING, "a number between 0 and 1"),
    ("time_deviation", math.inf, _NOTHING, "a positive number"),
    ("time_shift", math.inf, _NOTHING, "a positive number"),
    ("direction_loss", math.inf, 0, "at least 0"),
    ("align_weight", math.inf, 0, "at least 0"),
)

# Fields that the runs of earlier releases lack, with the values by which those were trained.
_LATER_OPTIONS: dict[str, Any] = {
    "beta2": 0.999,
    "path": None,
    "prediction": "epsilon",
    "clean_at": 1,
    "time_scale": 1.0,
    "noise_scale": 1.0,
    "min_noise": None,
    "time_draw": "uniform",
    "time_mean": 0.0,
    "time_deviation": 1.0,
    "time_shift": 1.0,
    "direction_loss": 0.0,
    "align_weight": 0.0,
    "align_depth": 8,
    "align_width": 2048,
}

# What a `DiffusionScheduler` and a `FlowMatching` are made of; and what only flows have.
DIFFUSION_OPTIONS = ("T", "schedule")
FLOW_OPTIONS = ("path", "prediction", "clean_at", "time_scale", "noise_scale", "min_noise")
_OF_FLOWS = (*FLOW_OPTIONS, *(field.name for field in fields(FlowTraining)))
FLOW_RECIPES = ("sit", "lightning", "flow")


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
        T: number of diffusion steps; a flow has none.
        schedule: a name in `fastdit.diffusion.SCHEDULES`; a flow has none.
        seed: seed of the weights, the order of the images and the noise.
        name: the recipe in `RECIPES` that this one equals or was derived from; it chooses the entry
            of `SHOWINGS` by which samples are made. Those in `FLOW_RECIPES` train a flow.
        beta2: AdamW's decay of the squared gradients; that of the gradients is `BETA1`.
        path, prediction, clean_at, time_scale, noise_scale, min_noise: as for `FlowMatching`. A
            path of None trains a diffusion, and then the prediction is "epsilon".
        time_draw: how a flow draws times: "uniform"; or "logit-normal", the sigmoid of a normal
            with `time_mean` and `time_deviation`. Here and in the shift, time counts from the noise
            at 0 to the data at 1, whatever clean_at is.
        time_mean: mean of that normal; below 0 it draws more noise.
        time_deviation: standard deviation of that normal.
        time_shift: s, which moves drawn times to `s t / (1 + (s - 1) t)`; below 1 towards noise.
        direction_loss: weight of `1 - cos`, the cosine being that of predicted and true velocity
            over the channels; it needs prediction="velocity".
        align_weight: weight of REPA's alignment with an encoder's features; 0 has none.
        align_depth: number of blocks after which the hidden state is aligned.
        align_width: width of the projector between hidden state and features.

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
    name: Literal["seed", "sharp", "dit", "sit", "lightning", "flow"] = "seed"
    beta2: float = 0.999
    path: Literal["linear", "gvp", "vp"] | None = None
    prediction: Literal["epsilon", "velocity", "sample", "score"] = "epsilon"
    clean_at: int = 1
    time_scale: float = 1.0
    noise_scale: float = 1.0
    min_noise: float | None = None
    time_draw: Literal["uniform", "logit-normal"] = "uniform"
    time_mean: float = 0.0
    time_deviation: float = 1.0
    time_shift: float = 1.0
    direction_loss: float = 0.0
    align_weight: float = 0.0
    align_depth: int = 8
    align_width: int = 2048

    def __post_init__(self) -> None:
        for name, low in _INTEGERS.items():
            value, high = getattr(self, name), 2 ** (63 if name == "seed" else 31) - 1
            if type(value) is not int or not low <= value <= high:
                expected = f"an integer from {low} to {high:,}"
                raise ValueError(f"{name}: expected {expected}, got {value!r}")
        for name, limit, other, expected in _NUMBERS:
            value = getattr(self, name)
            if value != other and not (_is_finite(value) and 0 < value < limit):
                raise ValueError(f"{name}: expected {expected}, got {value!r:.40}")
        check_fields(self, "lr_schedule", "name", "time_draw")
        self._check_process()
        if self.schedule not in list(SCHEDULES):
            raise unknown_name("schedule", self.schedule, SCHEDULES)
        if self.warmup >= self.steps:
            raise ValueError(f"warmup: expected fewer than steps={self.steps}, got {self.warmup}")
        if (n := self.steps * self.batch_size) > MAX_SAMPLES:
            raise ValueError(f"steps: expected at most 2^32 samples in all, got {n:,}")

    def _check_process(self) -> None:
        """Check that all fields are of the diffusion, or of the flow, that the recipe trains."""
        flow, path = self.name in FLOW_RECIPES, self.path
        if flow and path is None:
            raise ValueError(f"path: expected one, since {self.name!r} trains a flow, got None")
        if path is not None and not flow:
            advice = f"begin with one of {', '.join(FLOW_RECIPES)}"
            why = f"{self.name!r} trains a diffusion"
            raise ValueError(f"path: expected None, since {why}, got {path!r}; {advice}")
        others = DIFFUSION_OPTIONS if flow else _OF_FLOWS
        kind = "flow, whose time is continuous" if flow else "diffusion"
        for name, default in ((f.name, f.default) for f in fields(self) if f.name in others):
            if (value := getattr(self, name)) != default:
                why = f"{self.name!r} trains a {kind}"
                raise ValueError(
                    f"{name}: expected the default {default!r}, since {why}, got {value!r}"
                )
        if not _is_finite(self.time_mean):
            raise ValueError(f"time_mean: expected a number, got {self.time_mean!r:.40}")
        if flow:
            self.process()  # which checks its options
        if self.direction_loss and self.prediction != "velocity":
            needs = "expected 0 unless prediction='velocity'"
            raise ValueError(f"direction_loss: {needs}, got {self.direction_loss}")

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Recipe:
        """Return a recipe with some fields set; an unknown field is a ValueError."""
        return from_options(cls, options)

    @classmethod
    def from_saved(cls, options: Any) -> Recipe:
        """Return the recipe that a run's file holds, which an earlier release may have written.

        Raises:
            ValueError: a field is unknown or out of range, or one that its release had is missing.
        """
        if isinstance(options, dict):
            options = _LATER_OPTIONS | options
        return from_options(cls, options, complete=True)

    def process(self, device: torch.device | str = "cpu") -> Process:
        """Return the diffusion or the flow that the recipe trains."""
        if self.path is None:
            return DiffusionScheduler(self.T, device, self.schedule)
        return FlowMatching(**{name: getattr(self, name) for name in FLOW_OPTIONS})

    def flow_training(self) -> FlowTraining:
        """Return how the recipe trains its flow."""
        own = {field.name: getattr(self, field.name) for field in fields(FlowTraining)}
        return FlowTraining(**own)

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


def _is_finite(value: Any) -> bool:
    """Return whether a value is a number, and one that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


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
# clipping, no weight decay. "sit" is the same with a flow (Ma et al. 2024, section 4, and their
# code). "lightning" follows LightningDiT (Yao et al. 2025), in the values of its configuration for
# 64 epochs, which has no gradient clipping.
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
    "sit": Recipe(
        steps=400_000,
        batch_size=256,
        lr=1e-4,
        lr_schedule="constant",
        clip=None,
        ema=0.9999,
        label_dropout=0.1,
        path="linear",
        prediction="velocity",
        name="sit",
    ),
    "lightning": Recipe(
        steps=80_000,
        batch_size=1024,
        lr=2e-4,
        lr_schedule="constant",
        beta2=0.95,
        clip=None,
        ema=0.9999,
        label_dropout=0.1,
        path="linear",
        prediction="velocity",
        time_draw="logit-normal",
        direction_loss=1.0,
        name="lightning",
    ),
    "flow": Recipe(
        steps=6000,
        lr=3e-3,
        warmup=200,
        ema=0.999,
        label_dropout=0.1,
        path="linear",
        prediction="velocity",
        time_scale=1000.0,
        name="flow",
    ),
}
SHOWINGS: dict[str, Showing] = {
    "seed": Showing(),
    "sharp": Showing(DDPM(clip=1.0), guidance=Guidance(3.0)),
    "dit": Showing(DDIM(), 50, Guidance(4.0, channels=3)),
    "sit": Showing(Euler(), 50, Guidance(4.0, channels=3)),
    "lightning": Showing(Euler(shift=0.3), 50, Guidance(10.0, (0.1, 1.0), channels=3)),
    "flow": Showing(Euler(), 25, Guidance(3.0)),
}
