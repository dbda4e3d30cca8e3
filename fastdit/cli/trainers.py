"""The trainer of a run that `fastdit train` starts, fine-tunes or resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fastdit.checkpoints import inspect, load
from fastdit.checkpoints.matching import dit_config
from fastdit.cli.data import check_no_pictures, reopen_data
from fastdit.config import PRESETS, DiTConfig
from fastdit.data.features import Features
from fastdit.errors import unknown_name
from fastdit.flow import published_flow
from fastdit.model import DiT
from fastdit.train.alignment import ALIGN_WEIGHT
from fastdit.train.recipe import DIFFUSION_OPTIONS, FLOW_OPTIONS, FLOW_RECIPES, RECIPES, Recipe
from fastdit.train.run_folder import RunFolder, Saved, read
from fastdit.train.sources import Shapes, Source, open_data
from fastdit.train.trainer import Trainer

# What a checkpoint has learned of a flow, and nothing but its training can tell.
_NEEDED_OF_FLOWS = ("path", "prediction", "clean_at")


class ImageOptions(NamedTuple):
    """The options that say which images a run is trained on."""

    data: Path | None
    per_class: int | None
    new_data: bool
    pictures: dict[str, Any]  # options of `open_data`
    features: Path | None  # of an encoder

    def open_features(self) -> Features | None:
        return None if self.features is None else Features(self.features)


def start_run(
    images: ImageOptions,
    model: str | None,
    origin: Path | None,
    given: dict[str, Any],
    options: dict[str, Any],
) -> Trainer:
    """Return the trainer of a new run."""
    name = given["name"] or "seed"
    if name not in RECIPES:
        raise unknown_name("--recipe", name, RECIPES)
    changes = _changes(given)
    if "steps" in changes and "warmup" not in changes:
        changes["warmup"] = min(RECIPES[name].warmup, changes["steps"] - 1)
    if images.features is not None:
        changes.setdefault("align_weight", ALIGN_WEIGHT)
    if model is not None and origin is None:
        changes = _published_process(model, given) | changes
    recipe = replace(RECIPES[name], **changes)
    source = _open(images, recipe.seed, options["out"])
    options = options | {"features": images.open_features()}
    if origin is None:
        return Trainer(_fitted_config(model or "toy", recipe, source), recipe, source, **options)
    if model is not None:
        raise ValueError("--model: expected none beside --from, which has a config of its own")
    RunFolder(options["out"]).check_unused()  # before a large file is read
    initial = _load_initial(origin, source)
    if recipe.label_dropout and not initial.cfg.null_class:
        got = f"{recipe.label_dropout}, but {origin} has no null class to learn from them"
        raise ValueError(f"--label-dropout: expected 0, got {got}")
    recipe = replace(recipe, **_process_of(initial, origin, recipe, given))
    trainer = Trainer(initial.cfg, recipe, source, initial=initial, **options)
    assert trainer.origin is not None
    trainer.origin["path"] = str(origin.resolve())
    return trainer


def _published_process(model: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the flow that a preset was published with; none for a diffusion.

    Raises:
        ValueError: there is no such preset, or no recipe is named for one with a flow.
    """
    if model not in PRESETS:
        raise unknown_name("--model", model, PRESETS)
    flow = published_flow(model, PRESETS[model].sample_shape[1])
    if flow is None:
        return {}
    if given["name"] is None:
        why = f"since {model} was published with a flow, got none"
        raise ValueError(f"--recipe: expected one of {', '.join(FLOW_RECIPES)}, {why}")
    if given["name"] not in FLOW_RECIPES:  # asked for, as is the model
        return {}
    options = flow.options
    if given["path"] or given["prediction"]:
        del options["min_noise"]  # which belongs to the published ones
    return options


def _load_initial(origin: Path, source: Source) -> DiT:
    """Return the model of --from, fitted to the data; load warns of what it made anew."""
    C, H, W = source.sample_shape
    conditional = dit_config(origin, inspect(origin).config).use_class_cond
    classes = len(source.label_names) if conditional else None
    size = H if H == W else (H, W)
    model = load(origin, num_classes=classes, img_size=size, in_channels=C)
    assert isinstance(model, DiT)
    return model


def _process_of(model: DiT, origin: Path, recipe: Recipe, given: dict[str, Any]) -> dict[str, Any]:
    """Return what the model's own process says of the recipe, as far as no option does.

    Raises:
        ValueError: the checkpoint does not tell its process, or the recipe does not train such.
    """
    options = model.diffusion or inspect(origin).diffusion or {}
    known = FLOW_OPTIONS if recipe.path else DIFFUSION_OPTIONS
    missing = [name for name in known if given[name] is None]
    if not options:
        needed = _NEEDED_OF_FLOWS if recipe.path else known
        if asked := [name for name in needed if name in missing]:
            flags = {"T": "--diffusion-steps", "clean_at": "--clean-at"}
            *others, last = (flags.get(name, f"--{name}") for name in asked)
            passed = f"{', '.join(others)} and {last}" if others else last
            what = "flow" if recipe.path else "diffusion"
            raise ValueError(f"--from: {origin} does not tell its {what}; pass {passed}")
        return {}
    if ("path" in options) != (recipe.path is not None):
        its, ours = "a diffusion", "a flow"
        if "path" in options:
            its, ours = ours, its
        names = [n for n, r in RECIPES.items() if (r.path is None) != (recipe.path is None)]
        why = f"{origin} was trained on {its}, and {recipe.name!r} trains {ours}"
        raise ValueError(f"--recipe: expected one of {', '.join(names)}, since {why}")
    if not recipe.path and (prediction := options.get("prediction", "epsilon")) != "epsilon":
        why = "fastdit train trains diffusions that predict the noise"
        raise ValueError(f"--from: {origin} predicts {prediction!r}; {why}")
    return {name: options[name] for name in missing}


