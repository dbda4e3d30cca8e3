"""A moving average of a model's weights, which samples better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fastdit.train.distributed import local_tensor


class EMA:
    """The exponential moving average of all trained weights, in float32.

    `average = decay * average + (1 - decay) * weights`. If the model is split over processes, each
    process averages its own part.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Start from the current values of the trained parameters, given as (name, parameter)."""
        self._weights = dict(parameters)
        self.averages = {name: p.detach().clone() for name, p in self._weights.items()}

    def update(self, decay: float) -> None:
        """Add the current weights to the average."""
        averages = [local_tensor(t) for t in self.averages.values()]
        weights = [local_tensor(t) for t in self._weights.values()]
        torch._foreach_lerp_(averages, weights, 1 - decay)
