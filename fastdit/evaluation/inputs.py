"""What is evaluated: the images of an NPZ or of a folder, and statistics of a reference."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from numpy.lib import format as npy
from tqdm import tqdm

from fastdit.data.pictures import images_below, read_image, stored_size
from fastdit.evaluation.metrics import Moments, check_moments

IMAGES = "arr_0"  # the array of an NPZ that holds images, as np.savez names the first one
# The names of mean and covariance of these features, as in ADM's reference batches.
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}

_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, OSError)
_AS_PIXELS = "fastdit.data.images.to_pixels converts [N, C, H, W] from -1 to 1"


class Images(Protocol):
    """Images of one size, which are read in batches."""

    path: Path
    count: int
    size: tuple[int, int]  # height and width

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Yield [B, H, W, 3] uint8, with B of `size`, or less in the last batch."""


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: images, statistics, or both.

    Attributes:
        images: the images; None if there are statistics only.
        statistics: mean and covariance of "pool" and of "spatial" features, as far as the file has
            them.
    """

    images: Images | None
    statistics: Mapping[str, Moments] = field(default_factory=dict)


def open_images(path: Path, image_size: int | None = None, progress: bool = False) -> Images:
    """Return the images of an NPZ or of a folder.

    Args:
        path: an NPZ whose `arr_0` is [N, H, W, 3] uint8 (or one channel, which is taken for grey),
            or a folder of image files, in any depth.
        image_size: side of the square to which a folder's images are cropped and scaled as ADM does
            it; None takes them as they are.
        progress: whether to show a bar while the files of a folder are looked at.

    Raises:
        ValueError: there are no such images.
    """
    if path.is_dir():
        return FolderImages(path, image_size, progress)
    return NpzImages(path)


def open_reference(path: Path, image_size: int | None = None, progress: bool = False) -> Reference:
    """Return the images and the statistics of a reference.

    Args:
        path: as for `open_images`; an NPZ may also hold `mu` [D] and `sigma` [D, D] of the pooled
            features, and `mu_s` and `sigma_s` of the spatial ones, as ADM's reference batches do.
        image_size: as for `open_images`.
        progress: as for `open_images`.

    Raises:
        ValueError: there are neither images nor statistics, or they are damaged.
    """
    if path.is_dir():
        return Reference(FolderImages(path, image_size, progress))
    with _archive(path) as archive:
        names = _arrays(archive)
    read = {kind: _read_statistics(path, names, *keys) for kind, keys in STATISTICS.items()}
    statistics = {kind: found for kind, found in read.items() if found is not None}
    if not statistics:
        return Reference(NpzImages(path, f"images ({IMAGES}) or statistics (mu and sigma)"))
    return Reference(NpzImages(path) if IMAGES in names else None, statistics)


class FolderImages:
    """The image files in a folder and below, decoded by a few threads."""

    def __init__(self, path: Path, image_size: int | None = None, progress: bool = False) -> None:
        """List the files and, where they are not cropped, compare their sizes."""
        self.path, self._crop = path, image_size
        self._files = images_below(path)
        self.count = len(self._files)
        if not self._files:
            raise ValueError(f"{path}: expected images (such as .png) in this folder, found none")
        if image_size is not None:
            self.size = (image_size, image_size)
            return
        self.size = stored_size(self._files[0])
        settings = dict(unit="file", desc=path.name, disable=not progress, delay=1)
        for file in tqdm(self._files, **settings):
            if (found := stored_size(file)) != self.size:
                sizes = (
                    f"{describe_size(self.size)} ({self._files[0].name}) and {describe_size(found)}"
                )
                advice = "scale them to one size, or crop them to one as ADM does (--image-size)"
                raise ValueError(f"{path}: expected one size, got {sizes} ({file.name}); {advice}")

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Yield [B, H, W, 3] uint8."""
        with ThreadPoolExecutor() as pool:
            for i in range(0, self.count, size):
                yield np.stack(list(pool.map(self._read, self._files[i : i + size])))

    def _read(self, path: Path) -> np.ndarray:
        return read_image(path, self._crop)


