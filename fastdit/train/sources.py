"""The training sets: the coloured shapes, latents of `fastdit encode`, or pictures as pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastdit.config import DiTConfig
from fastdit.data.images import from_pixels
from fastdit.data.latents import SCALING, LatentShards
from fastdit.data.pictures import Size, open_pictures
from fastdit.data.pixels import PixelShards, cache_pixels, holds_pixels
from fastdit.data.shapes import IMG_SIZE, LABEL_NAMES, coloured_shapes
from fastdit.data.shards import read_plan
from fastdit.errors import check_positive


class ImageBatch(NamedTuple):
    """Labelled images, each given as a normal distribution, or as itself where std is None."""

    mean: Tensor  # [b, C, H, W] float32
    std: Tensor | None  # [b, C, H, W] float32
    labels: Tensor  # [b] int64


class FeaturedBatch(NamedTuple):
    """An `ImageBatch` with an encoder's features of the images, which a run adds to it."""

    mean: Tensor
    std: Tensor | None
    labels: Tensor
    features: Tensor  # [b, N, z]


class Source(Protocol):
    """A set of labelled images.

    Attributes:
        sample_shape: [C, H, W] of one image.
        label_names: names of the classes.
        identity: JSON values that identify the set, from which `open_source` opens it again.
        variants: versions of each image, such as 2 if the set has mirror images, of which training
            draws one for each sample. A source without this attribute has one. Row
            `r + k * len(source)` is variant k of image r.
    """

    sample_shape: tuple[int, int, int]
    label_names: tuple[str, ...]
    identity: dict[str, Any]

    def __len__(self) -> int: ...

    def take(self, rows: Tensor) -> ImageBatch:
        """Return the images of some rows, which are [b] int64 on the host."""
        ...


class Shapes:
    """The coloured shapes of `fastdit.data`."""

    sample_shape = (3, IMG_SIZE, IMG_SIZE)
    label_names = LABEL_NAMES

    def __init__(self, per_class: int = 200, seed: int = 0) -> None:
        """Draw the set by `coloured_shapes`."""
        if type(per_class) is not int or not 1 <= per_class < 2**31:
            raise ValueError(f"per_class: expected a positive integer, got {per_class!r}")
        self.images, self.labels = coloured_shapes(per_class, seed)
        self.identity = {"kind": "shapes", "per_class": per_class, "seed": seed}

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Tensor) -> ImageBatch:
        return ImageBatch(self.images[rows], None, self.labels[rows])


class Latents:
    """Latents on disk, drawn anew from their distributions in every pass over the set."""

    def __init__(self, folder: str | Path) -> None:
        """Open the shards of `fastdit encode`; see `LatentShards`."""
        self._shards = LatentShards(folder)
        self._labels = torch.tensor(self._shards.labels)
        self.label_names = tuple(self._shards.classes)
        self.variants = self._shards.variants
        self.scaling_factor: float | None = self._shards.plan.get(SCALING)
        C, H, W = self._shards[0][0].shape
        self.sample_shape = (C, H, W)
        self.identity = {
            "kind": "latents",
            "folder": str(Path(folder).resolve()),
            "digest": self._shards.digest,
        }

    def __len__(self) -> int:
        return len(self._shards)

    def take(self, rows: Tensor) -> ImageBatch:
        both = torch.from_numpy(np.stack([self._shards.row(i) for i in rows.tolist()]))
        if not both.isfinite().all():
            row = int(rows[(~both.flatten(1).isfinite()).any(1)][0]) % len(self)
            raise ValueError(f"{self.identity['folder']}: the latent of image {row} is not finite")
        # Contiguous copies, which can be pinned.
        mean, std = (part.contiguous() for part in both.chunk(2, dim=1))
        return ImageBatch(mean, std, self._labels[rows % len(self)])


class Images:
    """Pictures as pixels in [-1, 1], which `open_data` has cached on disk."""

    def __init__(self, folder: str | Path, flip: bool = True) -> None:
        """Open the pixels of a folder; see `PixelShards`.

        Args:
            folder: the folder.
            flip: whether training mirrors each image or not, at random.
        """
        self._shards = PixelShards(Path(folder))
        self._labels = torch.tensor(self._shards.labels)
        self.label_names = tuple(self._shards.classes)
        H, W, C = self._shards.stored(0).shape
        self.sample_shape = (C, H, W)
        self.variants = 2 if flip else 1
        self.identity = {
            "kind": "images",
            "folder": str(Path(folder).resolve()),
            "flip": flip,
            "digest": self._shards.digest,
        }

    def __len__(self) -> int:
        return len(self._shards)

    def take(self, rows: Tensor) -> ImageBatch:
        stored = torch.from_numpy(np.stack([self._row(row) for row in rows.tolist()]))
        # Contiguous, since it may be pinned.
        pixels = from_pixels(stored).contiguous()
        return ImageBatch(pixels, None, self._labels[rows % len(self)])

    def _row(self, row: int) -> np.ndarray:
        mirrored, image = divmod(row, len(self))
        stored = self._shards.stored(image)
        return stored[:, ::-1] if mirrored else stored


