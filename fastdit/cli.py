"""The command line: `fastdit train`, `sample`, `convert` and `info`."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from fastdit import work
from fastdit.checkpoint import SAVED_LAYOUTS, CheckpointInfo, inspect, load, save
from fastdit.config import PRESETS, DiTConfig
from fastdit.data import COLOURS, LABEL_NAMES, judge
from fastdit.diffusion import DiffusionScheduler
from fastdit.errors import unknown_name
from fastdit.images import to_pixels, write_grid, write_latents, write_npz
from fastdit.latents import decode, load_vae
from fastdit.model import DiT
from fastdit.sampler import Sampler
from fastdit.solvers import SOLVERS, Guidance
from fastdit.train import PUBLISHED_LOSS, RESUME_FILE, WEIGHTS_FILE, Recipe, Trainer, TrainResult

DEFAULT_OUT = Path("runs/toy")
GRID_FILE = "samples.png"
JUDGED_PER_CLASS = 10
SHOWN_PER_CLASS = 4
DTYPES = ("float32", "bfloat16", "float16")
PIXEL_CHANNELS = (1, 3)

app = typer.Typer(
    help="Train and sample Diffusion Transformers.",
    no_args_is_help=True,
    rich_markup_mode=None,  # it would read "[linear]" in a help text as markup
    add_completion=False,
    pretty_exceptions_enable=False,
)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Errors and warnings a user can act on are one line on stderr, without a traceback."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        warnings.simplefilter("default", UserWarning)
        try:
            yield
        except (ValueError, OSError, FloatingPointError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from error


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("meta"):
        raise ValueError(f"--device: expected one that computes, got {name}")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:  # as torch's builds differ
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: expected one that is here, got {name} ({reason})") from error


Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU if there is one.")]


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for weights, resume file, samples.")] = (
        DEFAULT_OUT
    ),
    resume: Annotated[bool, typer.Option(help="Continue the run in --out, bit for bit.")] = False,
    epochs: Annotated[int | None, typer.Option(help="Passes over the set.  [30]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a step.  [128]")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.  [5e-4]")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="linear, linear-scaled or cosine.  [linear]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of data, weights, order, noise.  [0]")] = None,
    per_class: Annotated[int | None, typer.Option(help="Images of each class.  [200]")] = None,
    save_every: Annotated[int, typer.Option(help="Steps between two saves.")] = 100,
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    device: Device = None,
) -> None:
    """Train the toy DiT on the coloured shapes, then show what it learned."""
    given: dict[str, Any] = dict(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        schedule=schedule,
        seed=seed,
        per_class=per_class,
    )
    given = {name: value for name, value in given.items() if value is not None}
    with _plain_errors():
        options: dict[str, Any] = dict(
            device=_device(device), compile=compile, save_every=save_every
        )
        if resume:
            trainer = _resume(out, given, options)
        else:
            trainer = Trainer(DiTConfig(), Recipe(**given), out, **options)
        try:
            result = trainer.run(progress=True)
        except KeyboardInterrupt:
            print(f"interrupted; continue with fastdit train --resume --out {out}", file=sys.stderr)
            raise typer.Exit(130) from None
        print_losses(result, trainer.recipe)
        _show_samples(out, result, trainer.scheduler)


def _resume(out: Path, given: dict[str, Any], options: dict[str, Any]) -> Trainer:
    if not (out / RESUME_FILE).exists():
        raise ValueError(f"--resume: {out} holds no run to continue; leave --resume out to start")
    trainer = Trainer.resume(out, **options)
    for name, value in given.items():
        started = getattr(trainer.recipe, name)
        if value != started:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: the run was started with {started}, got {value}")
    print(f"resuming at step {trainer.step} of {trainer.total_steps}", file=sys.stderr)
    return trainer


def print_losses(result: TrainResult, recipe: Recipe) -> None:
    """The loss by epoch, beside the published one where the recipe is the published one's."""
    comparable = replace(recipe, seed=Recipe.seed) == Recipe()
    print("epoch   loss" + "     published for this recipe, on another drawing" * comparable)
    last = len(result.epoch_losses)
    for epoch in sorted({*PUBLISHED_LOSS, last}):
        if epoch <= last:
            beside = f"   {PUBLISHED_LOSS[epoch]:.4f}" if comparable else ""
            print(f"{epoch:5d}   {result.epoch_losses[epoch - 1]:.4f}{beside}")
    if not math.isnan(result.images_per_second):
        print(
            f"{result.images_per_second:.0f} images/s after a first step of "
            f"{result.first_step_seconds:.1f} s"
        )


