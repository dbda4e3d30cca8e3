"""What a training's speed is, and what share of the device's that is."""

from __future__ import annotations

import math
import time

import torch

from fastdit import flops
from fastdit.config import DiTConfig
from fastdit.train.runtime import PRECISIONS, Runtime


class Meter:
    """Rates of a run's steps, without the time that saving and sampling take."""

    def __init__(self, config: DiTConfig, batch_size: int, runtime: Runtime, step: int) -> None:
        """Begin at a step; the device's rate in a large matrix product is measured now."""
        dtype = PRECISIONS[runtime.precision] or torch.float32
        self._peak = flops.product_rate(runtime.device, dtype) * runtime.world.size
        self._flop, self._batch_size = flops.training_flop(config, 1), batch_size
        self._images, self._seconds = 0, 0.0
        self.first_step_seconds = math.nan
        self._step, self._since = step, time.perf_counter()

    @property
    def first(self) -> bool:
        """Whether no step has been read yet: the first holds the compilation."""
        return math.isnan(self.first_step_seconds)

    def read(self, step: int) -> dict[str, float]:
        """Rates of the steps since the last reading, all of them computed; none of the first."""
        now = time.perf_counter()
        images, seconds = (step - self._step) * self._batch_size, now - self._since
        self._step, self._since = step, now
        if self.first:
            self.first_step_seconds = seconds
            return {}
        if not images:
            return {}
        self._images, self._seconds = self._images + images, self._seconds + seconds
        rate = images / seconds
        return {"images_per_second": rate, "mfu": rate * self._flop / self._peak}

    def pause(self) -> None:
        """What went before this, since the last reading, was no training."""
        self._since = time.perf_counter()

    @property
    def images_per_second(self) -> float:
        """Over all that was read; NaN where that was nothing."""
        return self._images / self._seconds if self._images else math.nan
