"""What may change when a run goes on, how that is recorded, and how its samples stay numbered.

A changed run is no longer a function of one recipe, so every checkpoint from then on holds the list
of its changes. An entry has the step from which it holds, the number of that step's first sample,
and the value before and after of everything that changed:

    {"step": 10, "sample": 160, "lr": [0.001, 0.0001], "batch_size": [16, 32]}
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit.config import DiTConfig
from fastdit.errors import unknown_name
from fastdit.train.recipe import MAX_SAMPLES, Recipe
from fastdit.train.run_folder import RunFolder, Saved
from fastdit.train.runtime import Runtime
from fastdit.train.sources import (
    Source,
    check_same_data,
    describe_set,
    open_source,
    same_data,
)

# The fields of a recipe that a run keeps, and why.
_KEPT = {
    "T": "its weights have learned these timesteps",
    "schedule": "its weights have learned these noise levels",
    "seed": "the order of its images and all of its noise follow from it",
    "name": "change single options instead, such as lr or steps",
    "path": "its weights have learned it",
    "prediction": "its weights have learned it",
    "clean_at": "its weights have learned this direction of time",
    "time_scale": "its weights have learned these times",
    "noise_scale": "its weights have learned these noise levels",
    "min_noise": "it is part of what the model's output means",
    "align_depth": "its projector has learned from this block",
    "align_width": "its projector has this width",
}


@dataclass(frozen=True)
class Numbering:
    """The numbers of a run's samples, which never repeat, whatever changes on the way.

    Attributes:
        batch_size: samples per step, from `step` on.
        step: the step at which batch size or data changed last.
        sample: number of the first sample of that step.
        data_sample: number of the first sample that was taken from the present data.
    """

    batch_size: int
    step: int = 0
    sample: int = 0
    data_sample: int = 0

    def first(self, step: int) -> int:
        """Return the number of a step's first sample, for a step of at least `self.step`."""
        return self.sample + (step - self.step) * self.batch_size

    @classmethod
    def after(cls, changes: Sequence[dict[str, Any]], batch_size: int) -> Numbering:
        """Return the numbering of a run that has the batch size, after its recorded changes."""
        step = sample = data_sample = 0
        for change in changes:
            if "batch_size" in change or "data" in change:
                step, sample = change["step"], change["sample"]
            if "data" in change:
                data_sample = sample
        return cls(batch_size, step, sample, data_sample)


class Continued(NamedTuple):
    """A saved run with its changes: what a `Trainer` needs to take the next step."""

    config: DiTConfig
    recipe: Recipe
    source: Source
    step: int
    changes: list[dict[str, Any]]  # all, the earlier ones included
    tensors: dict[str, Tensor]  # the checkpoint's, with a history of the recipe's length
    changed: dict[str, list[Any]]  # value before and after of what changes now


def continue_saved(
    saved: Saved, source: Source | None, options: Mapping[str, Any], new_data: bool
) -> Continued:
    """Return a saved run with other options and data; `Trainer.resume` says which may differ.

    Raises:
        ValueError: the checkpoint is not of such a run, or a change makes no sense for it.
    """
    header, path = saved.header, saved.path
    config = DiTConfig.from_saved(header["config"])
    before = Recipe.from_saved(header["recipe"])
    step = header["step"]
    if type(step) is not int or not 0 <= step <= before.steps:
        raise ValueError(f"{path}: expected a step in [0, {before.steps}], got {step!r}")
    changes = recorded(header, path)
    recipe, entry = _changed_recipe(before, options, config)
    if source is None:
        match header["data"]:
            case {"kind": "latents", "folder": str(folder)} if not Path(folder).is_dir():
                raise ValueError(
                    f"data: {folder} is gone; name the folder where it is now (--data)"
                )
        source = open_source(header["data"])
    elif new_data and not same_data(source.identity, header["data"]):
        _check_same_classes(source, header.get("labels"), config)
        entry["data"] = [header["data"], source.identity]
    else:
        check_same_data(source.identity, header["data"])
    tensors = dict(saved.tensors)
    if entry:
        if recipe.steps <= step:
            got = f"got {recipe.steps}"
            raise ValueError(f"steps: expected more than the {step} that the run has taken, {got}")
        sample = Numbering.after(changes, before.batch_size).first(step)
        changes = [*changes, {"step": step, "sample": sample, **entry}]
        if (last := Numbering.after(changes, recipe.batch_size).first(recipe.steps)) > MAX_SAMPLES:
            raise ValueError(f"steps: expected at most 2^32 samples in all, got {last:,}")
        history = tensors.get("history")
        # Any other shape is reported with those of the other tensors.
        if history is not None and list(history.shape) == [2, before.steps]:
            tensors["history"] = _resized(history, step, recipe.steps)
    return Continued(config, recipe, source, step, changes, tensors, entry)


