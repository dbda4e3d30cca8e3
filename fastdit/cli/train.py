"""`fastdit train`."""

from __future__ import annotations

import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from fastdit.checkpoints.runs import WEIGHTS_FILE
from fastdit.cli.checkpoints import parse_size
from fastdit.cli.common import DEFAULT_OUT, Device, check_out, device_of, option, plain_errors
from fastdit.cli.data import describe_data
from fastdit.cli.losses import print_losses
from fastdit.cli.trainers import ImageOptions, continue_run, find_saved, start_run
from fastdit.data.latents import SCALING, VAE_HELP, latent_channels, load_vae, scaling_factor
from fastdit.train.alignment import ALIGN_WEIGHT
from fastdit.train.changes import describe
from fastdit.train.distributed import processes
from fastdit.train.monitor import Monitor
from fastdit.train.recipe import RECIPES, SHOWINGS, Recipe
from fastdit.train.run_folder import RunFolder
from fastdit.train.runtime import Runtime
from fastdit.train.samples import latents_sampler, pixels_sampler, shapes_sampler
from fastdit.train.sources import Images, Shapes
from fastdit.train.trainer import Trainer, TrainResult

_SAME_REQUEST = 3.0  # seconds within which a second signal is taken for the first one


def _recipe_option(text: str, *names: str) -> Any:
    return option(f"{text}  [the recipe's]", *names)


def train(
    context: typer.Context,
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
    data: Annotated[
        Path | None,
        option(
            "Latents of `fastdit encode`; or pictures: a folder with one sub-folder per class, an "
            "NPZ file of uint8 arr_0, or a folder of Hugging Face's datasets.  [coloured shapes]"
        ),
    ] = None,
    image_size: Annotated[
        str | None,
        option("Size to which the pictures of --data are cropped and scaled: 32, or 32x64."),
    ] = None,
    flip: Annotated[
        bool | None, option("Mirror pictures at random.  [flip]", "--flip/--no-flip")
    ] = None,
    skip_bad: Annotated[
        bool, option("Leave out pictures that cannot be read.", "--skip-bad")
    ] = False,
    cache: Annotated[
        Path | None, option("Folder for the pixels of pictures.  [images, in --out]")
    ] = None,
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
    beta2: Annotated[float | None, _recipe_option("AdamW's decay of squared gradients.")] = None,
    path: Annotated[str | None, _recipe_option("A flow's: linear, gvp or vp.")] = None,
    prediction: Annotated[
        str | None, _recipe_option("A flow's: velocity, epsilon, sample or score.")
    ] = None,
    clean_at: Annotated[int | None, _recipe_option("A flow's time at the data, 1 or 0.")] = None,
    time_scale: Annotated[float | None, _recipe_option("Factor of embedded times.")] = None,
    noise_scale: Annotated[float | None, _recipe_option("Deviation of a flow's noise.")] = None,
    min_noise: Annotated[
        float | None, _recipe_option("Least divisor of a predicted image's error; 0: none.")
    ] = None,
    time_draw: Annotated[
        str | None, _recipe_option("A flow's times: uniform or logit-normal.")
    ] = None,
    time_mean: Annotated[
        float | None, _recipe_option("The normal's mean; below 0 draws more noise.")
    ] = None,
    time_deviation: Annotated[float | None, _recipe_option("The normal's deviation.")] = None,
    time_shift: Annotated[
        float | None, _recipe_option("Shift of a flow's times; below 1: towards noise.")
    ] = None,
    direction_loss: Annotated[
        float | None, _recipe_option("Weight of the loss of a velocity's direction.")
    ] = None,
    features: Annotated[
        Path | None,
        option(
            "An encoder's features of the images, with which a hidden state is aligned: .npy or "
            ".safetensors of [images, tokens, width]."
        ),
    ] = None,
    align_weight: Annotated[
        float | None, option(f"Weight of that alignment.  [{ALIGN_WEIGHT}]")
    ] = None,
    align_depth: Annotated[int | None, _recipe_option("Blocks before the aligned state.")] = None,
    align_width: Annotated[int | None, _recipe_option("Width of its projector.")] = None,
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
    vae: Annotated[
        str | None, option(f"The AutoencoderKL that decodes samples of latents: {VAE_HELP}.")
    ] = None,
    device: Device = None,
) -> None:
    """Train a DiT on coloured shapes, pictures or latents.

    To share the work between processes: torchrun -m fastdit train.
    """
    arguments = locals()  # the recipe's options are named like its fields
    given: dict[str, Any] = {field.name: arguments[field.name] for field in fields(Recipe)}
    with plain_errors(
        context,
        flags={"model": None},  # which is the trained one, where the trainer speaks of it
        kept=lambda: _kept(out),
        less_memory=f"--accumulate {2 * accumulate} computes a step's batch in smaller parts, and "
        "--checkpointing keeps less of each",
    ):
        check_out(out, WEIGHTS_FILE)
        where = device_of(device)
        with processes(where) as world:
            how = ("precision", "compile", "checkpointing", "accumulate", "strategy")
            runtime = Runtime(where, world=world, **{key: arguments[key] for key in how})
            options: dict = dict(out=out, runtime=runtime, save_every=save_every, keep=keep)
            size = None if image_size is None else parse_size("--image-size", image_size)
            pictures: dict = dict(image_size=size, flip=flip, skip_bad=skip_bad)
            pictures |= dict(cache=cache or out / "images", rank=world.rank, world=world.size)
            images = ImageOptions(data, per_class, new_data, pictures, features)
            saved = find_saved(resume, out)
            resumed = saved is not None
            if new_data and (resume == "no" or data is None and per_class is None):
                raise ValueError(
                    "--new-data: expected --resume, and --data or --per-class, got none"
                )
            if saved is None:
                trainer = start_run(images, model, origin, given, options)
            else:
                trainer = continue_run(saved, images, model, origin, given, options)
            del saved  # it maps its file, which would stay mapped during the run
            monitor = _make_monitor(trainer, vae, log_every, sample_every)
            if world.rank == 0 and resumed:
                print(f"resuming at step {trainer.step} of {trainer.recipe.steps}", file=sys.stderr)
                for change in trainer.changes:
                    print(describe(change), file=sys.stderr)
            if world.rank == 0 and (found := describe_data(trainer.source, trainer.recipe)):
                print(f"data: {found}", file=sys.stderr)
            with _stopped_by_signals(trainer) as received:
                result = trainer.run(monitor)
            if world.rank == 0:
                _report(out, trainer, result, monitor)
        if not result.finished:
            raise typer.Exit(128 + (received[0] if received else signal.SIGTERM))


