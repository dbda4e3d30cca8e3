"""What people look at while a model trains: a bar, a file of metrics, TensorBoard, samples."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fastdit.config import DiTConfig
from fastdit.data.images import to_pixels, write_grid
from fastdit.data.latents import decode
from fastdit.data.shapes import COLOURS, LABEL_NAMES, judge
from fastdit.diffusion import DiffusionScheduler
from fastdit.model import DiT
from fastdit.sampling.sampler import Sampler
from fastdit.train.recipe import Showing
from fastdit.train.run_folder import RunFolder

SHOWN_PER_CLASS = 4
JUDGED_PER_CLASS = 10
_ROWS = len(COLOURS)  # of a grid; of a set that is no toy, so many classes, spread over all
_SAMPLES_SEED = 0


class Shown(NamedTuple):
    """Samples of a model."""

    images: Tensor  # [b, C, H, W] to be seen, in four rows
    number: int  # of those that were measured
    measured: dict[str, float]


class Monitor:
    """Receives a run's measurements; only the first of several processes has one with outputs."""

    def __init__(
        self,
        folder: RunFolder | None = None,
        *,
        log_every: int = 10,
        sample_every: int = 0,
        sample: Callable[[DiT], Shown] | None = None,
        progress: bool = False,
    ) -> None:
        """Set up.

        Args:
            folder: for `metrics.jsonl`, grids, and TensorBoard's files where it is installed; None
                keeps nothing on disk.
            log_every: steps between two measurements; each waits for the device.
            sample_every: steps between two grids of samples; 0 makes none on the way.
            sample: makes them, such as `shapes_sampler(...)`.
            progress: whether to show a bar.
        """
        for name, value in (("log_every", log_every), ("sample_every", sample_every + 1)):
            if value < 1:
                raise ValueError(f"{name}: expected a number of steps, got {value}")
        self.folder, self.log_every, self.sample_every = folder, log_every, sample_every
        self._sample, self._progress = sample, progress
        self.shown: Shown | None = None  # the last samples
        self.grid: Path | None = None  # and where they are
        self._bar: Any = None
        self._board: Any = None

    @property
    def cadence(self) -> dict[str, Any]:
        """What processes must agree on."""
        shows = self._sample is not None
        return {"log_every": self.log_every, "sample_every": self.sample_every, "shows": shows}

    def begin(self, step: int, steps: int) -> None:
        """A run goes on from a step."""
        self._bar = tqdm(
            total=steps, initial=step, desc="training", unit="step", disable=not self._progress
        )
        if self.folder is not None and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            board = self.folder.path / "tensorboard"
            self._board = SummaryWriter(str(board), purge_step=step + 1)

    def advance(self) -> None:
        """A step was taken."""
        self._bar.update()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Keep what was measured after so many steps."""
        if "loss" in values:
            shown = [f"loss {values['loss']:.4f}"]
            if "images_per_second" in values:
                shown.append(f"{values['images_per_second']:.0f} img/s")
                shown.append(f"MFU {values['mfu']:.1%}")
            self._bar.set_postfix_str(", ".join(shown))
        if self.folder is not None:
            self.folder.metrics.parent.mkdir(parents=True, exist_ok=True)
            with open(self.folder.metrics, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def due(self, step: int, last: bool) -> bool:
        """Whether samples are to be made after so many steps."""
        if self._sample is None:
            return False
        return last or (self.sample_every > 0 and step % self.sample_every == 0)

    def show(self, step: int, model: DiT) -> None:
        """Make samples of a model, and keep what they show."""
        assert self._sample is not None
        self._bar.set_description("sampling")
        self.shown = shown = self._sample(model)
        self._bar.set_description("training")
        if self.folder is not None:
            self.grid = self.folder.samples / f"step-{step:08d}.png"
            zoom = max(1, 48 // shown.images.shape[-1])
            write_grid(self.grid, to_pixels(shown.images), len(shown.images) // _ROWS, zoom)
        if shown.measured:
            self.log(step, shown.measured)

    def end(self) -> None:
        """The run stops, for whatever reason."""
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()


def shapes_sampler(
    config: DiTConfig,
    scheduler: DiffusionScheduler,
    showing: Showing,
    per_class: int = JUDGED_PER_CLASS,
) -> Callable[[DiT], Shown]:
    """Samples of a model of the coloured shapes: four of each class, one row a colour, and the
    judge's accuracies over `per_class` of each, where it has classes."""
    showing = _fitting(config, scheduler, showing)
    labels = torch.arange(len(LABEL_NAMES)).repeat_interleave(per_class)

    def sample(model: DiT) -> Shown:
        images = _sampled(model, scheduler, showing, labels).cpu()
        by_class = images.view(len(LABEL_NAMES), -1, *images.shape[1:])
        seen = by_class[:, :SHOWN_PER_CLASS].flatten(0, 1)
        measured = judge(images, labels)._asdict() if config.use_class_cond else {}
        return Shown(seen, len(images), measured)

    return sample


def latents_sampler(
    config: DiTConfig, scheduler: DiffusionScheduler, showing: Showing, vae: Any
) -> Callable[[DiT], Shown]:
    """Decoded samples of a model of latents: four of each of four classes, one row a class."""
    showing = _fitting(config, scheduler, showing)
    chosen = torch.linspace(0, config.num_classes - 1, _ROWS).round().long()
    labels = chosen.repeat_interleave(SHOWN_PER_CLASS)

    def sample(model: DiT) -> Shown:
        latents = _sampled(model, scheduler, showing, labels)
        return Shown(decode(vae, latents), len(latents), {})

    return sample


def _fitting(config: DiTConfig, scheduler: DiffusionScheduler, showing: Showing) -> Showing:
    """The showing, without guidance where the model has no null class to guide away from.

    Raises:
        ValueError: the solver cannot take so many steps: now, and not at the first samples.
    """
    showing.solver.spacing(scheduler.T, scheduler.T if showing.steps is None else showing.steps)
    return showing if config.null_class else replace(showing, guidance=None)


def _sampled(model: DiT, scheduler: DiffusionScheduler, showing: Showing, labels: Tensor) -> Tensor:
    sampler = Sampler(model, scheduler, showing.solver, showing.steps, guidance=showing.guidance)
    if model.cfg.use_class_cond:
        return sampler(labels, seed=_SAMPLES_SEED)
    return sampler(None, seeds=range(_SAMPLES_SEED, _SAMPLES_SEED + len(labels)))
