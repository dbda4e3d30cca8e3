"""The speed of a training run, and its share of what the device can do."""

from __future__ import annotations

import math
import time

import torch

from fastdit import flops
from fastdit.config import DiTConfig
from fastdit.train.runtime import PRECISIONS, Runtime


class Meter:
    """Measures the speed of a run's steps, without the time that saving and sampling take."""

    def __init__(self, config: DiTConfig, batch_size: int, runtime: Runtime, step: int) -> None:
        """Measure the device's speed in a large matrix product, and start timing at a step."""
        dtype = PRECISIONS[runtime.precision] or torch.float32
        self._peak = flops.product_rate(runtime.device, dtype) * runtime.world.size
        self._flop, self._batch_size = flops.training_flop(config, 1), batch_size
        self._images, self._seconds = 0, 0.0
        self.first_step_seconds = math.nan
        self._step, self._since = step, time.perf_counter()

    @property
    def awaits_first_step(self) -> bool:
        """Whether nothing has been read yet; the first step is timed alone, since it compiles."""
        return math.isnan(self.first_step_seconds)

    def read(self, step: int) -> dict[str, float]:
        """Return the speed since the last reading, once all steps are computed.

        The first reading, which may include the compilation, returns nothing.
        """
        now = time.perf_counter()
        images, seconds = (step - self._step) * self._batch_size, now - self._since
        self._step, self._since = step, now
        if self.awaits_first_step:
            self.first_step_seconds = seconds
            return {}
        if not images:
            return {}
        self._images, self._seconds = self._images + images, self._seconds + seconds
        rate = images / seconds
        return {"images_per_second": rate, "mfu": rate * self._flop / self._peak}

    def pause(self) -> None:
        """Do not count the time since the last reading."""
        self._since = time.perf_counter()

    @property
    def images_per_second(self) -> float:
        """The speed over all readings; NaN if there were none."""
        return self._images / self._seconds if self._images else math.nan
