"""`fastdit sample`."""

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

from fastdit.checkpoints import CheckpointInfo, inspect, load
from fastdit.checkpoints.folders import weight_files
from fastdit.cli.common import DEFAULT_OUT, Device, device_of, option, plain_errors
from fastdit.config import DiTConfig
from fastdit.data.images import to_pixels, write_grid, write_latents, write_npz
from fastdit.data.latents import decode, digest, latent_channels, load_vae
from fastdit.data.shards import write_sharded_npz
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


def sample(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint that fastdit.load reads, or a run's weights.")
    ] = DEFAULT_OUT / WEIGHTS_FILE,
    labels: Annotated[
        str | None, option("Names or numbers, comma-separated.  [every class]")
    ] = None,
    count: Annotated[int, option("Images per label.", min=1)] = 4,
    seed: Annotated[int, option("The same seed, label and index always give the same image.")] = 0,
    out: Annotated[
        Path, option("A .png grid, or an .npz of uint8 NHWC pixels or of latents.")
    ] = Path("samples.png"),
    num_images: Annotated[
        int | None,
        option(
            "Images in all, in place of --count: the labels take turns, torchrun shares the "
            "batches between processes, and --out must be an .npz.",
            min=1,
        ),
    ] = None,
    batch_size: Annotated[int, option("Images sampled together.", min=1)] = 64,
    solver: Annotated[str, option(f"{', '.join(SOLVERS)}.")] = "ddpm",
    steps: Annotated[int | None, option("Sampling steps.  [every step of the training]")] = None,
    clip: Annotated[
        float | None,
        option("Clip the predicted image to [-clip, clip]; 1 for pixels.  [no clipping]"),
    ] = None,
    guidance_scale: Annotated[
        float | None, option("Classifier-free guidance; needs a model with a null class.")
    ] = None,
    guidance_channels: Annotated[
        int | None, option("Number of guided channels; 3 for published DiTs.  [all]", min=1)
    ] = None,
    dtype: Annotated[str | None, option(f"{', '.join(DTYPES)}.  [the weights']")] = None,
    execution: Annotated[
        str, option(f"{', '.join(EXECUTIONS)} or auto; `fastdit info` says what auto is.")
    ] = "auto",
    vae: Annotated[str | None, option("Folder or name of an AutoencoderKL to decode by.")] = None,
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
            raise ValueError(f"--vae: it decodes {takes} channels, but the model makes {makes}")
        if num_images is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("--num-images: expected with several processes, which share it")
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
                batches.append(_sample_batch(sampler, batch, seed, i, progress=True).cpu())
                bar.update(len(batch))
        images = torch.cat(batches)
        if decoder is not None:
            images = decode(decoder, images)
        _write(out, images, columns=count)
        print(f"wrote {len(rows)} images to {out}")


def _sample_batch(
    sampler: Sampler, labels: list[int], seed: int, first: int, progress: bool = False
) -> Tensor:
    """Sample images `first`, first + 1, ...: image i has stream i of the seed, or key seed + i."""
    if sampler.config is None or sampler.config.use_class_cond:
        return sampler(labels, seed, first_index=first, progress=progress)
    keys = range(seed + first, seed + first + len(labels))
    return sampler(None, seeds=keys, progress=progress)


def _sample_many(
    out: Path, sampler: Sampler, decoder: nn.Module | None, plan: dict[str, Any]
) -> None:
    """Sample `plan["num"]` images into one NPZ, on all processes together."""
    if out.suffix != ".npz":
        raise ValueError(f"--num-images: expected --out to end in .npz, got {out}")
    labels, size, seed = plan["labels"], plan["batch_size"], plan["seed"]
    pixels = decoder is not None or sampler.sample_shape[0] in PIXEL_CHANNELS

    def make(first: int) -> np.ndarray:
        rows = [labels[(first + i) % len(labels)] for i in range(size)]
        images = _sample_batch(sampler, rows, seed, first)
        if decoder is not None:
            images = decode(decoder, images)
        return to_pixels(images) if pixels else images.cpu().numpy()

    # After a stop one process may have most of its batches left while the others wait for it.
    with processes(timeout=timedelta(days=7)) as world:
        write_sharded_npz(out, make, plan, "arr_0" if pixels else "latents", world.rank, world.size)
        if world.rank == 0:
            print(f"wrote {plan['num']} images to {out}")


def _digest(checkpoint: Path) -> str:
    """Return a hash of a checkpoint's files."""
    content = hashlib.blake2b(digest_size=16)
    for path in weight_files(checkpoint):
        with open(path, "rb") as file:
            while block := file.read(2**24):
                content.update(block)
    return content.hexdigest()


def _write(out: Path, images: Tensor, columns: int) -> None:
    """Write a grid, or an NPZ of pixels or, where the images have other channels, of latents."""
    if out.suffix == ".png":
        write_grid(out, to_pixels(images), columns, zoom=max(1, 64 // max(images.shape[-2:])))
    elif images.shape[1] in PIXEL_CHANNELS:
        write_npz(out, to_pixels(images))
    else:
        write_latents(out, images)


def _inspect(checkpoint: Path, out: Path, decoded: bool) -> tuple[CheckpointInfo, dict[str, Any]]:
    """Return what the checkpoint holds and its diffusion, once its samples can be written."""
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out: expected a name that ends in .png or .npz, got {out}")
    if out.is_dir():
        raise ValueError(f"--out: expected a file's name, got the folder {out}")
    if not checkpoint.exists():
        advice = f"(a minute or two on a laptop), which writes {DEFAULT_OUT / WEIGHTS_FILE}"
        raise ValueError(
            f"{checkpoint}: no such checkpoint; make one with `fastdit train` {advice}"
        )
    found = inspect(checkpoint)
    if found.diffusion is None:
        advice = "save it again with fastdit.save(model, path, scheduler=...)"
        raise ValueError(f"{checkpoint}: it does not name its training's diffusion; {advice}")
    makes = found.config.in_channels
    if out.suffix == ".png" and not decoded and makes not in PIXEL_CHANNELS:
        advice = "expected --vae to decode them, or a name that ends in .npz"
        raise ValueError(f"--out: a PNG shows 1 or 3 channels, the model makes {makes}; {advice}")
    return found, found.diffusion


def parse_labels(text: str | None, names: Sequence[str] | None, config: DiTConfig) -> list[int]:
    """Return class numbers for comma-separated names and numbers; None means every class.

    An unconditional model has one class, 0, which cannot be named.

    Raises:
        ValueError: a name is unknown, a number is out of range, or the model has no classes.
    """
    if not config.use_class_cond:
        if text is not None:
            raise ValueError("--labels: expected none, since the model is unconditional")
        return [0]
    if text is None:
        return list(range(config.num_classes))
    # ImageNet has several names for a class ("tench, Tinca tinca"), and some names twice; a name
    # stands for the first class that has it.
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
            expected = f"a number in [0, {config.num_classes})" + " or a name" * bool(by_name)
            raise ValueError(f"--labels: expected {expected}, got {word!r}")
    return parsed
