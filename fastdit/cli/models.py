"""`fastdit convert`, `info` and `encode`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from fastdit import flops
from fastdit.checkpoints import SAVED_LAYOUTS, CheckpointInfo, inspect, load, save, verify
from fastdit.checkpoints.matching import ModelConfig, empty_model
from fastdit.checkpoints.native import header_of
from fastdit.checkpoints.runs import locate, newest_whole
from fastdit.cli.checkpoints import (
    Diffusion,
    Heads,
    ImageSize,
    NullClass,
    TextTokens,
    Weights,
    answers,
    parse_size,
)
from fastdit.cli.common import Device, check_out, device_of, kept_shards, option, plain_errors
from fastdit.config import PRESETS, DiTConfig
from fastdit.data.latents import VAE_HELP, LatentShards, encode_folder, load_vae
from fastdit.data.shards import PLAN
from fastdit.errors import first_few, unknown_name
from fastdit.flow import published_flow
from fastdit.sampling.executions import describe_automatic
from fastdit.text.layers import published_diffusion
from fastdit.text.work import Costs, costs
from fastdit.text_config import TEXT_PRESETS
from fastdit.train.changes import describe, recorded
from fastdit.train.distributed import processes

_SHOWN_LABELS = 8
_ROWS = (1, 2, 8, 32, 128)  # of the table of times


def convert(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(help="A run, or a checkpoint of any layout that fastdit.load reads."),
    ],
    out: Annotated[Path, typer.Argument(help="File to write; for diffusers, a folder.")],
    layout: Annotated[str, option(f"{' or '.join(SAVED_LAYOUTS)}.")] = SAVED_LAYOUTS[0],
    n_heads: Heads = None,
    null_class: NullClass = None,
    img_size: ImageSize = None,
    diffusion: Diffusion = None,
    weights: Weights = None,
    text_tokens: TextTokens = None,
) -> None:
    """Rewrite a checkpoint in another layout; no weight changes a bit."""
    with plain_errors(context):
        told = answers(n_heads, null_class, img_size, diffusion, weights, text_tokens)
        info, model = inspect(source, **told), load(source, **told)
        cfg: ModelConfig = model.cfg
        if layout == SAVED_LAYOUTS[0]:
            model.diffusion = info.diffusion
            save(model, out, labels=info.labels, assumed=info.assumed)
        else:
            save(model, out, layout=layout)
        if isinstance(cfg, DiTConfig):
            takes = f"{cfg.num_classes} classes"
        else:
            takes = f"prompts of up to {cfg.text_tokens} tokens"
        print(
            f"wrote {out}: {cfg.n_layers} layers of width {cfg.hidden} with {cfg.n_heads} heads, "
            f"{takes}, images of {' x '.join(map(str, cfg.sample_shape))} in patches of "
            f"{cfg.patch_size}"
        )


def info(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A checkpoint, a run, or a preset like DiT-XL/2.")],
    n_heads: Heads = None,
    null_class: NullClass = None,
    img_size: ImageSize = None,
    diffusion: Diffusion = None,
    weights: Weights = None,
    text_tokens: TextTokens = None,
    tflops: Annotated[float, option("TFLOP/s of bfloat16 matrix products.", min=1e-3)] = 790.0,
    gbps: Annotated[float, option("GB/s of a copy, read and written.", min=1e-3)] = 4300,
) -> None:
    """Print what a model or a run is, and its costs.

    These are its config, how it was trained and changed, the cost of a forward, and the least time
    of a step on a device of given rates. The default rates were measured on an H200.
    """
    with plain_errors(context):
        presets = PRESETS | TEXT_PRESETS
        if model in presets:
            found = _published(model, presets[model])
        elif Path(model).exists():
            told = answers(n_heads, null_class, img_size, diffusion, weights, text_tokens)
            found = inspect(Path(model), **told)
        else:
            raise ValueError(f"{unknown_name('model', model, presets)}, or an existing file")
        cfg = found.config
        _print_found(found, is_file=model not in presets)
        if model not in presets:
            file = locate(model, weights)
            checked = "every tensor fits its checksum" if verify(file) else "without checksums"
            print(f"{'file':16} {file}: {checked}")
            _print_history(newest_whole(Path(model)) or file)
        parameters = sum(t.numel() for t in empty_model(model, cfg).state_dict().values())
        print(f"{'parameters':16} {parameters:,}")
        print(f"{'memory':16} {parameters * 2 / 2**20:,.0f} MiB in bfloat16, twice that in float32")
        rates = 2, tflops * 1e12, gbps * 1e9  # bytes of a bfloat16, FLOP and bytes a second
        if isinstance(cfg, DiTConfig):
            print(f"{'forward':16} {flops.flop(cfg, 1) / 1e9:,.2f} GFLOP per image")
            least = [flops.floor_seconds(cfg, rows, *rates) for rows in _ROWS]
        else:
            _print_costs(costs(cfg))
            least = [costs(cfg, rows).step.floor_seconds(*rates) for rows in _ROWS]
        print(f"\n--execution auto is {describe_automatic(cfg)}\n")
        print(f"least time of a bfloat16 step at {tflops:g} TFLOP/s and {gbps:g} GB/s")
        print("rows     ms/step   rows/s")
        for rows, seconds in zip(_ROWS, least, strict=True):
            print(f"{rows:4d} {seconds * 1e3:11.3f} {rows / seconds:8.0f}")


def _published(name: str, cfg: ModelConfig) -> CheckpointInfo:
    """Return a preset's config with the diffusion or flow that its model was trained on."""
    if not isinstance(cfg, DiTConfig):
        return CheckpointInfo(cfg, published_diffusion(cfg))
    flow = published_flow(name, cfg.sample_shape[1])
    return CheckpointInfo(cfg, None if flow is None else flow.options)


