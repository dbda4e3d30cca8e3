"""Classifier-free guidance, and the coefficients of a solver's step."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Coefficients(NamedTuple):
    """One step of a solver, in the order of the columns that `functional.sampler_update` takes.

    With c the coefficients:

        x0 = clamp(c.x0_x * x + c.x0_eps * eps, -c.x0_limit, c.x0_limit)
        x_next = c.x * x + c.eps * eps + c.x0 * x0 + c.x0_prev * x0_prev + c.sigma * z
    """

    x0_x: Tensor
    x0_eps: Tensor
    x0_limit: Tensor  # inf: no clipping
    x: Tensor
    eps: Tensor  # of what the model returns, be it noise or not; x0_eps likewise
    x0: Tensor
    x0_prev: Tensor
    sigma: Tensor  # 0: no noise is added, and the next two are not used
    log_sigma_low: Tensor  # log sigma of a learned variance where the model's v is -1
    log_sigma_high: Tensor  # and where v is 1


COEFFICIENTS = Coefficients._fields


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: `eps = eps_null + scale * (eps_cond - eps_null)`.

    Attributes:
        scale: 1 gives the conditional prediction, 0 the one with the null label.
        interval: (low, high), outside which the conditional prediction is taken and the null one
            is not computed. Integers are timesteps of a DiffusionScheduler, of which those with
            low <= t < high are guided. Floats are times of a FlowMatching, the model's own from 0
            to 1, of which those with low <= t <= high are guided. None guides all.
        channels: number of channels of eps, counted from the first, that are guided; None guides
            all. The other channels and a learned variance come from the conditional prediction.
            Peebles & Xie's `forward_with_cfg` guides 3 of the 4 latent channels.

    Raises:
        ValueError: a value is out of range; the message names it.

    Source: Ho & Salimans 2022, equation 6, with scale = 1 + w; Kynkäänniemi et al. 2024 for the
    interval.
    """

    scale: float
    interval: tuple[int, int] | tuple[float, float] | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        # Stored as plain Python numbers, since guidance is compared, hashed and compiled against.
        object.__setattr__(self, "scale", _finite(self.scale))
        if self.interval is not None:
            object.__setattr__(self, "interval", _interval(self.interval))
        if self.channels is not None:
            (channels,) = _integers([self.channels], count=1)
            if channels < 1:
                raise ValueError(
                    f"channels: expected an integer of at least 1, or None, got {self.channels!r}"
                )
            object.__setattr__(self, "channels", channels)

    def active(self, t: int | float) -> bool:
        """Return whether a timestep, which is an integer, or a flow's time, a float, is guided."""
        if self.interval is None:
            return True
        low, high = self.interval
        return low <= t <= high if isinstance(t, float) else low <= t < high


def _finite(value: Any) -> float:
    try:
        scale = float(value)
    except (TypeError, ValueError, OverflowError):
        scale = math.nan
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {value!r:.40}")
    return scale


def _interval(interval: Any) -> tuple[int, int] | tuple[float, float]:
    """Return two integers, or two floats where one of them is a float."""
    try:
        times = [float(value) for value in interval]
    except (TypeError, ValueError, OverflowError):
        times = []
    if not times or all(_is_integer(value) for value in interval):
        low, high = _integers(interval, count=2)
        if not 0 <= low < high:
            raise ValueError(f"interval: expected integers 0 <= low < high, got {interval!r}")
        return low, high
    if len(times) != 2 or not 0 <= times[0] < times[1] <= 1:
        raise ValueError(
            "interval: expected times 0 <= low < high <= 1 of a FlowMatching, or two integers, "
            f"timesteps of a DiffusionScheduler, got {interval!r}"
        )
    return times[0], times[1]


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _integers(values: Any, count: int) -> list[int]:
    """Return the values as Python integers; zeros where they are not `count` integers."""
    try:
        integers = [operator.index(value) for value in values]
    except TypeError:
        integers = []
    return integers if len(integers) == count else [0] * count
