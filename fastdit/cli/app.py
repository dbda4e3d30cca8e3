"""The command line: `fastdit train`, `sample`, `encode`, `convert` and `info`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from tqdm import tqdm

from fastdit.checkpoints.foreign import weight_files
from fastdit.checkpoints.native import CheckpointInfo, inspect, load
from fastdit.cli.common import DEFAULT_OUT, Device, device_of, plain_errors
from fastdit.cli.models import convert, encode, info
from fastdit.cli.train import train
from fastdit.config import DiTConfig
from fastdit.data.images import to_pixels, write_grid, write_latents, write_npz
from fastdit.data.latents import decode, digest, latent_channels, load_vae
from fastdit.data.shards import write_many
from fastdit.diffusion import DiffusionScheduler
from fastdit.errors import unknown_name
from fastdit.sampling.executions import EXECUTIONS
from fastdit.sampling.sampler import Sampler
from fastdit.solvers import SOLVERS
from fastdit.train.distributed import processes
from fastdit.train.run_folder import WEIGHTS_FILE
from fastdit.update import Guidance

DTYPES = ("float32", "bfloat16", "float16")
PIXEL_CHANNELS = (1, 3)

app = typer.Typer(
    help="Train and sample Diffusion Transformers.",
    no_args_is_help=True,
    rich_markup_mode=None,  # it would read "[linear]" in a help text as markup
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(convert)
app.command()(info)
app.command()(encode)


@app.command()
def sample(
    checkpoint: Annotated[
        Path, typer.Argument(help="Weights that fastdit.load reads, such as fastdit train's.")
    ] = DEFAULT_OUT / WEIGHTS_FILE,
    labels: Annotated[
        str | None, typer.Option(help="Names or numbers, comma-separated.  [every class]")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images of each label.")] = 4,
    seed: Annotated[int, typer.Option(help="Image i of a seed and label is always the same.")] = 0,
    out: Annotated[Path, typer.Option(help=".png, or .npz of uint8 NHWC, or of latents.")] = Path(
        "samples.png"
    ),
    num_images: Annotated[
        int | None,
        typer.Option(min=1, help="So many images, labels in turn; torchrun shares them; .npz."),
    ] = None,
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
        str, typer.Option(help=f"{', '.join(EXECUTIONS)}, or auto, which `fastdit info` explains.")
    ] = "auto",
    vae: Annotated[
        str | None, typer.Option(help="Folder or name of the AutoencoderKL that decodes latents.")
    ] = None,
    device: Device = None,
) -> None:
    """Sample images from a checkpoint."""
    with plain_errors():
        found, diffusion = _inspect(checkpoint, out, decoded=vae is not None)
        wanted = parse_labels(labels, found.labels, found.config)
        where = device_of(device)
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
        decoder = None if vae is None else load_vae(vae, where)
        takes, makes = decoder and latent_channels(decoder), found.config.in_channels
        if takes not in (None, makes):
            raise ValueError(f"--vae: it decodes {takes} channels, the model makes {makes}")
        if num_images is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("--num-images: processes share images only where it is given")
        if num_images is not None:
            options = dict(
                num=num_images,
                batch_size=batch_size,
                labels=wanted,
                seed=seed,
                solver=solver,
                steps=steps,
                clip=clip,
                guidance=guidance and asdict(guidance),
                dtype=dtype,
                execution=sampler.execution_for(),
                vae=decoder and digest(decoder),
                checkpoint=_digest(checkpoint),
            )
            _sample_many(out, sampler, decoder, options)
            return
        rows = [label for label in wanted for _ in range(count)]
        batches = []
        with tqdm(total=len(rows), unit="image", disable=len(rows) <= batch_size) as bar:
            for i in range(0, len(rows), batch_size):
                batch = rows[i : i + batch_size]
                batches.append(_sampled(sampler, batch, seed, i, progress=True).cpu())
                bar.update(len(batch))
        images = torch.cat(batches)
        if decoder is not None:
            images = decode(decoder, images)
        _write(out, images, columns=count)
        print(f"wrote {len(rows)} images to {out}")


def _sampled(
    sampler: Sampler, labels: list[int], seed: int, first: int, progress: bool = False
) -> Tensor:
    """The images from a global index on; image i has stream i of the seed, or key seed + i."""
    if sampler.config is None or sampler.config.use_class_cond:
        return sampler(labels, seed, first_index=first, progress=progress)
    keys = range(seed + first, seed + first + len(labels))
    return sampler(None, seeds=keys, progress=progress)


def _sample_many(
    out: Path, sampler: Sampler, decoder: nn.Module | None, plan: dict[str, Any]
) -> None:
    if out.suffix != ".npz":
        raise ValueError(f"--num-images: expected --out to end in .npz, got {out}")
    labels, size, seed = plan["labels"], plan["batch_size"], plan["seed"]
    pixels = decoder is not None or sampler.sample_shape[0] in PIXEL_CHANNELS

    def make(first: int) -> np.ndarray:
        rows = [labels[(first + i) % len(labels)] for i in range(size)]
        images = _sampled(sampler, rows, seed, first)
        if decoder is not None:
            images = decode(decoder, images)
        return to_pixels(images) if pixels else images.cpu().numpy()

    # A process may have most left to do while the others are done, after a stop.
    with processes(timeout=timedelta(days=7)) as world:
        write_many(out, make, plan, "arr_0" if pixels else "latents", world.rank, world.size)
        if world.rank == 0:
            print(f"wrote {plan['num']} images to {out}")


def _digest(checkpoint: Path) -> str:
    """What tells one checkpoint's contents from another's."""
    content = hashlib.blake2b(digest_size=16)
    for path in weight_files(checkpoint):
        with open(path, "rb") as file:
            while block := file.read(2**24):
                content.update(block)
    return content.hexdigest()


def _write(out: Path, images: Tensor, columns: int) -> None:
    """A grid, pixels, or latents where the images are no pixels."""
    if out.suffix == ".png":
        zoom = max(1, 64 // images.shape[-1])
        write_grid(out, to_pixels(images), columns, zoom)
    elif images.shape[1] in PIXEL_CHANNELS:
        write_npz(out, to_pixels(images))
    else:
        write_latents(out, images)


def _inspect(checkpoint: Path, out: Path, decoded: bool) -> tuple[CheckpointInfo, dict[str, Any]]:
    """What the checkpoint says of itself, and its diffusion, where its samples can go to `out`."""
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out: expected a name that ends in .png or .npz, got {out}")
    if out.is_dir():
        raise ValueError(f"--out: expected a file's name, got the folder {out}")
    if not checkpoint.exists():
        raise ValueError(
            f"{checkpoint}: no such checkpoint; make one with `fastdit train` (a minute or two "
            f"on a laptop), which writes {DEFAULT_OUT / WEIGHTS_FILE}"
        )
    found = inspect(checkpoint)
    if found.diffusion is None:
        raise ValueError(
            f"{checkpoint}: it does not say which diffusion it was trained on; save it again "
            "with fastdit.save(model, path, scheduler=...)"
        )
    if out.suffix == ".png" and not decoded and found.config.in_channels not in PIXEL_CHANNELS:
        raise ValueError(
            f"--out: a PNG shows 1 or 3 channels, the model makes {found.config.in_channels}; "
            "expected --vae to decode them, or a name that ends in .npz"
        )
    return found, found.diffusion


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
    # ImageNet's have several words for one class: "tench, Tinca tinca". The first class keeps one.
    by_name: dict[str, int] = {}
    for i, name in enumerate(names or ()):
        for word in name.split(","):
            by_name.setdefault(word.strip().lower(), i)
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