def open_data(
    path: Path,
    cache: Path | None = None,
    image_size: Size | None = None,
    flip: bool | None = None,
    **options: Any,
) -> Source:
    """Return the set that a path names: latents, or pictures, whose pixels are cached on disk.

    Args:
        path: a folder of `fastdit encode`, or anything that `open_pictures` opens, or the folder of
            an earlier cache.
        cache: the folder for the pixels of pictures; it is made again where pictures have changed.
        image_size: side, or (height, width), to which pictures are cropped and scaled.
        flip: whether training mirrors pictures at random; None is True. It is decided for latents
            when they are encoded.
        options: for pictures, skip_bad, update, rank and world, as for `write_image_shards`.

    Raises:
        ValueError: there is no such set, a picture cannot be read, or an argument does not fit the
            set.
    """
    if is_shards(path):
        if image_size is not None:
            raise ValueError(f"image_size: expected none, since {path} has a size already")
        if holds_pixels(path):
            return Images(path, flip is not False)
        if flip is not None:
            raise ValueError(f"flip: expected none, since latents as in {path} are encoded with it")
        return Latents(path)
    pictures = open_pictures(path)
    if image_size is None:
        what = "expected a side to which pictures are scaled"
        raise ValueError(f"image_size: {what}, since {path} holds no latents; got none")
    if cache is None:
        raise ValueError(f"cache: expected a folder for the pixels of {path}, got none")
    cache_pixels(pictures, cache, image_size, **options)
    return Images(cache, flip is not False)


def is_shards(path: Path) -> bool:
    """Return whether a path is a folder of shards, and not of pictures."""
    return path.is_dir() and read_plan(path) is not None


def variants_of(source: Source) -> int:
    """Return the number of versions of each image of a source.

    Raises:
        ValueError: the source's attribute is no positive integer.
    """
    variants = getattr(source, "variants", 1)
    check_positive("variants", variants)
    return variants


def open_source(identity: Any) -> Source:
    """Open the set that an `identity` describes.

    Raises:
        ValueError: its kind is unknown, or the set has moved or changed.
    """
    match identity:
        case {"kind": "shapes", "per_class": per_class, "seed": seed}:
            return Shapes(per_class, seed)
        case {"kind": "latents", "folder": str(folder)}:
            source = Latents(folder)
            check_same_data(source.identity, identity)
            return source
        case {"kind": "images", "folder": str(folder), "flip": bool(flip)}:
            images = Images(folder, flip)
            check_same_data(images.identity, identity)
            return images
    kinds, advice = "shapes, latents or images", "pass a source of your own as `source`"
    raise ValueError(f"data: expected the identity of {kinds}, got {identity!r}; {advice}")


def same_data(now: dict[str, Any], then: Any) -> bool:
    """Return whether two identities are of the same images, in whatever folder."""
    return isinstance(then, dict) and {**now, "folder": None} == {**then, "folder": None}


def check_same_data(now: dict[str, Any], then: Any) -> None:
    """Raise a ValueError unless two identities are of the same images, in whatever folder."""
    if not same_data(now, then):
        advice = "to go on with other data, name them (--data) and say so (--new-data)"
        before, after = describe_set(then), describe_set(now)
        raise ValueError(f"data: the run was started on {before}, got {after}; {advice}")


def describe_set(identity: Any) -> str:
    """Return an identity in words: the kind of the set, and what tells it from others."""
    if not isinstance(identity, dict):
        return str(identity)
    kind, digest = identity.get("kind", "a set"), str(identity.get("digest", ""))[:8]
    rest = [f"{name} {v}" for name, v in identity.items() if name not in ("kind", "digest")]
    rest += [f"digest {digest}"] if digest else []
    return f"{kind} ({', '.join(rest)})" if rest else str(kind)


def check_fits(config: DiTConfig, source: Source) -> None:
    """Raise a ValueError unless a model accepts a set's images and labels."""
    shape, names = source.sample_shape, source.label_names
    if not isinstance(shape, tuple) or len(shape) != 3:
        raise ValueError(f"data: sample_shape: expected a tuple (C, H, W), got {shape!r:.80}")
    if not isinstance(names, tuple | list):
        raise ValueError(f"data: label_names: expected one name a class, got {names!r:.80}")
    if not isinstance(source.identity, dict):
        raise ValueError(f"data: identity: expected a dict, got {source.identity!r:.80}")
    if not len(source):
        raise ValueError("data: expected at least one image, got none")
    C, H, W = shape
    if config.sample_shape != source.sample_shape:
        expected = f"in_channels={C}, img_size={H if H == W else (H, W)}"
        got = f"in_channels={config.in_channels}, img_size={config.img_size}"
        raise ValueError(f"config: the data are {C} x {H} x {W}, expected {expected}, got {got}")
    classes = len(source.label_names)
    if config.use_class_cond and config.num_classes != classes:
        got = f"num_classes={config.num_classes}"
        raise ValueError(f"config: the data have {classes} classes, got {got}")
