"""Pixels of labelled pictures, decoded once to shards of uint8 for training without latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastdit.data.image_shards import planned_size, write_image_shards
from fastdit.data.mapped_shards import ImageShards
from fastdit.data.pictures import Pictures, Size
from fastdit.data.shards import read_plan
from fastdit.errors import height_and_width

_KIND = "pixels"
_SHARD_BYTES, _SHARD_IMAGES = 2**24, 1024  # the most of either; a few images fill no file system


def cache_pixels(pictures: Pictures, out: Path, image_size: Size, **options: Any) -> None:
    """Decode pictures, crop and scale them by `centre_crop`, and write them for `PixelShards`.

    A repeated call decodes only what is not there, or has changed.

    Args:
        pictures: the pictures.
        out: the folder to write.
        image_size: side of the squares, or (height, width).
        options: skip_bad, update, rank and world, as for `write_image_shards`.

    Raises:
        ValueError: a picture cannot be read, or `out` holds other shards.
    """
    height, width = height_and_width("image_size", image_size)
    rows = max(1, min(_SHARD_IMAGES, _SHARD_BYTES // (3 * height * width)))
    settings = {"kind": _KIND, "batch_size": rows, "image_size": planned_size(height, width)}
    write_image_shards(out, pictures, lambda pixels: pixels, settings, **options)


def holds_pixels(folder: Path) -> bool:
    """Return whether a folder's shards are pixels; a damaged plan is a ValueError."""
    plan = read_plan(folder)
    return plan is not None and plan.get("kind") == _KIND


class PixelShards(ImageShards):
    """The pixels that `cache_pixels` wrote, memory-mapped: `stored(i)` is [H, W, 3] uint8."""

    def __init__(self, folder: Path) -> None:
        """Open a folder of shards; it is a ValueError if there are none, or some are missing."""
        if not holds_pixels(folder):
            raise ValueError(f"{folder}: expected pixels that `fastdit train` cached, found none")
        what, advice = "the pixels that `fastdit train` cached", "name the pictures by --data again"
        super().__init__(folder, what, (np.uint8, 4), advice)