def _print_costs(found: Costs) -> None:
    """Print what a text-to-image model computes in each step, and what ahead of the steps."""
    parts = {
        "forward": (found.step, "in every step, with the longest prompt"),
        "conditioning": (found.conditioning, "for each step, ahead of the loop"),
        "prompt": (found.text, "once, ahead of the loop"),
    }
    for name, (work, when) in parts.items():
        print(f"{name:16} {work.flop / 1e9:,.2f} GFLOP per image {when}")


def _print_found(found: CheckpointInfo, is_file: bool) -> None:
    """Print what a checkpoint or a preset tells, and mark what was assumed."""
    values = found.config.to_dict()
    if found.diffusion is not None:
        values["diffusion"] = ", ".join(f"{k} {v}" for k, v in found.diffusion.items())
    elif is_file:
        values["diffusion"] = "not told; it can be passed by --diffusion, such as flow or ddpm"
    if found.labels is not None:
        values["labels"] = first_few(found.labels, _SHOWN_LABELS)
    for name, value in values.items():
        how = "  (assumed)" * (name in found.assumed)
        how += "  (told by the file's name)" * (name in found.by_name)
        print(f"{name:16} {value}{how}")


def _print_history(file: Path) -> None:
    """Print what the run of a checkpoint was started from, and how it was changed on its way."""
    header = header_of(file)
    origin = header.get("origin")
    if isinstance(origin, dict):
        print(f"{'fine-tuned from':16} {origin.get('path', 'a model')}")
    for i, change in enumerate(recorded(header, file)):
        print(f"{'' if i else 'changes':16} {describe(change)}")


def encode(
    context: typer.Context,
    folder: Annotated[
        Path,
        typer.Argument(
            help="Images in one sub-folder per class, or other pictures that train reads."
        ),
    ],
    vae: Annotated[str, option(f"The AutoencoderKL: {VAE_HELP}.")],
    out: Annotated[
        Path, option("Folder for the shards; a call that was stopped continues there.")
    ] = Path("latents"),
    image_size: Annotated[
        str, option("Size to which images are cropped and scaled, such as 256 or 256x512.")
    ] = "256",
    batch_size: Annotated[int, option("Images per shard.", min=1)] = 64,
    flip: Annotated[
        bool, option("Encode mirror images too, as the published recipes train.", "--flip")
    ] = False,
    skip_bad: Annotated[
        bool, option("Leave out images that cannot be read.", "--skip-bad")
    ] = False,
    device: Device = None,
) -> None:
    """Encode images into latents to train a DiT on.

    Every new or changed image is read once before the work begins, to find those that cannot be.
    To share the work between processes: torchrun -m fastdit encode.
    """
    # After a stop one process may have most of its shards left while the others wait for it.
    less = "a smaller --batch-size needs less"
    with (
        plain_errors(context, kept=lambda: kept_shards(out), less_memory=less),
        processes(timeout=timedelta(days=7)) as world,
    ):
        check_out(out, PLAN)
        size = parse_size("--image-size", image_size)
        autoencoder = load_vae(vae, device_of(device))
        shared = dict(skip_bad=skip_bad, rank=world.rank, world=world.size)
        count = encode_folder(autoencoder, folder, out, size, batch_size, flip, **shared)
        if world.rank == 0:
            names = first_few(LatentShards(out).classes, _SHOWN_LABELS)
            print(f"wrote the latents of {count} images to {out}" + ", with flips" * flip)
            print(f"classes: {names}")