def _show_samples(out: Path, result: TrainResult, scheduler: DiffusionScheduler) -> None:
    labels = torch.arange(len(LABEL_NAMES)).repeat_interleave(JUDGED_PER_CLASS)
    images = Sampler(result.model, scheduler)(labels, progress=True)
    accuracy = judge(images, labels)
    shown = images.view(len(LABEL_NAMES), -1, *images.shape[1:])[:, :SHOWN_PER_CLASS].flatten(0, 1)
    columns = len(shown) // len(COLOURS)  # one row a colour
    write_grid(out / GRID_FILE, to_pixels(shown), columns, zoom=3)
    print(
        f"{len(labels)} samples: colour accuracy {accuracy.colour:.3f}, "
        f"shape accuracy {accuracy.shape:.3f}"
    )
    print(f"wrote {out / WEIGHTS_FILE} and {out / GRID_FILE}")


@app.command()
def sample(
    checkpoint: Annotated[
        Path, typer.Argument(help="Weights that fastdit train or fastdit.save wrote.")
    ] = DEFAULT_OUT / WEIGHTS_FILE,
    labels: Annotated[
        str | None, typer.Option(help="Names or numbers, comma-separated.  [every class]")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images of each label.")] = 4,
    seed: Annotated[int, typer.Option(help="Image i of a seed and label is always the same.")] = 0,
    out: Annotated[Path, typer.Option(help=".png, or .npz of uint8 NHWC, or of latents.")] = Path(
        "samples.png"
    ),
    batch_size: Annotated[int, typer.Option(min=1, help="Images sampled together.")] = 64,
    solver: Annotated[str, typer.Option(help=f"{', '.join(SOLVERS)}.")] = "ddpm",
    steps: Annotated[
        int | None, typer.Option(help="Of the solver.  [all it was trained on]")
    ] = None,
    clip: Annotated[
        float | None, typer.Option(help="Bound of the predicted image; 1 for pixels.  [none]")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; needs a null class.")
    ] = None,
    guidance_channels: Annotated[
        int | None, typer.Option(min=1, help="Guide so many channels; published DiTs: 3.  [all]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16.  [the checkpoint's]")
    ] = None,
    execution: Annotated[
        str, typer.Option(help="eager, compile, graph, or auto: graph on CUDA, else eager.")
    ] = "auto",
    vae: Annotated[
        str | None, typer.Option(help="Folder or name of the AutoencoderKL that decodes latents.")
    ] = None,
    device: Device = None,
) -> None:
    """Sample images from a checkpoint."""
    with _plain_errors():
        info, diffusion = _inspect(checkpoint, out, decoded=vae is not None)
        wanted = parse_labels(labels, info.labels, info.config)
        where = _device(device)
        decoder = None if vae is None else load_vae(vae, where)
        if dtype is not None and dtype not in DTYPES:
            raise unknown_name("--dtype", dtype, DTYPES)
        if solver not in SOLVERS:
            raise unknown_name("--solver", solver, SOLVERS)
        guidance = None
        if guidance_scale is not None:
            guidance = Guidance(guidance_scale, channels=guidance_channels)
        elif guidance_channels is not None:
            raise ValueError("--guidance-channels: expected --guidance-scale beside it, got none")
        sampler = Sampler(
            load(checkpoint).to(where),
            DiffusionScheduler(**diffusion),
            replace(SOLVERS[solver], clip=clip),
            steps,
            guidance=guidance,
            dtype=None if dtype is None else getattr(torch, dtype),
            execution=execution,
        )
        rows = [label for label in wanted for _ in range(count)]
        images = torch.cat(list(_sampled(sampler, rows, seed, batch_size)))
        if decoder is not None:
            images = decode(decoder, images)
        _write(out, images, columns=count)
        print(f"wrote {len(rows)} images to {out}")


def _sampled(sampler: Sampler, rows: list[int], seed: int, batch_size: int) -> Iterator[Tensor]:
    """Images of labels in batches, [B, C, H, W] each, on the CPU; image i has stream i."""
    conditional = sampler.config is None or sampler.config.use_class_cond
    with tqdm(total=len(rows), unit="image", disable=len(rows) <= batch_size) as bar:
        for i in range(0, len(rows), batch_size):
            batch = rows[i : i + batch_size]
            if conditional:
                images = sampler(batch, seed, first_index=i, progress=True)
            else:
                keys = range(seed + i, seed + i + len(batch))
                images = sampler(None, seeds=keys, progress=True)
            yield images.cpu()
            bar.update(len(batch))


def _write(out: Path, images: Tensor, columns: int) -> None:
    """A grid, pixels, or latents where the images are no pixels."""
    if out.suffix == ".png":
        zoom = max(1, 64 // images.shape[-1])
        write_grid(out, to_pixels(images), columns, zoom)
    elif images.shape[1] in PIXEL_CHANNELS:
        write_npz(out, to_pixels(images))
    else:
        write_latents(out, images)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint of fastdit or of facebookresearch/DiT (.pt).")
    ],
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    layout: Annotated[str, typer.Option(help=f"{' or '.join(SAVED_LAYOUTS)}.")] = SAVED_LAYOUTS[0],
    n_heads: Annotated[
        int | None, typer.Option(min=1, help="Where shapes do not tell it.  [the published]")
    ] = None,
) -> None:
    """Rewrite a checkpoint in another layout, to the bit."""
    with _plain_errors():
        info, model = inspect(source, n_heads=n_heads), load(source, n_heads=n_heads)
        cfg = model.cfg
        if layout == SAVED_LAYOUTS[0]:
            scheduler = DiffusionScheduler(**info.diffusion) if info.diffusion else None
            save(model, out, scheduler, info.labels)
        else:
            save(model, out, layout=layout)
        print(
            f"wrote {out}: {cfg.n_layers} layers of width {cfg.hidden} with {cfg.n_heads} heads, "
            f"{cfg.num_classes} classes, images of {' x '.join(map(str, cfg.sample_shape))} in "
            f"patches of {cfg.patch_size}"
        )


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="A checkpoint, or a preset such as DiT-XL/2.")],
    n_heads: Annotated[
        int | None, typer.Option(min=1, help="Where shapes do not tell it.  [the published]")
    ] = None,
    tflops: Annotated[
        float, typer.Option(min=1e-3, help="A device's bf16 matrix products, TFLOP/s.")
    ] = 790.0,
    gbps: Annotated[
        float, typer.Option(min=1e-3, help="Its copies, read and written, GB/s.")
    ] = 4300,
) -> None:
    """Say what a model is, what a forward takes, and how fast a device could be at it.

    The default rates are those measured on an H200.
    """
    with _plain_errors():
        if model in PRESETS:
            found = CheckpointInfo(PRESETS[model])
        elif Path(model).exists():
            found = inspect(Path(model), n_heads=n_heads)
        else:
            raise ValueError(f"{unknown_name('model', model, PRESETS)}, or an existing file")
        cfg = found.config
        for field, value in cfg.to_dict().items():
            print(f"{field:16} {value}")
        if found.diffusion is not None:
            print(f"{'diffusion':16} {', '.join(f'{k} {v}' for k, v in found.diffusion.items())}")
        with torch.device("meta"):
            parameters = sum(p.numel() for p in DiT.from_config(cfg).parameters())
        print(f"{'parameters':16} {parameters:,}")
        print(f"{'memory':16} {parameters * 2 / 2**20:,.0f} MiB in bfloat16, twice in float32")
        print(f"{'forward':16} {work.flop(cfg, 1) / 1e9:,.2f} GFLOP an image\n")
        print(f"floor of a bfloat16 step at {tflops:g} TFLOP/s and {gbps:g} GB/s")
        print("rows   ms a step   rows/s")
        for rows in (1, 2, 8, 32, 128):
            seconds = work.floor_seconds(cfg, rows, 2, tflops * 1e12, gbps * 1e9)
            print(f"{rows:4d} {seconds * 1e3:11.3f} {rows / seconds:8.0f}")


