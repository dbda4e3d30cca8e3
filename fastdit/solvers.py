"""The update rules of sampling, each a table of coefficients that reads like its paper's box."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdit.diffusion import DiffusionScheduler
from fastdit.reference import Coefficients


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: `eps = eps_null + scale * (eps_cond - eps_null)`.

    Attributes:
        scale: 1 is the conditional prediction, 0 the one with the null label.
        interval: (low, high): timesteps low <= t < high are guided, the others take the
            conditional prediction and never compute the null one. None: all.
        channels: how many channels of eps, from the first, are guided (None: all). The other
            channels and a learned variance are the conditional prediction's. Peebles & Xie's
            `forward_with_cfg` guides 3 of the 4 latent channels.

    Source: Ho & Salimans 2022, equation 6, with scale = 1 + w; Kynkäänniemi et al. 2024 for the
    interval.
    """

    scale: float
    interval: tuple[int, int] | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        # Plain numbers, whatever they came as: guidance is compared, hashed and compiled against.
        try:
            scale = float(self.scale)
        except (TypeError, ValueError):
            scale = math.nan
        if not math.isfinite(scale):
            raise ValueError(f"scale: expected a finite number, got {self.scale!r}")
        object.__setattr__(self, "scale", scale)
        if self.interval is not None:
            try:
                low, high = map(operator.index, self.interval)
            except (TypeError, ValueError):
                low, high = 0, 0
            if not 0 <= low < high:
                raise ValueError(
                    f"interval: expected integers 0 <= low < high, got {self.interval!r}"
                )
            object.__setattr__(self, "interval", (low, high))
        if self.channels is not None:
            try:
                channels = operator.index(self.channels)
            except TypeError:
                channels = 0
            if channels < 1:
                raise ValueError(
                    f"channels: expected an integer of at least 1, or None, got {self.channels!r}"
                )
            object.__setattr__(self, "channels", channels)

    def active(self, t: int) -> bool:
        """Whether timestep t is guided."""
        return self.interval is None or self.interval[0] <= t < self.interval[1]


@dataclass(frozen=True)
class Solver:
    """How the state moves from noise to image: one row of coefficients a model evaluation.

    Attributes:
        timesteps: S timesteps, in the order in which the model is called at them.
        coefficients: [S, 10] float64 on the host, as `functional.sampler_update` takes them.
    """

    timesteps: list[int]
    coefficients: Tensor


def ancestral_ddpm(scheduler: DiffusionScheduler) -> Solver:
    """Ancestral sampling over all T steps.

        x_{t-1} = (x_t - beta_t / sqrt(1 - alpha_bar_t) * eps) / sqrt(alpha_t) + sigma_t * z

    with z = 0 at t = 0, and sigma_t^2 = posterior_var_t; or, where the model returns 2C channels,
    learned: `log sigma_t^2` lies between `log posterior_var_t` (last channels at -1) and
    `log beta_t` (at 1).

    Source: Ho et al. 2020, algorithm 2; Nichol & Dhariwal 2021, equation 15.
    """
    c = {name: values.flip(0) for name, values in scheduler.tables.items()}
    zero = torch.zeros_like(c["betas"])
    rows = Coefficients(
        x0_x=c["alpha_bars"].rsqrt(),
        x0_eps=-(1 / c["alpha_bars"] - 1).sqrt(),
        x0_limit=torch.full_like(zero, math.inf),
        x=c["alphas"].rsqrt(),
        eps=-c["betas"] / c["sqrt_one_minus_alpha_bars"] * c["alphas"].rsqrt(),
        x0=zero,
        x0_prev=zero,
        sigma=c["posterior_var"].sqrt(),  # 0 at t = 0
        log_sigma_low=c["posterior_var"].log() / 2,
        log_sigma_high=c["betas"].log() / 2,
    )
    return Solver(list(reversed(range(scheduler.T))), torch.stack(rows, dim=1))


SOLVERS: dict[str, Callable[[DiffusionScheduler], Solver]] = {"ddpm": ancestral_ddpm}
