"""The noise of the images that one call of `fastdit sample` makes, and a batch of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fastdit.cli.memory import bytes_asked_for, is_out_of_memory, largest_batch
from fastdit.sampling.loop import Progress
from fastdit.sampling.sampler import Sampler


@dataclass(frozen=True)
class Noise:
    """Which noise each image of a call has.

    Attributes:
        seed: image i of the call has the stream `first + i` of this seed.
        first: index of the call's first image.
        seeds: if there are any, image i has the seed `seeds[i % len(seeds)]`, and its stream 0.
    """

    seed: int
    first: int = 0
    seeds: tuple[int, ...] = ()

    def check(self, count: int) -> None:
        """Raise a ValueError unless there is noise for so many images."""
        if not self.seeds and self.first + count > 2**32:
            got = f"got {self.first} and {count} images"
            raise ValueError(f"--first-index: expected at most 2^32 images of a seed, {got}")


def parse_noise(
    seed: int, first_index: int, seeds: str | None, count: int | None, num_images: int | None
) -> Noise:
    """Return the noise for a command's options.

    Raises:
        ValueError: the seeds are not integers, or another option that they replace is given.
    """
    if seeds is None:
        return Noise(seed, first_index)
    others = {"--seed": seed, "--first-index": first_index, "--count": count}
    for flag, value in {**others, "--num-images": num_images}.items():
        if value:
            raise ValueError(f"--seeds: expected no {flag} beside it, got {flag} {value}")
    words = [word.strip() for word in seeds.split(",")]
    for word in words:
        if not word.isdecimal():
            raise ValueError(f"--seeds: expected integers from 0, comma-separated, got {word!r}")
    return Noise(seed, seeds=tuple(map(int, words)))


def sample_batch(
    sampler: Sampler, labels: list[int], noise: Noise, first: int, progress: bool = False
) -> Tensor:
    """Sample the images `first`, first + 1, ... of a call, one for each label.

    Raises:
        ValueError: the batch needs more memory than there is; the message names one that fits.
    """

    def make(size: int, progress: Progress) -> Tensor:
        return _sample(sampler, labels[:size], noise, first, progress)

    return within_memory(sampler, make, len(labels), progress)


def within_memory(
    sampler: Sampler, make: Callable[[int, Progress], Tensor], count: int, progress: bool = False
) -> Tensor:
    """Return `make(count, progress)`, which calls a sampler for the first `count` of a batch.

    Raises:
        ValueError: the batch needs more memory than there is; the message names one that fits.
    """
    try:
        return make(count, progress)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        asked = bytes_asked_for(error)
    # Past the except clause nothing refers to the failed call's tensors, except the sampler's own.
    sampler.__setstate__(sampler.__getstate__())

    def works(size: int) -> bool:
        try:
            make(size, _stop)
        except _FirstStep:
            return True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return False

    device = next(sampler.model.parameters()).device
    fits = largest_batch(count, asked if device.type == "cpu" else None, works)
    advice = f"--batch-size {fits} fits" if fits else "not even one does; take a 16-bit --dtype"
    what = f"{count} images at once do not fit into the memory of {device}"
    raise ValueError(f"--batch-size: {what}; {advice}")


class _FirstStep(Exception):
    """A batch has taken its first step, in which it needs as much memory as in any other."""


def _stop(k: int, x0: Tensor) -> None:
    raise _FirstStep


def _sample(
    sampler: Sampler, labels: list[int], noise: Noise, first: int, progress: Progress
) -> Tensor:
    conditional = sampler.config is None or sampler.config.use_class_cond
    given = labels if conditional else None
    index = noise.first + first
    if noise.seeds:
        keys = [noise.seeds[(first + i) % len(noise.seeds)] for i in range(len(labels))]
    elif conditional:
        return sampler(given, noise.seed, first_index=index, progress=progress)
    else:  # the seeds alone tell how many images there are
        keys = [noise.seed + index + i for i in range(len(labels))]
    return sampler(given, seeds=keys, progress=progress)
