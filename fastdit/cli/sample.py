"""`fastdit sample`."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tqdm import tqdm

from fastdit.checkpoints import CheckpointInfo, inspect, load
from fastdit.checkpoints.latent_stats import read_latent_stats
from fastdit.checkpoints.runs import WEIGHTS_FILE, locate
from fastdit.cli.batches import Noise, parse_noise, sample_batch
from fastdit.cli.checkpoints import (
    Diffusion,
    Heads,
    ImageSize,
    NullClass,
    TextTokens,
    Weights,
    answers,
)
from fastdit.cli.common import (
    DEFAULT_OUT,
    Device,
    device_of,
    option,
    plain_errors,
)
from fastdit.cli.labels import parse_labels
from fastdit.cli.outputs import (
    PIXEL_CHANNELS,
    Finish,
    check_file,
    digest_of_files,
    what_is_kept,
    write_images,
)
from fastdit.cli.prompts import (
    PIXART_SCALE,
    SD3_SCALE,
    NegativePrompt,
    Prompt,
    PromptFile,
    SampleOptions,
    Size,
    TextDtype,
    TextEncoderFolder,
    TextOptions,
    refuse_label_options,
    sample_prompts,
)
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
from fastdit.config import DiTConfig
from fastdit.data.images import to_pixels
from fastdit.data.latents import VAE_HELP, digest, load_vae
from fastdit.data.shards import write_sharded_npz
from fastdit.errors import unknown_name
from fastdit.flow import process_of
from fastdit.sampling.executions import EXECUTIONS
from fastdit.sampling.sampler import Sampler
from fastdit.train.distributed import processes
from fastdit.update import Guidance

DTYPES = ("float32", "bfloat16", "float16")
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
    prompt: Prompt = None,
    prompts: PromptFile = None,
    negative_prompt: NegativePrompt = None,
    labels: Annotated[
        str | None, option("Names, or numbers from 0, comma-separated.  [every class]")
    ] = None,
    count: Annotated[
        int | None, option(f"Images per label or prompt.  [{COUNT}, or 1 of a prompt]", min=1)
    ] = None,
    seed: Annotated[
        int,
        option(
            "Seed of the noise; image i of a call, from 0, has the seed's stream i. Image i of a "
            "prompt has the seed SEED + i, and depends on prompt and seed alone."
        ),
    ] = 0,
    first_index: Annotated[
        int,
        option("Index of the first image, so that an image of a larger call is made again.", min=0),
    ] = 0,
    seeds: Annotated[
        str | None,
        option(
            "Seeds, comma-separated, in place of --seed and --count: an image of each label or "
            "prompt for each of them, which depends on these two alone."
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
    size: Size = None,
    batch_size: Annotated[int, option("Images sampled together.", min=1)] = 64,
    solver: Name = None,
    steps: Steps = None,
    clip: Clip = None,
    shift: Shift = None,
    solver_options: SolverOptions = None,
    guidance_scale: Annotated[
        float | None,
        option(
            "Scale of guidance by a null class, or of a prompt by the negative prompt: 1 is none, "
            "0 samples without labels.  "
            f"[1; {PIXART_SCALE:g} of a PixArt, {SD3_SCALE:g} of an MMDiT]"
        ),
    ] = None,
    guidance_channels: Annotated[
        int | None, option("Number of guided channels; 3 for published DiTs.  [all]", min=1)
    ] = None,
    guidance_interval: Interval = None,
    dtype: Annotated[str | None, option(f"{', '.join(DTYPES)}.  [the weights']")] = None,
    execution: Annotated[
        str, option(f"{', '.join(EXECUTIONS)} or auto; `fastdit info` says what auto is.")
    ] = "auto",
    vae: Annotated[
        str | None,
        option(
            f"The AutoencoderKL to decode by: {VAE_HELP}. A pipeline with text has its own; none "
            "writes latents."
        ),
    ] = None,
    text_encoder: TextEncoderFolder = None,
    text_dtype: TextDtype = None,
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
    text_tokens: TextTokens = None,
    device: Device = None,
) -> None:
    """Sample images from a checkpoint."""
    with plain_errors(
        context,
        flags=_FLAGS,
        kept=lambda: what_is_kept(out, num_images),
        less_memory="a smaller --batch-size needs less, and --num-images holds one batch at a time",
    ):
        check_file(out, num_images)
        told = answers(n_heads, null_class, img_size, diffusion, weights, text_tokens)
        found, trained_on = _inspect(checkpoint, told)
        for flag, named in (("--dtype", dtype), ("--text-dtype", text_dtype)):
            if named is not None and named not in DTYPES:
                raise unknown_name(flag, named, DTYPES)
        text = TextOptions(prompt, prompts, negative_prompt, size, text_encoder, text_dtype)
        where = device_of(device)
        guidance = _guidance(guidance_scale, guidance_channels, guidance_interval)
        if not isinstance(found.config, DiTConfig):
            own = {"--labels": labels, "--first-index": first_index, "--num-images": num_images}
            refuse_label_options(found.config, own | {"--latent-stats": latent_stats})
            how = (solver, steps, clip, shift, solver_options, guidance, dtype, execution)
            options = SampleOptions(
                checkpoint, told, out, count, seed, seeds, batch_size, *how, vae, where
            )
            sample_prompts(found.config, trained_on, text, options)
            return
        text.refuse()
        _check_shown(found.config, out, decoded=vae is not None)
        noise = parse_noise(seed, first_index, seeds, count, num_images)
        wanted = parse_labels(labels, found.labels, found.config)
        process = process_of(trained_on)
        solver, chosen = parse_solver(solver, process, clip, shift, solver_options)
        sampler = Sampler(
            load(checkpoint, **told).to(where),
            process,
            chosen,
            steps,
            guidance=guidance,
            dtype=None if dtype is None else getattr(torch, dtype),
            execution=execution,
        )
        finish = Finish(
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
            checkpoint=digest_of_files(locate(checkpoint, weights)),
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


def _sample_grid(
    out: Path,
    sampler: Sampler,
    finish: Finish,
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
    write_images(out, images, columns=per_label)
    print(f"wrote {total} image{'s' * (total > 1)} to {out}")


def _sample_many(
    out: Path, sampler: Sampler, finish: Finish, noise: Noise, plan: dict[str, Any]
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


def _inspect(checkpoint: Path, told: dict[str, Any]) -> tuple[CheckpointInfo, dict[str, Any]]:
    """Return what the checkpoint holds and its diffusion."""
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
    return found, found.diffusion


def _check_shown(config: DiTConfig, out: Path, decoded: bool) -> None:
    """Raise a ValueError if a file could not show what the model makes."""
    makes = config.in_channels
    if out.suffix == ".png" and not decoded and makes not in PIXEL_CHANNELS:
        advice = "expected --vae to decode them, or a name that ends in .npz"
        raise ValueError(f"--out: a PNG shows 1 or 3 channels, the model makes {makes}; {advice}")
