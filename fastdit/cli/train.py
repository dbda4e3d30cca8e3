"""`fastdit train`."""

from __future__ import annotations

import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from fastdit.checkpoints import inspect, load
from fastdit.cli.common import DEFAULT_OUT, Device, device_of, option, plain_errors
from fastdit.cli.losses import print_losses
from fastdit.config import PRESETS, DiTConfig
from fastdit.data.latents import latent_channels, load_vae
from fastdit.errors import unknown_name
from fastdit.model import DiT
from fastdit.train.changes import describe
from fastdit.train.distributed import processes
from fastdit.train.monitor import Monitor
from fastdit.train.recipe import RECIPES, SHOWINGS, Recipe
from fastdit.train.run_folder import RunFolder, Saved, read
from fastdit.train.runtime import Runtime
from fastdit.train.samples import latents_sampler, shapes_sampler
from fastdit.train.sources import Latents, Shapes, Source
from fastdit.train.trainer import Trainer, TrainResult

_SAME_REQUEST = 3.0  # seconds within which a second signal is taken for the first one


def _recipe_option(text: str, *names: str) -> Any:
    return option(f"{text}  [the recipe's]", *names)


def train(
    out: Annotated[Path, option("Folder of the weights, checkpoints and samples.")] = DEFAULT_OUT,
    resume: Annotated[
        str,
        option(
            "auto: continue from the newest whole checkpoint in --out, or start a run if "
            "there is none; a file: continue from it; no: start a run. Options of the recipe that "
            "differ hold from there on."
        ),
    ] = "no",
    name: Annotated[
        str | None, option(f"{', '.join(RECIPES)}; options change it.  [seed]", "--recipe")
    ] = None,
    data: Annotated[Path | None, option("Latents of `fastdit encode`.  [coloured shapes]")] = None,
    new_data: Annotated[
        bool, option("Resume on other --data or --per-class than the run's.", "--new-data")
    ] = False,
    model: Annotated[str | None, option("A preset that is fitted to the data.  [toy]")] = None,
    origin: Annotated[
        Path | None,
        option("A checkpoint to fine-tune: start from its weights, fitted to the data.", "--from"),
    ] = None,
    per_class: Annotated[int | None, option("Number of coloured shapes per class.  [200]")] = None,
    steps: Annotated[int | None, _recipe_option("Optimizer steps.")] = None,
    batch_size: Annotated[int | None, _recipe_option("Images per step, on all processes.")] = None,
    lr: Annotated[float | None, _recipe_option("Peak learning rate.")] = None,
    lr_schedule: Annotated[str | None, _recipe_option("cosine or constant.")] = None,
    warmup: Annotated[int | None, _recipe_option("Steps in which the rate rises to lr.")] = None,
    weight_decay: Annotated[float | None, _recipe_option("AdamW's weight decay.")] = None,
    clip: Annotated[float | None, _recipe_option("Bound of the gradient's norm; 0: none.")] = None,
    ema: Annotated[float | None, _recipe_option("Decay of the averaged weights; 0: none.")] = None,
    label_dropout: Annotated[float | None, _recipe_option("Share of labels dropped.")] = None,
    T: Annotated[int | None, _recipe_option("Diffusion steps T.", "--diffusion-steps")] = None,
    schedule: Annotated[str | None, _recipe_option("linear, linear-scaled or cosine.")] = None,
    seed: Annotated[int | None, _recipe_option("Seed of data, weights, order, noise.")] = None,
    precision: Annotated[str, option("float32 or bfloat16 (autocast).")] = "float32",
    compile: Annotated[str, option("torch.compile: none, block or whole.")] = "none",
    checkpointing: Annotated[
        bool, option("Recompute blocks: less memory, more time.", "--checkpointing")
    ] = False,
    accumulate: Annotated[int, option("Parts in which a process computes its batch.", min=1)] = 1,
    strategy: Annotated[str, option("With several processes: ddp or fsdp.")] = "ddp",
    save_every: Annotated[int, option("Steps between checkpoints.", min=1)] = 100,
    keep: Annotated[int, option("Number of checkpoints to keep.", min=1)] = 2,
    log_every: Annotated[int, option("Steps between measurements.", min=1)] = 10,
    sample_every: Annotated[int, option("Steps between sample grids; 0: at the end.", min=0)] = 0,
    vae: Annotated[str | None, option("Autoencoder that decodes the samples of latents.")] = None,
    device: Device = None,
) -> None:
    """Train a DiT: the toy on coloured shapes, or any preset on latents.

    To share the work between processes: torchrun -m fastdit train.
    """
    arguments = locals()  # the recipe's options are named like its fields
    given: dict[str, Any] = {field.name: arguments[field.name] for field in fields(Recipe)}
    with plain_errors():
        where = device_of(device)
        with processes(where) as world:
            how = ("precision", "compile", "checkpointing", "accumulate", "strategy")
            runtime = Runtime(where, world=world, **{key: arguments[key] for key in how})
            options: dict = dict(out=out, runtime=runtime, save_every=save_every, keep=keep)
            saved = _find_saved(resume, out)
            resumed = saved is not None
            if new_data and (resume == "no" or data is None and per_class is None):
                raise ValueError(
                    "--new-data: expected --resume, and --data or --per-class, got none"
                )
            if saved is None:
                trainer = _start(data, per_class, model, origin, given, options)
            else:
                trainer = _continue(saved, (data, per_class, new_data), model, given, options)
                _check_same_origin(trainer, origin)
            del saved  # it maps its file, which would stay mapped during the run
            monitor = _make_monitor(trainer, vae, log_every, sample_every)
            if world.rank == 0 and resumed:
                print(f"resuming at step {trainer.step} of {trainer.recipe.steps}", file=sys.stderr)
                for change in trainer.changes:
                    print(describe(change), file=sys.stderr)
            with _stopped_by_signals(trainer) as received:
                result = trainer.run(monitor)
            if world.rank == 0:
                _report(out, trainer, result, monitor)
        if not result.finished:
            raise typer.Exit(128 + (received[0] if received else signal.SIGTERM))


