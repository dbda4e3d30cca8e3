"""`fastdit sample`."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
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
from fastdit.checkpoints.latent_stats import read_latent_stats
from fastdit.checkpoints.matching import dit_config
from fastdit.checkpoints.runs import WEIGHTS_FILE, locate
from fastdit.cli.batches import Noise, parse_noise, sample_batch
from fastdit.cli.checkpoints import Diffusion, Heads, ImageSize, NullClass, Weights, answers
from fastdit.cli.common import (
    DEFAULT_OUT,
    Device,
    check_out,
    device_of,
    kept_shards,
    option,
    plain_errors,
)
from fastdit.cli.labels import parse_labels
from fastdit.cli.solvers import (
    Clip,
    Interval,
    Name,
    Shift,
    SolverOptions,
    Steps,
    parse_interval,
    parse_solver,
)
from fastdit.data.images import to_pixels, write_grid, write_latents, write_npz
from fastdit.data.latents import VAE_HELP, LatentStats, decode, digest, latent_channels, load_vae
from fastdit.data.shards import parts_of, write_sharded_npz
from fastdit.errors import unknown_name
from fastdit.flow import process_of
from fastdit.sampling.executions import EXECUTIONS
from fastdit.sampling.sampler import Sampler
from fastdit.train.distributed import processes
from fastdit.update import Guidance

DTYPES = ("float32", "bfloat16", "float16")
PIXEL_CHANNELS = (1, 3)
COUNT = 4
_FLAGS = {
    "guidance": "--guidance-scale",
    "guidance.channels": "--guidance-channels",
    "scale": "--guidance-scale",
    "channels": "--guidance-channels",
    "guidance.interval": "--guidance-interval",
    "interval": "--guidance-interval",
}


def sample(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(help="A run's folder, or a checkpoint that fastdit.load reads.")
    ] = DEFAULT_OUT / WEIGHTS_FILE,
    labels: Annotated[
        str | None, option("Names, or numbers from 0, comma-separated.  [every class]")
    ] = None,
    count: Annotated[int | None, option(f"Images per label.  [{COUNT}]", min=1)] = None,
    seed: Annotated[
        int, option("Seed of the noise; image i of a call, from 0, has the seed's stream i.")
    ] = 0,
    first_index: Annotated[
        int,
        option("Index of the first image, so that an image of a larger call is made again.", min=0),
    ] = 0,
    seeds: Annotated[
        str | None,
        option(
            "Seeds, comma-separated, in place of --seed and --count: an image of each label for "
            "each of them, which depends on these two alone."
        ),
    ] = None,
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
    solver: Name = None,
    steps: Steps = None,
    clip: Clip = None,
    shift: Shift = None,
    solver_options: SolverOptions = None,
    guidance_scale: Annotated[
        float | None,
        option("Scale of guidance by a null class: 1 is none, 0 samples without labels."),
    ] = None,
    guidance_channels: Annotated[
        int | None, option("Number of guided channels; 3 for published DiTs.  [all]", min=1)
    ] = None,
    guidance_interval: Interval = None,
    dtype: Annotated[str | None, option(f"{', '.join(DTYPES)}.  [the weights']")] = None,
    execution: Annotated[
        str, option(f"{', '.join(EXECUTIONS)} or auto; `fastdit info` says what auto is.")
    ] = "auto",
    vae: Annotated[str | None, option(f"The AutoencoderKL to decode by: {VAE_HELP}.")] = None,
    latent_stats: Annotated[
        Path | None,
        option(
            "File of the mean and deviation by which the training's latents were normalised, such "
            "as LightningDiT's latents_stats.pt; the autoencoder's own are written or decoded."
        ),
    ] = None,
    n_heads: Heads = None,
    null_class: NullClass = None,
    img_size: ImageSize = None,
    diffusion: Diffusion = None,
    weights: Weights = None,
    device: Device = None,
) -> None:
    """Sample images from a checkpoint."""
    with plain_errors(
        context,
        flags=_FLAGS,
        kept=lambda: _kept(out, num_images),
        less_memory="a smaller --batch-size needs less, and --num-images holds one batch at a time",
    ):
        _check_out(out, num_images)
        noise = parse_noise(seed, first_index, seeds, count, num_images)
        told = answers(n_heads, null_class, img_size, diffusion, weights)
        found, trained_on = _inspect(checkpoint, out, told, decoded=vae is not None)
        wanted = parse_labels(labels, found.labels, dit_config(checkpoint, found.config))
        where = device_of(device)
        if dtype is not None and dtype not in DTYPES:
            raise unknown_name("--dtype", dtype, DTYPES)
        process = process_of(trained_on)
        solver, chosen = parse_solver(solver, process, clip, shift, solver_options)
        guidance = _guidance(guidance_scale, guidance_channels, guidance_interval)
        sampler = Sampler(
            load(checkpoint, **told).to(where),
            process,
            chosen,
            steps,
            guidance=guidance,
            dtype=None if dtype is None else getattr(torch, dtype),
            execution=execution,
        )
        finish = _Finish(
            None if latent_stats is None else read_latent_stats(latent_stats),
            None if vae is None else load_vae(vae, where),
        )
        finish.check(found.config.in_channels)
        if num_images is None:
            _sample_grid(out, sampler, finish, wanted, noise, count, batch_size)
            return
        plan = dict(
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
            vae=finish.decoder and digest(finish.decoder),
            checkpoint=_digest(locate(checkpoint, weights)),
        )
        # An older release's shards have no such entries.
        later = dict(weights=told["weights"], diffusion=told["diffusion"])
        later |= dict(shift=shift, solver_options=solver_options)
        later["latent_stats"] = finish.stats and asdict(finish.stats)
        plan |= {name: value for name, value in later.items() if value is not None}
        if first_index:
            plan["first_index"] = first_index
        _sample_many(out, sampler, finish, noise, plan)


def _guidance(scale: float | None, channels: int | None, interval: str | None) -> Guidance | None:
    if scale is not None:
        return Guidance(scale, parse_interval(interval), channels)
    for flag, value in (("channels", channels), ("interval", interval)):
        if value is not None:
            raise ValueError(f"--guidance-{flag}: expected --guidance-scale beside it, got none")
    return None


@dataclass(frozen=True)
class _Finish:
    """What becomes of a model's samples before they are written."""

    stats: LatentStats | None
    decoder: nn.Module | None

    def check(self, channels: int) -> None:
        """Raise a ValueError unless both are for as many channels as the model makes."""
        takes = channels if self.decoder is None else latent_channels(self.decoder)
        if takes != channels:
            raise ValueError(f"--vae: it decodes {takes} channels, but the model makes {channels}")
        if self.stats is not None and len(self.stats.mean) != channels:
            got = f"{len(self.stats.mean)} channels, but the model makes {channels}"
            raise ValueError(f"--latent-stats: they are of {got}")

    def __call__(self, images: Tensor) -> Tensor:
        if self.stats is not None:
            images = self.stats.undo(images)
        if self.decoder is not None:
            # Statistics are of the autoencoder's own latents, which need no other scale.
            images = decode(self.decoder, images, scale=None if self.stats is None else 1.0)
        return images


