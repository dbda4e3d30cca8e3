"""The training sets: the coloured shapes, or latents that `fastdit encode` wrote."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastdit.config import DiTConfig
from fastdit.data.latents import LatentShards
from fastdit.data.shapes import IMG_SIZE, LABEL_NAMES, coloured_shapes


class ImageBatch(NamedTuple):
    """Labelled images, each given as a normal distribution, or as itself where std is None."""

    mean: Tensor  # [b, C, H, W] float32
    std: Tensor | None  # [b, C, H, W] float32
    labels: Tensor  # [b] int64


class Source(Protocol):
    """A set of labelled images.

    Attributes:
        sample_shape: [C, H, W] of one image.
        label_names: names of the classes.
        identity: JSON values that identify the set, from which `open_source` opens it again.
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
        C, H, W = self._shards[0][0].shape
        self.sample_shape = (C, H, W)
        plan = json.dumps(self._shards.plan, sort_keys=True).encode()
        self.identity = {
            "kind": "latents",
            "folder": str(Path(folder).resolve()),
            "digest": hashlib.blake2b(plan, digest_size=16).hexdigest(),
        }

    def __len__(self) -> int:
        return len(self._shards)

    def take(self, rows: Tensor) -> ImageBatch:
        both = torch.from_numpy(np.stack([self._shards.row(i) for i in rows.tolist()]))
        if not both.isfinite().all():
            row = int(rows[(~both.flatten(1).isfinite()).any(1)][0])
            raise ValueError(f"{self.identity['folder']}: the latent of image {row} is not finite")
        # Contiguous copies, which can be pinned.
        mean, std = (part.contiguous() for part in both.chunk(2, dim=1))
        return ImageBatch(mean, std, self._labels[rows])


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
    raise ValueError(
        f"data: expected the identity of shapes or latents, got {identity!r}; pass a source of "
        "your own as `source`"
    )


def same_data(now: dict[str, Any], then: Any) -> bool:
    """Return whether two identities are of the same images, in whatever folder."""
    return isinstance(then, dict) and {**now, "folder": None} == {**then, "folder": None}


def check_same_data(now: dict[str, Any], then: Any) -> None:
    """Raise a ValueError unless two identities are of the same images, in whatever folder."""
    if not same_data(now, then):
        advice = "to go on with other data, name them (--data) and say so (--new-data)"
        raise ValueError(f"data: the run was started on {then}, got {now}; {advice}")


def check_fits(config: DiTConfig, source: Source) -> None:
    """Raise a ValueError unless a model accepts a set's images and labels."""
    C, H, W = source.sample_shape
    if config.sample_shape != source.sample_shape:
        expected = f"in_channels={C}, img_size={H if H == W else (H, W)}"
        got = f"in_channels={config.in_channels}, img_size={config.img_size}"
        raise ValueError(f"config: the data are {C} x {H} x {W}, expected {expected}, got {got}")
    classes = len(source.label_names)
    if config.use_class_cond and config.num_classes != classes:
        got = f"num_classes={config.num_classes}"
        raise ValueError(f"config: the data have {classes} classes, got {got}")