def _check_same_origin(trainer: Trainer, origin: Path | None) -> None:
    """Raise a ValueError if --from names another checkpoint than the run was started from."""
    if origin is None:
        return
    started = (trainer.origin or {}).get("path", "no checkpoint")
    if str(origin.resolve()) != started:
        why = "a run that goes on has weights of its own"
        raise ValueError(f"--from: the run was started from {started}, got {origin}; {why}")


def _open(images: ImageOptions, seed: int, out: Path) -> Source:
    """Return the images of a new run."""
    if images.data is None:
        check_no_pictures(images.pictures)
        return Shapes(200 if images.per_class is None else images.per_class, seed)
    if images.per_class is not None:
        raise ValueError("--per-class: expected none beside --data")
    RunFolder(out).check_unused()  # before an earlier run's pixels are replaced
    return open_data(images.data, **images.pictures)


def _reopen(images: ImageOptions, saved: Saved) -> Source | None:
    """Return the images of a run that goes on, or None to open them from where they were."""
    if images.per_class is not None and images.data is not None:
        raise ValueError("--per-class: expected none beside --data")
    if images.new_data and images.per_class is not None:
        check_no_pictures(images.pictures)
        seed = Recipe.from_saved(saved.header["recipe"]).seed
        return Shapes(images.per_class, seed)
    return reopen_data(saved.header, images.data, images.pictures, images.new_data)


def _changes(given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the recipe that options set; 0 means None where that is a value."""
    changes = {field: value for field, value in given.items() if value is not None}
    return changes | {field: None for field in ("clip", "ema", "min_noise") if given[field] == 0}


def _fitted_config(model: str, recipe: Recipe, source: Source) -> DiTConfig:
    """Return a preset with the data's shape and classes.

    It has a null class if labels are dropped, since its row would stay untrained otherwise.
    """
    if model not in PRESETS:
        raise unknown_name("--model", model, PRESETS)
    C, H, W = source.sample_shape
    classes, preset = len(source.label_names), PRESETS[model]
    null = recipe.label_dropout > 0
    return replace(preset, in_channels=C, img_size=(H, W), num_classes=classes, null_class=null)


def find_saved(resume: str, out: Path) -> Saved | None:
    """Return the checkpoint to continue from, or None where the run starts afresh."""
    if resume == "no":
        return None
    folder = RunFolder(out)
    if resume == "auto":
        return folder.newest()
    if not Path(resume).is_file():
        hint = f"; a run's folder is continued by --resume auto --out {resume}"
        hint *= Path(resume).is_dir()
        raise ValueError(f"--resume: expected auto, no, or a checkpoint's file, got {resume}{hint}")
    saved = read(resume)
    if Path(resume).resolve().parent != (out / "checkpoints").resolve():
        folder.check_unused()
    if later := [path.name for at, path in folder.checkpoints() if at > saved.header["step"]]:
        holds = "a later checkpoint" if len(later) == 1 else "later checkpoints"
        advice = f"move {'it' if len(later) == 1 else 'them'} away, or name another --out"
        raise ValueError(f"--resume: {out} holds {holds}, {', '.join(later)}; {advice}")
    return saved


def continue_run(
    saved: Saved,
    images: ImageOptions,
    model: str | None,
    origin: Path | None,
    given: dict[str, Any],
    options: dict[str, Any],
) -> Trainer:
    """Return the trainer of a saved run, from now on with the options that differ."""
    source = _reopen(images, saved)
    changes, new_data = _changes(given), images.new_data
    options = options | {"features": images.open_features()}
    trainer = Trainer.resume(saved, source=source, changes=changes, new_data=new_data, **options)
    fitted = None if model is None else _fitted_config(model, trainer.recipe, trainer.source)
    if fitted is not None:  # an earlier release gave published sizes a null class in any case
        fitted = replace(fitted, null_class=trainer.config.null_class)
    if fitted not in (None, trainer.config):
        why = "a run keeps its model's shape"
        raise ValueError(f"--model: the run was started with another one, got {model}; {why}")
    got, started = images.per_class, trainer.source.identity.get("per_class")
    if got not in (None, started):
        why = "--new-data goes on with other images"
        raise ValueError(f"--per-class: the run was started with {started}, got {got}; {why}")
    _check_same_origin(trainer, origin)
    return trainer
