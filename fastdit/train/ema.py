"""A moving average of a model's weights, which samples better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastdit.train.distributed import local


class EMA:
    """`average = decay * average + (1 - decay) * weights`, in float32, for all weights at once.

    Of a split model each process keeps the average of its own part.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Begin at the weights of now: (name, parameter) of those that are trained."""
        self._weights = {name: p for name, p in parameters}
        self.averages: dict[str, Tensor] = {
            name: p.detach().clone() for name, p in self._weights.items()
        }

    def update(self, decay: float) -> None:
        """Take the weights of now into the average."""
        averages = [local(t) for t in self.averages.values()]
        weights = [local(t) for t in self._weights.values()]
        torch._foreach_lerp_(averages, weights, 1 - decay)
