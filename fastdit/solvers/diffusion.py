"""Solvers of a `DiffusionScheduler` alone."""

from __future__ import annotations

from dataclasses import dataclass

from fastdit.diffusion import strided_timesteps
from fastdit.solvers.base import Nodes, Solver, coefficients, number
from fastdit.update import Coefficients


@dataclass(frozen=True)
class DDPM(Solver):
    """Ancestral sampling.

        x' = (x - beta / sqrt(1 - alpha_bar) * eps) / sqrt(alpha) + sigma * z

    with z = 0 in the last step. sigma^2 is the posterior's variance, beta (1 - alpha_bar') /
    (1 - alpha_bar). Where the model returns 2C channels it is learned: the last C channels v
    interpolate log sigma^2 between the posterior's (v = -1) and log beta (v = 1). With fewer steps
    than T, alpha and beta are those of the diffusion between the steps that are taken.

    Timesteps: `spaced_timesteps`, the published "250".

    Source: Ho et al. 2020, algorithm 2; Nichol & Dhariwal 2021, equation 15 and section 4.
    """

    def rows(self, at: Nodes) -> tuple[list[int], Coefficients]:
        root_alpha = at.signal / at.next_signal
        beta = 1 - root_alpha**2
        sigma = beta.sqrt() * at.next_noise / at.noise
        c = coefficients(
            beta,
            x=1 / root_alpha,
            eps=-beta / (at.noise * root_alpha),
            sigma=sigma,
            log_sigma_low=sigma.log(),
            log_sigma_high=beta.log() / 2,
        )
        return list(range(len(beta))), c


@dataclass(frozen=True)
class DDIM(Solver):
    """DDIM: deterministic at eta = 0, and as noisy as ancestral sampling at eta = 1.

        x' = a' x0 + sqrt(s'^2 - sigma^2) eps + sigma z
        sigma = eta * s' / s * sqrt(1 - a^2 / a'^2)

    A learned variance is not used.

    Timesteps: `strided_timesteps`, the published "ddim50".

    Source: Song et al. 2021 (DDIM), equations 12 and 16.

    Attributes:
        eta: from 0 to 1.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "eta", number("eta", self.eta))
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta: expected a number from 0 to 1, got {self.eta}")

    def spacing(self, T: int, steps: int) -> list[int]:
        return strided_timesteps(T, steps)

    def rows(self, at: Nodes) -> tuple[list[int], Coefficients]:
        variance = 1 - (at.signal / at.next_signal) ** 2
        sigma = self.eta * at.next_noise / at.noise * variance.sqrt()
        eps = (at.next_noise**2 - sigma**2).clamp(min=0).sqrt()
        c = coefficients(
            sigma,
            eps=eps,
            x0=at.next_signal,
            sigma=sigma,
            log_sigma_low=sigma.log(),
            log_sigma_high=sigma.log(),
        )
        return list(range(len(sigma))), c