def divergence(
    recipe: Recipe, runtime: Runtime, folder: RunFolder | None, step: int, first: int
) -> str:
    """Say at which step a loss was not finite, and how to go on.

    Args:
        recipe: the run's.
        runtime: how it is computed.
        folder: the run's folder, if it has one.
        step: the step, counted from 0.
        first: number of the step's first sample.
    """
    message = (
        f"step {step + 1} of {recipe.steps}, lr {recipe.lr_at(step):g}, on samples {first} to "
        f"{first + recipe.batch_size - 1} of seed {recipe.seed}"
    )
    if folder is None or not (saved := folder.checkpoints()):
        return f"{message}; start again with a lower lr"
    file, out, lr = shlex.quote(str(saved[-1][1])), shlex.quote(str(folder.path)), recipe.lr / 2
    other = " or --precision float32" * (runtime.precision != "float32")
    return (
        f"{message}; the last good checkpoint is {file}. Go on from it with a lower rate: fastdit "
        f"train --resume {file} --out {out} --lr {lr:g}{other} (beside options that are not the "
        f"recipe's), or in Python Trainer.resume(..., changes={{'lr': {lr:g}}})"
    )


def describe(change: Mapping[str, Any]) -> str:
    """Return a recorded change in words."""
    pairs = {name: pair for name, pair in change.items() if name not in ("step", "sample")}
    words = {name: [describe_set(value) for value in pair] for name, pair in pairs.items()}
    said = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in words.items())
    return f"from step {change['step']} on: {said}"


def recorded(header: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """Return the changes that a checkpoint's header holds, once they are known to be such.

    Raises:
        ValueError: they are not.
    """
    changes, step = header.get("changes", []), header.get("step")

    def valid(change: Any) -> bool:
        if not isinstance(change, dict):
            return False
        numbers = [change.get(n) for n in ("step", "sample")]
        integers = [n for n in numbers if type(n) is int and n >= 0]
        pairs = [v for n, v in change.items() if n not in ("step", "sample")]
        in_pairs = all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
        return len(integers) == 2 and type(step) is int and integers[0] <= step and in_pairs

    if not isinstance(changes, list) or not all(map(valid, changes)):
        raise ValueError(f"{path}: expected a list of changes with step and sample, got {changes}")
    return changes


def _changed_recipe(
    before: Recipe, options: Mapping[str, Any], config: DiTConfig
) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe with some options, and [before, after] of those that differ."""
    known = [field.name for field in fields(Recipe)]
    entry: dict[str, Any] = {}
    for name, new in options.items():
        if name not in known:
            raise unknown_name("changes", name, known)
        old = getattr(before, name)
        if new == old:
            continue
        if name in _KEPT:
            raise ValueError(f"{name}: the run was started with {old}, got {new}; {_KEPT[name]}")
        entry[name] = [old, new]
    recipe = replace(before, **{name: new for name, (_, new) in entry.items()})
    if "label_dropout" in entry and not config.null_class:
        why = "the run's model has no null class to take the place of a dropped label"
        raise ValueError(f"label_dropout: expected 0, got {recipe.label_dropout}; {why}")
    if "ema" in entry and recipe.ema is None:
        why = "the run's averaged weights would be lost"
        raise ValueError(f"ema: expected a decay, as the run was started with, got none; {why}")
    if "align_weight" in entry and not all(entry["align_weight"]):
        old, new = entry["align_weight"]
        why = "an alignment lasts for a whole run, since its projector is trained with it"
        raise ValueError(f"align_weight: the run was started with {old}, got {new}; {why}")
    return recipe, entry


def _check_same_classes(source: Source, labels: Any, config: DiTConfig) -> None:
    """Raise a ValueError if the classes of other data have other names or another order.

    Checkpoints from before the names were stored cannot tell.
    """
    names = list(source.label_names)
    if not config.use_class_cond or labels in (None, names):
        return
    if len(labels) == len(names):
        i = next(i for i, (a, b) in enumerate(zip(labels, names, strict=True)) if a != b)
        raise ValueError(
            f"data: expected class {i} to be {labels[i]!r} as before, got {names[i]!r}"
        )
    raise ValueError(f"data: expected {len(labels)} classes as before, got {len(names)}")


def _resized(history: Tensor, step: int, steps: int) -> Tensor:
    """Return the history of a run's steps with room for another number of them."""
    resized = torch.zeros(2, steps, dtype=history.dtype)
    resized[:, :step] = history[:, :step]
    return resized
