"""Labelled pictures in folders, NPZ files and Hugging Face data sets, decoded and cropped."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastdit.errors import height_and_width, warn

Size = int | tuple[int, int]  # the side of a square, or (height, width)

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
_SPLITS = ("test", "train", "val", "valid", "validation")
_DATASET_FILES = ("dataset_dict.json", "dataset_info.json")  # of a folder of `save_to_disk`


class Listing(NamedTuple):
    """The pictures of a set, without their content."""

    names: list[str]  # each picture has a name of its own
    labels: list[int]
    classes: list[str]  # their names
    stamps: list[str]  # of a picture whose stamp has not changed, the content has not either


class Pictures(Protocol):
    """A set of labelled pictures.

    Attributes:
        path: where the set lies.
    """

    path: Path

    def listing(self) -> Listing:
        """List all pictures; it is a ValueError if there are none."""
        ...

    def load(self, name: str) -> tuple[bytes, Image.Image]:
        """Return a picture's content, by which it can be told from others, and the picture."""
        ...


def open_pictures(path: Path) -> Pictures:
    """Open a folder of class folders, an NPZ file, or a folder of Hugging Face's `datasets`.

    Raises:
        ValueError: there is no such folder, a file has no images, or `datasets` is not installed.
    """
    if path.is_file():
        return PictureArray(path)
    if any((path / name).is_file() for name in _DATASET_FILES):
        return PictureDataset(path)
    return PictureFolder(path)


class PictureFolder:
    """A folder with one sub-folder of pictures per class."""

    def __init__(self, path: Path) -> None:
        """Use a folder; it is a ValueError if there is none."""
        if not path.is_dir():
            raise ValueError(f"{path}: no such folder")
        self.path = path

    def listing(self) -> Listing:
        files, labels, classes = image_files(self.path)
        if set(classes) <= set(_SPLITS):
            each = "each of them is taken for a class; name one of them to train on its classes"
            warn(f"{self.path}: its folders are named like splits ({', '.join(classes)}); {each}")
        status = [path.stat() for path in files]
        stamps = [f"{s.st_size} {s.st_mtime_ns}" for s in status]
        names = [path.relative_to(self.path).as_posix() for path in files]
        return Listing(names, labels, classes, stamps)

    def load(self, name: str) -> tuple[bytes, Image.Image]:
        content = (self.path / name).read_bytes()
        return content, _opened(content)


class PictureArray:
    """An NPZ file with `arr_0`, [N, H, W, 1 or 3] uint8, as ADM's batches; it is held in memory.

    The labels are `labels` or `arr_1`, [N] integers. Without them there is one class. Classes are
    named by their numbers.
    """

    def __init__(self, path: Path) -> None:
        """Read a file."""
        self.path = path
        try:
            with np.load(path) as file:
                self._pixels = file["arr_0"]
                names = [name for name in ("labels", "arr_1") if name in file]
                labels = file[names[0]] if names else np.zeros(len(self._pixels), np.int64)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: expected an NPZ file with arr_0 ({error})") from error
        shape, kind = self._pixels.shape, self._pixels.dtype
        if len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape or kind != np.uint8:
            expected = "arr_0 of uint8, [N, H, W, 1 or 3]"
            raise ValueError(f"{path}: expected {expected}, got {kind} of {list(shape)}")
        if labels.shape != shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0:
            got = f"{labels.dtype} of {list(labels.shape)}"
            raise ValueError(f"{path}: expected {shape[0]} labels, which are integers, got {got}")
        self._labels: list[int] = labels.tolist()

    def listing(self) -> Listing:
        status = self.path.stat()
        number = len(self._labels)
        stamps = [f"{status.st_size} {status.st_mtime_ns}"] * number
        classes = [str(label) for label in range(max(self._labels) + 1)]
        return Listing([str(i) for i in range(number)], self._labels, classes, stamps)

    def load(self, name: str) -> tuple[bytes, Image.Image]:
        pixels = self._pixels[int(name)]
        if pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
        return pixels.tobytes(), Image.fromarray(pixels)


