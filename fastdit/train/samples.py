"""Samples that a `Monitor` shows: of models of the coloured shapes, of pixels and of latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdit.config import DiTConfig
from fastdit.data.latents import decode
from fastdit.data.shapes import LABEL_NAMES, SHAPES, judge
from fastdit.flow import FlowMatching, Process
from fastdit.model import DiT
from fastdit.sampling.sampler import Sampler
from fastdit.train.monitor import Shown
from fastdit.train.recipe import Showing

SHOWN_PER_CLASS = 4
_CLASSES = 4  # shown in a grid, spread over all classes
_SEED = 0


def shapes_sampler(
    config: DiTConfig, scheduler: Process, showing: Showing, per_class: int = 10
) -> Callable[[DiT], Shown]:
    """Return a function that samples a model of the coloured shapes.

    It shows four samples of each class, one row per colour. If the model has classes, it measures
    the judge's accuracies over `per_class` samples of each.
    """
    showing = _checked(config, scheduler, showing)
    labels = torch.arange(len(LABEL_NAMES)).repeat_interleave(per_class)

    def sample(model: DiT) -> Shown:
        images = _sample(model, scheduler, showing, labels).cpu()
        by_class = images.view(len(LABEL_NAMES), -1, *images.shape[1:])[:, :SHOWN_PER_CLASS]
        columns = by_class.shape[1] * len(SHAPES)
        measured = judge(images, labels)._asdict() if config.use_class_cond else {}
        return Shown(by_class.flatten(0, 1), columns, len(images), measured)

    return sample


def latents_sampler(
    config: DiTConfig, scheduler: Process, showing: Showing, vae: Any
) -> Callable[[DiT], Shown]:
    """Return a function that samples a model of latents and decodes the samples.

    It shows four samples of each of four classes, one row per class.
    """
    showing = _checked(config, scheduler, showing)
    classes = torch.linspace(0, config.num_classes - 1, _CLASSES).round().long()
    labels = classes.repeat_interleave(SHOWN_PER_CLASS)

    def sample(model: DiT) -> Shown:
        latents = _sample(model, scheduler, showing, labels)
        return Shown(decode(vae, latents), SHOWN_PER_CLASS, len(latents), {})

    return sample


def pixels_sampler(
    config: DiTConfig, scheduler: Process, showing: Showing
) -> Callable[[DiT], Shown]:
    """Return a function that samples a model of any pixels.

    It shows four samples of each of at most four classes, one row per class.
    """
    showing = _checked(config, scheduler, showing)
    classes = torch.linspace(0, config.num_classes - 1, _CLASSES).round().long().unique()
    labels = classes.repeat_interleave(SHOWN_PER_CLASS)

    def sample(model: DiT) -> Shown:
        pixels = _sample(model, scheduler, showing, labels)
        return Shown(pixels, SHOWN_PER_CLASS, len(pixels), {})

    return sample


def _checked(config: DiTConfig, scheduler: Process, showing: Showing) -> Showing:
    """Return the showing, without guidance if the model has no null class.

    A number of steps that the solver cannot take is refused here, not after hours of training.
    """
    if isinstance(scheduler, FlowMatching):
        showing.solver.table(scheduler, showing.steps)
    else:
        steps = scheduler.T if showing.steps is None else showing.steps
        try:
            showing.solver.spacing(scheduler.T, steps)
        except ValueError as error:
            got = f"since samples take {steps} steps of the solver, got {scheduler.T}"
            raise ValueError(f"T: expected a multiple of {steps}, {got} ({error})") from error
    return showing if config.null_class else replace(showing, guidance=None)


def _sample(model: DiT, scheduler: Process, showing: Showing, labels: Tensor) -> Tensor:
    sampler = Sampler(model, scheduler, showing.solver, showing.steps, guidance=showing.guidance)
    if model.cfg.use_class_cond:
        return sampler(labels, seed=_SEED)
    return sampler(None, seeds=range(_SEED, _SEED + len(labels)))