def _sample_grid(
    out: Path,
    sampler: Sampler,
    finish: _Finish,
    labels: list[int],
    noise: Noise,
    count: int | None,
    size: int,
) -> None:
    """Sample `count` images of each label, or one for each of the seeds, and write them."""
    per_label = len(noise.seeds) or count or COUNT
    total = len(labels) * per_label
    noise.check(total)
    batches = []
    with tqdm(total=total, unit="image", disable=total <= size) as bar:
        for i in range(0, total, size):
            rows = [labels[j // per_label] for j in range(i, min(i + size, total))]
            batches.append(sample_batch(sampler, rows, noise, i, progress=True).cpu())
            bar.update(len(rows))
    images = finish(torch.cat(batches))
    _write(out, images, columns=per_label)
    print(f"wrote {total} image{'s' * (total > 1)} to {out}")


def _sample_many(
    out: Path, sampler: Sampler, finish: _Finish, noise: Noise, plan: dict[str, Any]
) -> None:
    """Sample `plan["num"]` images into one NPZ, on all processes together."""
    labels, size = plan["labels"], plan["batch_size"]
    noise.check(-(-plan["num"] // size) * size)
    pixels = finish.decoder is not None or sampler.sample_shape[0] in PIXEL_CHANNELS

    def make(first: int) -> np.ndarray:
        rows = [labels[(noise.first + first + i) % len(labels)] for i in range(size)]
        images = finish(sample_batch(sampler, rows, noise, first))
        return to_pixels(images) if pixels else images.cpu().numpy()

    # After a stop one process may have most of its batches left while the others wait for it.
    with processes(timeout=timedelta(days=7)) as world:
        write_sharded_npz(out, make, plan, "arr_0" if pixels else "latents", world.rank, world.size)
        if world.rank == 0:
            print(f"wrote {plan['num']} images to {out}")


def _kept(out: Path, num_images: int | None) -> str:
    """Say what an interrupted call has kept, and how to go on."""
    if num_images is None:
        return f"{out} was not written; with --num-images and an .npz, finished batches are kept"
    return kept_shards(parts_of(out))


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


def _check_out(out: Path, num_images: int | None) -> None:
    """Raise a ValueError for a file that could not be written in the end."""
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out: expected a name that ends in .png or .npz, got {out}")
    if out.is_dir():
        raise ValueError(f"--out: expected a file's name, got the folder {out}")
    if num_images is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--num-images: expected with several processes, which share it")
    if num_images is not None and out.suffix != ".npz":
        raise ValueError(f"--num-images: expected --out to end in .npz, got {out}")
    check_out(out)


def _inspect(
    checkpoint: Path, out: Path, told: dict[str, Any], decoded: bool
) -> tuple[CheckpointInfo, dict[str, Any]]:
    """Return what the checkpoint holds and its diffusion, once its samples can be written."""
    if not checkpoint.exists():
        advice = f"(a minute or two on a laptop), which writes {DEFAULT_OUT / WEIGHTS_FILE}"
        raise ValueError(
            f"{checkpoint}: no such checkpoint; make one with `fastdit train` {advice}"
        )
    found = inspect(checkpoint, **told)
    if found.diffusion is None:
        advice = "pass it: --diffusion flow for a SiT, --diffusion ddpm for a DiT"
        more = "or options such as --diffusion T=1000,schedule=linear"
        raise ValueError(
            f"{checkpoint}: it does not name its training's diffusion; {advice}, {more}"
        )
    makes = found.config.in_channels
    if out.suffix == ".png" and not decoded and makes not in PIXEL_CHANNELS:
        advice = "expected --vae to decode them, or a name that ends in .npz"
        raise ValueError(f"--out: a PNG shows 1 or 3 channels, the model makes {makes}; {advice}")
    return found, found.diffusion