def _start(
    data: Path | None,
    per_class: int | None,
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
    recipe = replace(RECIPES[name], **changes)
    source = _open(data, per_class, recipe.seed)
    if origin is None:
        return Trainer(_fitted_config(model or "toy", recipe, source), recipe, source, **options)
    if model is not None:
        raise ValueError("--model: expected none beside --from, which has a config of its own")
    RunFolder(options["out"]).check_unused()  # before a large file is read
    initial = _load_initial(origin, source)
    if recipe.label_dropout and not initial.cfg.null_class:
        got = f"{recipe.label_dropout}, but {origin} has no null class to learn from them"
        raise ValueError(f"--label-dropout: expected 0, got {got}")
    recipe = replace(recipe, **_diffusion_of(initial, origin, given))
    trainer = Trainer(initial.cfg, recipe, source, initial=initial, **options)
    assert trainer.origin is not None
    trainer.origin["path"] = str(origin.resolve())
    return trainer


def _load_initial(origin: Path, source: Source) -> DiT:
    """Return the model of --from, fitted to the data; load warns of what it made anew."""
    C, H, W = source.sample_shape
    conditional = inspect(origin).config.use_class_cond
    classes = len(source.label_names) if conditional else None
    return load(origin, num_classes=classes, img_size=H if H == W else (H, W), in_channels=C)


def _diffusion_of(model: DiT, origin: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Return T and schedule, as far as no option gives them, of the model's own diffusion.

    Raises:
        ValueError: the checkpoint does not tell them, or the model predicts no noise.
    """
    diffusion = model.diffusion or inspect(origin).diffusion or {}
    if (prediction := diffusion.get("prediction", "epsilon")) != "epsilon":
        why = "fastdit train trains models that predict the noise"
        raise ValueError(f"--from: {origin} predicts {prediction!r}; {why}")
    missing = [name for name in ("T", "schedule") if given[name] is None]
    if missing and not diffusion:
        flags = " and ".join(map(_flag, missing))
        raise ValueError(f"--from: {origin} does not tell its diffusion; pass {flags}")
    return {name: diffusion[name] for name in missing}


def _check_same_origin(trainer: Trainer, origin: Path | None) -> None:
    """Raise a ValueError if --from names another checkpoint than the run was started from."""
    if origin is None:
        return
    started = (trainer.origin or {}).get("path", "no checkpoint")
    if str(origin.resolve()) != started:
        why = "a run that goes on has weights of its own"
        raise ValueError(f"--from: the run was started from {started}, got {origin}; {why}")


def _open(data: Path | None, per_class: int | None, seed: int) -> Source:
    """Return the images that the options ask for."""
    if data is None:
        return Shapes(200 if per_class is None else per_class, seed)
    if per_class is not None:
        raise ValueError("--per-class: expected none beside --data")
    return Latents(data)


def _changes(given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the recipe that options set; a clip or ema of 0 means None."""
    changes = {field: value for field, value in given.items() if value is not None}
    return changes | {field: None for field in ("clip", "ema") if given[field] == 0}


def _fitted_config(model: str, recipe: Recipe, source: Source) -> DiTConfig:
    """Return a preset with the data's shape and classes, and a null class if labels are dropped."""
    if model not in PRESETS:
        raise unknown_name("--model", model, PRESETS)
    C, H, W = source.sample_shape
    classes, preset = len(source.label_names), PRESETS[model]
    null = preset.null_class or recipe.label_dropout > 0
    return replace(preset, in_channels=C, img_size=(H, W), num_classes=classes, null_class=null)


def _find_saved(resume: str, out: Path) -> Saved | None:
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


def _continue(
    saved: Saved,
    images: tuple[Path | None, int | None, bool],
    model: str | None,
    given: dict[str, Any],
    options: dict[str, Any],
) -> Trainer:
    """Return the trainer of a saved run, from now on with the options that differ.

    `images` are the values of --data, --per-class and --new-data.
    """
    data, per_class, new_data = images
    source = None
    if data is not None or new_data:
        seed = Recipe.from_dict(saved.header["recipe"], complete=True).seed
        source = _open(data, per_class, seed)
    try:
        trainer = Trainer.resume(
            saved, source=source, changes=_changes(given), new_data=new_data, **options
        )
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        if name not in given:
            raise
        raise ValueError(f"{_flag(name)}{colon}{rest}") from error
    fitted = None if model is None else _fitted_config(model, trainer.recipe, trainer.source)
    if fitted not in (None, trainer.config):
        why = "a run keeps its model's shape"
        raise ValueError(f"--model: the run was started with another one, got {model}; {why}")
    started = trainer.source.identity.get("per_class")
    if per_class not in (None, started):
        why = "--new-data goes on with other images"
        raise ValueError(f"--per-class: the run was started with {started}, got {per_class}; {why}")
    return trainer


def _flag(field: str) -> str:
    """Return the option that sets a field of the recipe."""
    return "--" + {"T": "diffusion-steps", "name": "recipe"}.get(field, field.replace("_", "-"))


def _make_monitor(trainer: Trainer, vae: str | None, log_every: int, sample_every: int) -> Monitor:
    """Return the monitor of a run; only the first process's writes files and shows progress."""
    runtime, showing = trainer.runtime, SHOWINGS[trainer.recipe.name]
    if isinstance(trainer.source, Shapes):
        if vae is not None:
            raise ValueError("--vae: expected none, since the coloured shapes are pixels")
        sample = shapes_sampler(trainer.config, trainer.scheduler, showing)
    elif vae is not None:
        decoder, channels = load_vae(vae, runtime.device), trainer.config.in_channels
        takes = latent_channels(decoder)
        if takes != channels:
            raise ValueError(f"--vae: it decodes {takes} channels, but the data have {channels}")
        sample = latents_sampler(trainer.config, trainer.scheduler, showing, decoder)
    elif sample_every:
        raise ValueError("--sample-every: expected --vae beside it to decode the samples, got none")
    else:
        sample = None
    first = runtime.world.rank == 0
    folder = trainer.folder if first else None
    return Monitor(
        folder, log_every=log_every, sample_every=sample_every, sample=sample, progress=first
    )


@contextmanager
def _stopped_by_signals(trainer: Trainer) -> Iterator[list[int]]:
    """Let the first SIGTERM or SIGINT save and end the run, and a later one act as it did before.

    A signal that follows at once is the same request, which reached the process both directly and
    through a launcher. A signal that the process ignores stays ignored, since a shell makes its
    background commands ignore SIGINT. The list that is yielded gets the numbers of the signals.
    """
    received: list[int] = []
    first = math.inf
    both = signal.SIGTERM, signal.SIGINT
    before = {n: own for n in both if (own := signal.getsignal(n)) != signal.SIG_IGN}

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal first
        received.append(number)
        trainer.request_stop()
        first = min(first, time.monotonic())
        if time.monotonic() > first + _SAME_REQUEST:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        restore()


def _report(out: Path, trainer: Trainer, result: TrainResult, monitor: Monitor) -> None:
    """Print how a run ended, or how to continue one that was stopped."""
    recipe = trainer.recipe
    if not result.finished:
        print(
            f"stopped at step {trainer.step} of {recipe.steps}, and saved; continue with fastdit "
            f"train --resume auto --out {shlex.quote(str(out))}",
            file=sys.stderr,
        )
        return
    print_losses(result, recipe, trainer.source, trainer.changes)
    if monitor.shown is not None and monitor.shown.measured:
        measured = ", ".join(f"{n} accuracy {v:.3f}" for n, v in monitor.shown.measured.items())
        print(f"{monitor.shown.number} samples: {measured}")
    print(f"wrote {RunFolder(out).weights}" + (f" and {monitor.grid}" if monitor.grid else ""))
