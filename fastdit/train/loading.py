"""Loading a run's batches: the order of the images, and this process's part of each batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from fastdit.data.features import Features
from fastdit.noise import philox4x32
from fastdit.train.batches import BatchChecker
from fastdit.train.changes import Numbering
from fastdit.train.objective import random_key
from fastdit.train.recipe import Recipe
from fastdit.train.runtime import Runtime
from fastdit.train.sources import FeaturedBatch, ImageBatch, Source, variants_of

Batch = ImageBatch | FeaturedBatch


class BatchLoader:
    """Loads this process's micro-batches of every step, the next one in a background thread."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        runtime: Runtime,
        prefetch: bool | None = None,
        *,
        num_classes: int | None = None,
        numbering: Numbering | None = None,
        features: Features | None = None,
    ) -> None:
        """Prepare to load the batches of a recipe, whose size must divide into micro-batches.

        Args:
            source: the images.
            recipe: for steps, batch size and seed.
            runtime: for the device, the processes and the micro-batches.
            prefetch: whether to load the next batch in the background; None does where a GPU
                computes. On a CPU it costs more than it saves: every thread that runs PyTorch ops
                has its own OpenMP pool, and two pools that share the CPUs wait for each other at
                every op (measured on two CPUs: 62 ms per step of the toy instead of 33 ms).
            num_classes: number of the model's classes, for the labels' range; None does not look
                at labels, which suits a model without classes.
            numbering: the numbers of the samples; None is that of a run that never changed.
            features: an encoder's of the images, which the batches get too; row `r + k * images` is
                that of variant k of image r.
        """
        self._source, self._recipe, self._runtime = source, recipe, runtime
        self._features = features
        self._prefetch = runtime.device.type != "cpu" if prefetch is None else prefetch
        self._numbering = numbering or Numbering(recipe.batch_size)
        self._order = ShuffledOrder(len(source), recipe.seed, self._numbering.data_sample)
        self._checker = BatchChecker(
            source.sample_shape,
            num_classes,
            halves=runtime.precision != "float32",
            warns=runtime.world.rank == 0,
        )
        self._variants, self._key = variants_of(source), random_key(recipe.seed, "variants")
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="fastdit-data")
        self._next: tuple[tuple[int, int], Future[Batch]] | None = None

    def load(self, step: int, micro_batch: int = 0) -> tuple[Batch, Tensor]:
        """Return a micro-batch on the run's device: (images, [b] int64 sample numbers)."""
        device = self._runtime.device
        numbers = self._numbers(step, micro_batch)
        if self._next is not None and self._next[0] == (step, micro_batch):
            images = self._next[1].result()
        else:
            images = self._take(numbers)
        last = micro_batch == self._runtime.accumulate - 1
        following = (step + 1, 0) if last else (step, micro_batch + 1)
        self._next = None
        if self._prefetch and following[0] < self._recipe.steps:
            self._next = following, self._worker.submit(self._take, self._numbers(*following))
        on_device = _each(images, lambda t: t.to(device, non_blocking=True))
        return on_device, torch.arange(numbers.start, numbers.stop, device=device)

    def _numbers(self, step: int, micro_batch: int) -> range:
        """Return the numbers of the samples in this process's micro-batch."""
        world, parts = self._runtime.world, self._runtime.accumulate
        size = self._recipe.batch_size // (world.size * parts)
        first = self._numbering.first(step) + (world.rank * parts + micro_batch) * size
        return range(first, first + size)

    def _take(self, numbers: range) -> Batch:
        rows = self._order.rows(numbers.start, len(numbers))
        versions = rows
        if self._variants > 1:
            drawn = draw_variants(self._key, numbers, self._variants)
            versions = rows + drawn * len(self._source)
        checked = self._checker.check(self._source.take(versions), rows)
        images: Batch = checked
        if self._features is not None:
            images = FeaturedBatch(*checked, self._features.take(versions))
        if self._runtime.device.type != "cuda":
            return images
        return _each(images, lambda t: t.pin_memory())


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Return a batch with each of its tensors changed."""
    parts = (None if t is None else change(t) for t in batch)
    return type(batch)(*parts)  # type: ignore[arg-type]


def draw_variants(key: int, numbers: range, variants: int) -> Tensor:
    """Return which variant of its image each sample shows, [len(numbers)] int64 on the host.

    It follows from the key and the sample's number alone, as a word of Philox (`fastdit.noise`).
    """
    n = torch.arange(numbers.start, numbers.stop)
    zero = torch.zeros_like(n)
    word = philox4x32((n, zero, zero, zero), torch.full_like(n, key))[0]
    return (word * variants) >> 32


class ShuffledOrder:
    """The image that each sample of a run shows, in passes over the set, each shuffled anew."""

    def __init__(self, size: int, seed: int, first: int = 0) -> None:
        """Order a set of `size` images, of which sample number `first` is the first one.

        The same seed and first number give the same order.
        """
        self._size, self._first = size, first
        # A run that changed its data goes on in new orders, not in those that it has used.
        self._name = f"{seed}/order" if first == 0 else f"{seed}/order from {first}"
        self._pass: tuple[int, Tensor] | None = None

    def rows(self, first: int, count: int) -> Tensor:
        """Return [count] int64 on the host: the image of each sample from number `first` on."""
        first -= self._first
        rows, n = [], first
        while n < first + count:
            turn, place = divmod(n, self._size)
            part = self._shuffled(turn)[place : place + first + count - n]
            rows.append(part)
            n += len(part)
        return torch.cat(rows)

    def _shuffled(self, turn: int) -> Tensor:
        kept = self._pass  # another thread may replace it
        if kept is None or kept[0] != turn:
            text = f"{self._name}/{turn}".encode()
            seed = int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")
            generator = torch.Generator().manual_seed(seed)
            self._pass = kept = turn, torch.randperm(self._size, generator=generator)
        return kept[1]
