"""What `fastdit sample` writes: decoded or not, as a grid or as arrays."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastdit.checkpoints.folders import weight_files
from fastdit.cli.common import check_out, kept_shards
from fastdit.data.images import to_pixels, write_grid, write_latents, write_npz
from fastdit.data.latents import AT_ONCE, LatentStats, decode, latent_channels
from fastdit.data.shards import parts_of

PIXEL_CHANNELS = (1, 3)
_LATENT_512 = 64 * 64  # places in the latent of a 512-pixel image, of which AT_ONCE are decoded


@dataclass(frozen=True)
class Finish:
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
            scale = None if self.stats is None else 1.0
            at_once = max(1, min(AT_ONCE, AT_ONCE * _LATENT_512 // images[0, 0].numel()))
            images = decode(self.decoder, images, at_once, scale)
        return images


def what_is_kept(out: Path, num_images: int | None) -> str:
    """Say what an interrupted call has kept, and how to go on."""
    if num_images is None:
        return f"{out} was not written; with --num-images and an .npz, finished batches are kept"
    return kept_shards(parts_of(out))


def digest_of_files(checkpoint: Path) -> str:
    """Return a hash of a checkpoint's files."""
    content = hashlib.blake2b(digest_size=16)
    for path in weight_files(checkpoint):
        with open(path, "rb") as file:
            while block := file.read(2**24):
                content.update(block)
    return content.hexdigest()


def write_images(
    out: Path, images: Tensor, columns: int, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a grid, or an NPZ of pixels or, where the images have other channels, of latents."""
    if out.suffix == ".png":
        zoom = max(1, 64 // max(images.shape[-2:]))
        write_grid(out, to_pixels(images), columns, zoom, metadata)
    elif images.shape[1] in PIXEL_CHANNELS:
        write_npz(out, to_pixels(images), metadata)
    else:
        write_latents(out, images, metadata)


def check_file(out: Path, num_images: int | None) -> None:
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