class NpzImages:
    """The array `arr_0` of an NPZ, read piece by piece, since it may not fit into memory."""

    def __init__(self, path: Path, expected: str = f"images ({IMAGES})") -> None:
        """Check what the array is, and that the file holds all of it."""
        self.path = path
        with _archive(path) as archive:
            names = _arrays(archive)
            if IMAGES not in names:
                raise ValueError(f"{path}: expected {expected}, got {_describe(names)}")
            with archive.open(f"{IMAGES}.npy") as file:
                shape, dtype = _read_header(path, file)
                stored = archive.getinfo(f"{IMAGES}.npy").file_size - file.tell()
        if stored != int(np.prod(shape)) * dtype.itemsize:
            raise ValueError(f"{path}: it is damaged; {IMAGES} ends too early; write it again")
        self.count, height, width, self._channels = shape
        self.size = (height, width)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Yield [B, H, W, 3] uint8."""
        shape = (*self.size, self._channels)
        with _archive(self.path) as archive, archive.open(f"{IMAGES}.npy") as file:
            _read_header(self.path, file)
            for first in range(0, self.count, size):
                rows = min(size, self.count - first)
                content = file.read(rows * int(np.prod(shape)))
                pixels = np.frombuffer(content, dtype=np.uint8).reshape(rows, *shape)
                yield np.broadcast_to(pixels, (*pixels.shape[:3], 3))  # grey as three channels


def describe_size(size: tuple[int, int]) -> str:
    """Return height and width as people write them: width first."""
    return f"{size[1]} x {size[0]}"


def _describe(names: list[str]) -> str:
    if names == ["latents"]:
        return "latents; `fastdit sample --vae` decodes them to images"
    return f"the arrays {', '.join(names)}" if names else "no arrays"


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an NPZ; whatever shows that it is damaged is a ValueError."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if not zipfile.is_zipfile(path):
        advice = "fastdit sample --out NAME.npz writes one"
        raise ValueError(f"{path}: expected an NPZ of images, or a folder of images; {advice}")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _DAMAGED as error:
        raise ValueError(f"{path}: it is damaged ({error}); write it again") from error


def _arrays(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def _read_header(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Return shape and dtype of images, and leave the file at their first byte."""
    try:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, by_columns, dtype = read(file)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: {IMAGES} is no array of pixels ({error})") from error
    expected = f"{path}: expected {IMAGES} to be [N, H, W, 3] uint8 (or one channel, of grey)"
    if dtype.hasobject:
        raise ValueError(f"{expected}, got Python objects; save np.stack(images)")
    if len(shape) != 4 or shape[3] not in (1, 3):
        first = len(shape) == 4 and shape[1] in (1, 3)
        advice = "; save images.transpose(0, 2, 3, 1)" if first else ""
        raise ValueError(f"{expected}, got shape {list(shape)}{advice}")
    if dtype != np.uint8:
        raise ValueError(f"{expected}, from 0 to 255, got {dtype}; {_AS_PIXELS}")
    if 0 in shape:
        raise ValueError(f"{expected}, got shape {list(shape)}, which holds no pixels")
    if by_columns:
        raise ValueError(f"{expected}, got Fortran order; save np.ascontiguousarray(images)")
    return shape, dtype


def _read_statistics(path: Path, names: list[str], mean: str, covariance: str) -> Moments | None:
    """Return one pair of a reference's statistics, or None if it has no such pair."""
    if mean not in names and covariance not in names:
        return None
    if not {mean, covariance} <= set(names):
        raise ValueError(f"{path}: expected {mean} and {covariance} together, got only one of them")
    try:
        with np.load(path, allow_pickle=False) as file:
            mu, sigma = file[mean], file[covariance]
    except (ValueError, *_DAMAGED) as error:
        raise ValueError(f"{path}: {mean} or {covariance} is damaged ({error})") from error
    for name, array, axes in ((mean, mu, 1), (covariance, sigma, 2)):
        expected = f"{path}: expected {name} to be float32 or float64 with {axes} axes"
        if array.ndim != axes or array.dtype not in (np.float32, np.float64):
            raise ValueError(f"{expected}, got {array.dtype} of shape {list(array.shape)}")
    if sigma.shape != (len(mu), len(mu)) or not len(mu):
        got = f"{list(mu.shape)} and {list(sigma.shape)}"
        raise ValueError(f"{path}: expected {mean} [D] and {covariance} [D, D], got {got}")
    values = torch.from_numpy(mu.astype(np.float64)), torch.from_numpy(sigma.astype(np.float64))
    # A float64 array may hold what was computed in float32.
    single = np.array_equal(sigma.astype(np.float32), sigma)
    found = Moments(*values, float(np.finfo(np.float32 if single else np.float64).eps))
    check_moments(f"{path}: {mean} and {covariance}", found)
    return found