def _make_monitor(trainer: Trainer, vae: str | None, log_every: int, sample_every: int) -> Monitor:
    """Return the monitor of a run; only the first process's writes files and shows progress."""
    runtime, showing = trainer.runtime, SHOWINGS[trainer.recipe.name]
    if isinstance(trainer.source, Shapes):
        if vae is not None:
            raise ValueError("--vae: expected none, since the coloured shapes are pixels")
        sample = shapes_sampler(trainer.config, trainer.scheduler, showing)
    elif isinstance(trainer.source, Images):
        if vae is not None:
            raise ValueError("--vae: expected none, since the pictures of --data are pixels")
        sample = pixels_sampler(trainer.config, trainer.scheduler, showing)
    elif vae is not None:
        decoder, channels = load_vae(vae, runtime.device), trainer.config.in_channels
        takes = latent_channels(decoder)
        if takes != channels:
            raise ValueError(f"--vae: it decodes {takes} channels, but the data have {channels}")
        scaled, scales = getattr(trainer.source, SCALING, None), scaling_factor(decoder)
        if scaled not in (None, scales):
            raise ValueError(f"--vae: it scales latents by {scales}, but the data by {scaled}")
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


def _kept(out: Path) -> str:
    """Say what a run that could not save any more has kept, and how to continue it."""
    saved = RunFolder(out).checkpoints()
    if not saved:
        return "no checkpoint was written"
    return f"{saved[-1][1]} is kept; {_how_to_continue(out)}"


def _how_to_continue(out: Path) -> str:
    return f"continue with fastdit train --resume auto --out {shlex.quote(str(out))}"


def _report(out: Path, trainer: Trainer, result: TrainResult, monitor: Monitor) -> None:
    """Print how a run ended, or how to continue one that was stopped."""
    recipe = trainer.recipe
    if not result.finished:
        where = f"step {trainer.step} of {recipe.steps}"
        print(f"stopped at {where}, and saved; {_how_to_continue(out)}", file=sys.stderr)
        return
    print_losses(result, recipe, trainer.source, trainer.changes)
    if monitor.shown is not None and monitor.shown.measured:
        measured = ", ".join(f"{n} accuracy {v:.3f}" for n, v in monitor.shown.measured.items())
        print(f"{monitor.shown.number} samples: {measured}")
    print(f"wrote {RunFolder(out).weights}" + (f" and {monitor.grid}" if monitor.grid else ""))
