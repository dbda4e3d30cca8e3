"""`fastdit convert`, `info` and `encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from fastdit import flops
from fastdit.checkpoints.native import SAVED_LAYOUTS, CheckpointInfo, inspect, load, save
from fastdit.cli.common import Device, device_of, plain_errors
from fastdit.config import PRESETS
from fastdit.data.latents import encode_folder, load_vae
from fastdit.diffusion import DiffusionScheduler
from fastdit.errors import unknown_name
from fastdit.model import DiT
from fastdit.sampling.executions import describe_automatic


def convert(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint that fastdit.load reads, of fastdit or others.")
    ],
    out: Annotated[Path, typer.Argument(help="The file to write; for diffusers a folder.")],
    layout: Annotated[str, typer.Option(help=f"{' or '.join(SAVED_LAYOUTS)}.")] = SAVED_LAYOUTS[0],
    n_heads: Annotated[
        int | None, typer.Option(min=1, help="Where shapes do not tell it.  [the published]")
    ] = None,
) -> None:
    """Rewrite a checkpoint in another layout, to the bit."""
    with plain_errors():
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
    with plain_errors():
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
        print(f"{'forward':16} {flops.flop(cfg, 1) / 1e9:,.2f} GFLOP an image\n")
        print(f"--execution auto is {describe_automatic(cfg)}\n")
        print(f"floor of a bfloat16 step at {tflops:g} TFLOP/s and {gbps:g} GB/s")
        print("rows   ms a step   rows/s")
        for rows in (1, 2, 8, 32, 128):
            seconds = flops.floor_seconds(cfg, rows, 2, tflops * 1e12, gbps * 1e9)
            print(f"{rows:4d} {seconds * 1e3:11.3f} {rows / seconds:8.0f}")


def encode(
    folder: Annotated[Path, typer.Argument(help="Images in one sub-folder a class.")],
    vae: Annotated[str, typer.Option(help="Folder or name of the AutoencoderKL.")],
    out: Annotated[Path, typer.Option(help="Folder of shards; a stopped call goes on in it.")] = (
        Path("latents")
    ),
    image_size: Annotated[int, typer.Option(min=8, help="Side of the square that is cut.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a shard.")] = 64,
    device: Device = None,
) -> None:
    """Encode images to the latents that a DiT is trained on."""
    with plain_errors():
        autoencoder = load_vae(vae, device_of(device))
        count = encode_folder(autoencoder, folder, out, image_size, batch_size)
        print(f"wrote the latents of {count} images to {out}")