class PictureDataset:
    """A folder that `save_to_disk` of Hugging Face's `datasets` wrote, or its split `train`."""

    def __init__(self, path: Path) -> None:
        """Open a folder.

        Raises:
            ValueError: `datasets` is not installed, or the set has no pictures or no classes.
        """
        try:
            import datasets
        except ImportError as error:
            needs = "needs the package datasets; pip install 'fastdit[datasets]'"
            raise ValueError(f"{path}: it {needs}") from error
        self.path = path
        try:
            found = datasets.load_from_disk(str(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a folder of `datasets` ({error})") from error
        state = path / "state.json"
        if isinstance(found, datasets.DatasetDict):
            if "train" not in found:
                raise ValueError(f"{path}: expected a split train, got {', '.join(found)}")
            found, state = found["train"], path / "train" / "state.json"
        self._stamp = str(json.loads(state.read_text())["_fingerprint"])
        pictures = [n for n, f in found.features.items() if isinstance(f, datasets.Image)]
        self._column = _chosen(path, "picture", pictures, ("image", "img"))
        classes = {n: f for n, f in found.features.items() if isinstance(f, datasets.ClassLabel)}
        label = _chosen(path, "class label", classes, ("label", "labels"))
        self._classes = [str(name) for name in classes[label].names]
        self._labels = list(found[label])
        if not self._labels:
            raise ValueError(f"{path}: expected pictures, found none")
        if not all(isinstance(i, int) and 0 <= i < len(self._classes) for i in self._labels):
            raise ValueError(f"{path}: expected a class for each picture, some have none")
        # As files, so that a broken one can be named.
        self._rows: Any = found.cast_column(self._column, datasets.Image(decode=False))

    def listing(self) -> Listing:
        number = len(self._labels)
        names = [str(i) for i in range(number)]
        return Listing(names, self._labels, self._classes, [self._stamp] * number)

    def load(self, name: str) -> tuple[bytes, Image.Image]:
        file = self._rows[int(name)][self._column]
        if file is None:
            raise ValueError("it has no picture")
        content = Path(file["path"]).read_bytes() if file["bytes"] is None else file["bytes"]
        return content, _opened(content)


def _opened(content: bytes) -> Image.Image:
    """Open a picture's file; it is a ValueError if its kind is unknown."""
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:
        raise ValueError("its first bytes are those of no known kind") from error


def _chosen(path: Path, what: str, columns: Iterable[str], usual: tuple[str, ...]) -> str:
    """Return the one column there is, or that with a usual name."""
    columns = list(columns)
    found = columns if len(columns) == 1 else [name for name in usual if name in columns]
    if not found:
        got = ", ".join(columns) or "none"
        raise ValueError(f"{path}: expected one {what} column, or {usual[0]}; got {got}")
    return found[0]


def read_cropped(pictures: Pictures, name: str, size: Size) -> tuple[np.ndarray, str]:
    """Read a picture of a set: ([H, W, 3] uint8 by `centre_crop`, a hash of its content).

    Raises:
        ValueError: it cannot be read; the message names it.
    """
    try:
        content, image = pictures.load(name)
        with image:
            pixels = centre_crop(image, size)
    except _DAMAGED as error:
        raise ValueError(f"{pictures.path / name}: expected an image ({error})") from error
    return pixels, hashlib.blake2b(content, digest_size=8).hexdigest()


def centre_crop(image: Image.Image, size: Size) -> np.ndarray:
    """Return the largest central part of a shape, scaled to [H, W, 3] uint8.

    The image is halved by box averaging while its sides are at least twice those of the result, and
    then resized bicubically, as ADM and DiT crop ImageNet to squares (`center_crop_arr` of Dhariwal
    & Nichol's code). EXIF rotations are ignored. 16 bits per channel are first rounded to 8.

    Args:
        image: any image.
        size: side of a square, or (H, W).

    Raises:
        ValueError: the size is not one, the image has more than 16 bits per channel, or less than a
            hundredth of it would be left, which would take much memory to resize.
    """
    height, width = height_and_width("size", size)
    shapes = image.height * width, image.width * height  # equal if nothing is cut off
    if max(shapes) > 100 * min(shapes):
        raise ValueError(f"expected sides of similar length, got {image.width} x {image.height}")
    image = _eight_bits(image).convert("RGB")
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    scaled = round(image.width * scale), round(image.height * scale)
    pixels = np.asarray(image.resize(scaled, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return an image with 8 bits per channel; grey PNGs and TIFFs may have 16."""
    if image.mode in _MODES:
        return image
    # Some versions of PIL open a PNG with 16 bits as "I", which has 32.
    if not image.mode.startswith("I"):
        raise ValueError(f"expected 8 or 16 bits per channel, got PIL's mode {image.mode}")
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() >= 2**16:
        raise ValueError(f"expected 16 bits per channel, got {levels.min()} to {levels.max()}")
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))  # 65535 becomes 255


def read_image(path: Path, size: int | None = None) -> np.ndarray:
    """Return an image file as [H, W, 3] uint8, or its `centre_crop` to a size.

    Raises:
        ValueError: it cannot be read as an image, or not be cropped.
    """
    try:
        with Image.open(path) as image:
            if size is not None:
                return centre_crop(image, size)
            return np.asarray(_eight_bits(image).convert("RGB"))
    except _DAMAGED as error:
        raise ValueError(f"{path}: expected an image ({error})") from error


def stored_size(path: Path) -> tuple[int, int]:
    """Return an image file's height and width; a ValueError if it is none."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except _DAMAGED as error:
        raise ValueError(f"{path}: expected an image ({error})") from error


def images_below(folder: Path) -> list[Path]:
    """List the image files in a folder and the folders in it, in the order of their paths.

    Links to folders are followed; a link to a folder that was seen already adds nothing.
    """
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        files = (Path(root, name) for name in names if name[0] != ".")
        found += [p for p in files if p.suffix.lower() in _SUFFIXES and p.is_file()]
    return sorted(found)


def image_files(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """List images that lie in one sub-folder per class: (files, their labels, class names).

    Raises:
        ValueError: there is no such folder, or a class has no images.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    files, labels = [], []
    for label, name in enumerate(classes):
        own = images_below(folder / name)
        if not own:
            raise ValueError(f"{folder / name}: expected images of a class, found none")
        files += own
        labels += [label] * len(own)
    if not files:
        raise ValueError(f"{folder}: expected a sub-folder of images for each class, found none")
    return files, labels, classes