def _inspect(checkpoint: Path, out: Path, decoded: bool) -> tuple[CheckpointInfo, dict[str, Any]]:
    """What the checkpoint says of itself, and its diffusion, where its samples can go to `out`."""
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out: expected a name that ends in .png or .npz, got {out}")
    if not checkpoint.is_file():
        raise ValueError(
            f"{checkpoint}: no such checkpoint; make one with `fastdit train` (a minute or two "
            f"on a laptop), which writes {DEFAULT_OUT / WEIGHTS_FILE}"
        )
    info = inspect(checkpoint)
    if info.diffusion is None:
        raise ValueError(
            f"{checkpoint}: it does not say which diffusion it was trained on; save it again "
            "with fastdit.save(model, path, scheduler=...)"
        )
    if out.suffix == ".png" and not decoded and info.config.in_channels not in PIXEL_CHANNELS:
        raise ValueError(
            f"--out: a PNG shows 1 or 3 channels, the model makes {info.config.in_channels}; "
            "expected --vae to decode them, or a name that ends in .npz"
        )
    return info, info.diffusion


def parse_labels(text: str | None, names: Sequence[str] | None, config: DiTConfig) -> list[int]:
    """Class numbers from comma-separated names and numbers; None means every class.

    An unconditional model has one class, 0, that is not named.

    Raises:
        ValueError: a name is unknown or a number out of range, or the model has no classes.
    """
    if not config.use_class_cond:
        if text is not None:
            raise ValueError("--labels: expected none, since the model is unconditional")
        return [0]
    if text is None:
        return list(range(config.num_classes))
    by_name = {name.lower(): i for i, name in enumerate(names or ())}
    parsed = []
    for word in text.split(","):
        word = word.strip().lower()
        if word.isdecimal() and int(word) < config.num_classes:
            parsed.append(int(word))
        elif word in by_name:
            parsed.append(by_name[word])
        elif by_name and not word.lstrip("-").isdecimal():
            raise unknown_name("--labels", word, by_name)
        else:
            raise ValueError(
                f"--labels: expected a number in [0, {config.num_classes})"
                f"{' or a name' if by_name else ''}, got {word!r}"
            )
    return parsed


if __name__ == "__main__":
    app()
