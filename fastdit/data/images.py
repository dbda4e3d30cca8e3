"""Images and latents as files: pixels, grids, PNG and NPZ."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fastdit.data.files import atomic_path

PixelArray = np.ndarray[tuple[int, int, int, int], np.dtype[np.uint8]]


def from_pixels(pixels: Tensor) -> Tensor:
    """Return [B, H, W, C] uint8 as [B, C, H, W] float32 in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images: Tensor) -> PixelArray:
    """Return [B, C, H, W] in [-1, 1] as [B, H, W, C] uint8: `clamp(127.5 x + 128)`, as in ADM.

    Raises:
        ValueError: a pixel is not finite.
    """
    images = images.detach().to("cpu", torch.float32)
    if not images.isfinite().all():
        raise ValueError("images: expected finite pixels, got NaN or Inf")
    pixels = (127.5 * images + 128).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


# The key of what `read_metadata` returns: a text chunk of a PNG, an array of one text in an NPZ.
METADATA = "fastdit"


def write_npz(
    path: str | os.PathLike[str], pixels: PixelArray, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write [B, H, W, C] uint8 under the key `arr_0`, which FID tools read."""
    _write_arrays(path, metadata, arr_0=pixels)


def write_latents(
    path: str | os.PathLike[str], latents: Tensor, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write [B, C, h, w] in float32 under the key `latents`."""
    _write_arrays(path, metadata, latents=latents.detach().to("cpu", torch.float32).numpy())


def _write_arrays(
    path: str | os.PathLike[str], metadata: Mapping[str, Any] | None, **arrays: Any
) -> None:
    if metadata is not None:
        arrays[METADATA] = np.array(json.dumps(metadata, ensure_ascii=False))
    with atomic_path(path) as aside, open(aside, "wb") as file:
        np.savez(file, **arrays)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return what is written beside the images of a PNG or an NPZ, or None if there is nothing."""
    if os.fspath(path).endswith(".npz"):
        with np.load(path) as archive:
            text = str(archive[METADATA]) if METADATA in archive.files else None
    else:
        with Image.open(path) as image:
            text = image.info.get(METADATA)
    return None if text is None else json.loads(text)


def write_grid(
    path: str | os.PathLike[str],
    pixels: PixelArray,
    columns: int,
    zoom: int = 1,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a grid of images to a PNG, row by row.

    Args:
        path: the file.
        pixels: [B, H, W, C] uint8, C of 1 or 3.
        columns: images per row; the last row is filled up with grey.
        zoom: side of the square that shows a pixel.
        metadata: JSON values, written in UTF-8 in a text chunk (iTXt) named `METADATA`.

    Raises:
        ValueError: C is neither 1 nor 3 (latents need decoding first).
    """
    B, H, W, C = pixels.shape
    if C not in (1, 3):
        raise ValueError(f"pixels: expected 1 or 3 channels for a PNG, got {C}; write an NPZ")
    rows = -(-B // columns)
    cells = np.full((rows * columns, H + 1, W + 1, C), 64, dtype=np.uint8)  # grey lines between
    cells[:B, :H, :W] = pixels
    sheet = cells.reshape(rows, columns, H + 1, W + 1, C).transpose(0, 2, 1, 3, 4)
    sheet = sheet.reshape(rows * (H + 1), columns * (W + 1), C)[:-1, :-1]
    sheet = sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)
    chunks = PngInfo()
    if metadata is not None:
        chunks.add_itxt(METADATA, json.dumps(metadata, ensure_ascii=False))
    with atomic_path(path) as aside:
        image = Image.fromarray(sheet.squeeze(2) if C == 1 else sheet)
        image.save(aside, format="PNG", pnginfo=chunks)
