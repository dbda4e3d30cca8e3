"""What a model is trained on: the coloured shapes, or latents that `fastdit encode` wrote."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastdit.config import DiTConfig
from fastdit.data.latents import LatentShards
from fastdit.data.shapes import IMG_SIZE, LABEL_NAMES, coloured_shapes


class Samples(NamedTuple):
    """Some images: a normal distribution each, or of spread None the images themselves."""

    mean: Tensor  # [b, C, H, W] float32
    std: Tensor | None  # like mean
    labels: Tensor  # [b] int64


class Source(Protocol):
    """A set of labelled images.

    Attributes:
        sample_shape: [C, H, W] of one.
        label_names: of its classes.
        identity: what tells it from another set, for JSON; `open_source` makes it again.
    """

    sample_shape: tuple[int, int, int]
    label_names: tuple[str, ...]
    identity: dict[str, Any]

    def __len__(self) -> int: ...

    def take(self, rows: Tensor) -> Samples:
        """The images of some rows, [b] int64 on the host."""
        ...


class Shapes:
    """The coloured shapes, `fastdit.data`."""

    sample_shape = (3, IMG_SIZE, IMG_SIZE)
    label_names = LABEL_NAMES

    def __init__(self, per_class: int = 200, seed: int = 0) -> None:
        """Draw the set, as `coloured_shapes` does."""
        if type(per_class) is not int or not 1 <= per_class < 2**31:
            raise ValueError(f"per_class: expected a positive integer, got {per_class!r}")
        self.images, self.labels = coloured_shapes(per_class, seed)
        self.identity = {"kind": "shapes", "per_class": per_class, "seed": seed}

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Tensor) -> Samples:
        return Samples(self.images[rows], None, self.labels[rows])


class Latents:
    """Latents on disk, of which every pass over the set draws others."""

    def __init__(self, folder: str | Path) -> None:
        """Open the shards of `fastdit encode`.

        Raises:
            ValueError: there are none, or not all of them.
        """
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

    def take(self, rows: Tensor) -> Samples:
        both = torch.from_numpy(np.stack([self._shards.row(i) for i in rows.tolist()]))
        if not both.isfinite().all():
            row = int(rows[(~both.flatten(1).isfinite()).any(1)][0])
            raise ValueError(f"{self.identity['folder']}: the latent of image {row} is not finite")
        # Each in memory of its own, which can be pinned.
        mean, std = (part.contiguous() for part in both.chunk(2, dim=1))
        return Samples(mean, std, self._labels[rows])


def open_source(identity: Any) -> Source:
    """The set whose `identity` that is.

    Raises:
        ValueError: it is of no kind known here, or is not where it was or not what it was.
    """
    match identity:
        case {"kind": "shapes", "per_class": per_class, "seed": seed}:
            return Shapes(per_class, seed)
        case {"kind": "latents", "folder": str(folder)}:
            source = Latents(folder)
            check_same(source.identity, identity)
            return source
    raise ValueError(f"data: expected the identity of shapes or latents, got {identity!r}")


def check_same(now: dict[str, Any], then: dict[str, Any]) -> None:
    """Raise a ValueError unless two identities are of the same images; a folder may move."""
    if {**now, "folder": None} != {**then, "folder": None}:
        raise ValueError(f"data: the run was started on {then}, got {now}")


def check_fits(config: DiTConfig, source: Source) -> None:
    """Raise a ValueError unless a model takes a set's images and labels."""
    C, H, W = source.sample_shape
    if H != W:
        raise ValueError(f"data: expected square images, got {H} x {W}")
    if config.sample_shape != source.sample_shape:
        raise ValueError(
            f"config: the data are {C} x {H} x {W}, expected in_channels={C}, img_size={H}, "
            f"got in_channels={config.in_channels}, img_size={config.img_size}"
        )
    classes = len(source.label_names)
    if config.use_class_cond and config.num_classes != classes:
        raise ValueError(
            f"config: the data have {classes} classes, got num_classes={config.num_classes}"
        )


class Ahead:
    """Takes the next step's samples from a source while this step's are computed with.

    Where the host computes them itself that would cost more than it saves: every thread that runs
    PyTorch's ops has a pool of OpenMP threads of its own, and two pools that share the CPUs wait
    for each other at every op (measured on two CPUs: 62 ms a step of the toy for 33).
    """

    def __init__(self, source: Source, device: torch.device, in_background: bool) -> None:
        """Of a source, to a device; without a background each call takes its own samples."""
        self._source, self._device, self._in_background = source, device, in_background
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="fastdit-data")
        self._next: tuple[list[int], Future[Samples]] | None = None

    def take(self, rows: Tensor, following: Tensor | None) -> Samples:
        """The samples of `rows` on the device; `following` are those asked for next."""
        if self._next is not None and self._next[0] == rows.tolist():
            samples = self._next[1].result()
        else:
            samples = self._load(rows)
        self._next = None
        if following is not None and self._in_background:
            self._next = (following.tolist(), self._worker.submit(self._load, following))
        parts = (None if t is None else t.to(self._device, non_blocking=True) for t in samples)
        return Samples(*parts)  # type: ignore[arg-type]

    def _load(self, rows: Tensor) -> Samples:
        samples = self._source.take(rows)
        if self._device.type != "cuda":
            return samples
        return Samples(*(None if t is None else t.pin_memory() for t in samples))  # type: ignore[arg-type]


class Order:
    """Which image the samples of a run are, in passes over the set, each shuffled anew."""

    def __init__(self, size: int, seed: int) -> None:
        """Of a set of so many images; the same seed is the same order."""
        self._size, self._seed = size, seed
        self._pass: tuple[int, Tensor] | None = None

    def rows(self, first: int, count: int) -> Tensor:
        """[count] int64: the images of samples `first` and those after it, on the host."""
        rows, n = [], first
        while n < first + count:
            turn, place = divmod(n, self._size)
            part = self._shuffled(turn)[place : place + first + count - n]
            rows.append(part)
            n += len(part)
        return torch.cat(rows)

    def _shuffled(self, turn: int) -> Tensor:
        if self._pass is None or self._pass[0] != turn:
            text = f"{self._seed}/order/{turn}".encode()
            seed = int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")
            generator = torch.Generator().manual_seed(seed)
            self._pass = turn, torch.randperm(self._size, generator=generator)
        return self._pass[1]
