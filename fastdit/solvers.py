"""The solvers of sampling; each is a table of coefficients, written like its paper's algorithm.

To add one, subclass `Solver` as a frozen dataclass, write its `rows`, and name it in `SOLVERS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit.diffusion import DiffusionScheduler, spaced_timesteps, strided_timesteps
from fastdit.update import Coefficients
from fastdit.update import Guidance as Guidance  # imported from here in release 0.1.0


def _number(name: str, value: Any) -> float:
    if isinstance(value, str | bool):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected a number, got {value!r}") from error


class StepTable(NamedTuple):
    """A loop's timesteps and coefficients, one row for each evaluation of the model."""

    timesteps: list[int]  # [S], in the order in which the model is called at them
    coefficients: Tensor  # [S, 10] float64 on the CPU, as `functional.sampler_update` takes them


class Nodes(NamedTuple):
    """The times that a solver steps through, noisiest first; each field is [S] float64."""

    signal: Tensor  # sqrt(alpha_bar): the image's amplitude in the state
    noise: Tensor  # sqrt(1 - alpha_bar)
    next_signal: Tensor  # the same after the step; 1 and 0 after the last
    next_noise: Tensor


@dataclass(frozen=True)
class Solver:
    """A rule for going from one timestep to the next.

    Attributes:
        clip: bound of the predicted x0 at every step, such as 1.0 for pixels; None does not clip.
            Where x0 is clipped, eps is recomputed from it.
    """

    clip: float | None = None

    def __post_init__(self) -> None:
        if self.clip is not None:
            object.__setattr__(self, "clip", _number("clip", self.clip))
            if not self.clip > 0:
                raise ValueError(f"clip: expected a positive number, or None, got {self.clip}")

    def spacing(self, T: int, steps: int) -> list[int]:
        """Return the timesteps to take, ascending."""
        return spaced_timesteps(T, steps)

    def rows(self, at: Nodes) -> tuple[list[int], Coefficients]:
        """Return the evaluations of a loop over S times, in terms of predicted noise.

        Returns:
            (visits, coefficients): the index among the S times of each evaluation, and its
            coefficients, without those that predict x0.
        """
        raise NotImplementedError

    def table(self, scheduler: DiffusionScheduler, steps: int | None = None) -> StepTable:
        """Plan a loop.

        Args:
            scheduler: the diffusion, and what its model predicts.
            steps: the number of steps; None takes all T.

        Raises:
            ValueError: the solver cannot take that number of steps.
        """
        timesteps = self.spacing(scheduler.T, scheduler.T if steps is None else steps)[::-1]
        alpha_bar = scheduler.tables["alpha_bars"][timesteps]
        following = torch.cat([alpha_bar[1:], alpha_bar.new_ones(1)])
        at = Nodes(*(f.sqrt() for a in (alpha_bar, following) for f in (a, 1 - a)))
        visits, c = self.rows(at)
        c = _predicting(scheduler.prediction, c, at.signal[visits], at.noise[visits])
        if self.clip is not None:
            c = _through_x0(c)._replace(x0_limit=torch.full_like(c.x, self.clip))
        return StepTable([timesteps[i] for i in visits], torch.stack(c, dim=1))


def _coefficients(like: Tensor, **columns: Tensor) -> Coefficients:
    """Return coefficients by name; the others are 0, and x0 is not clipped."""
    rest = dict.fromkeys(Coefficients._fields, torch.zeros_like(like))
    rest["x0_limit"] = torch.full_like(like, math.inf)
    return Coefficients(**rest | columns)


def _predicting(prediction: str, c: Coefficients, a: Tensor, s: Tensor) -> Coefficients:
    """Turn coefficients of epsilon into those of what the model returns, at amplitudes a and s.

    With x = a x0 + s eps, and v = a eps - s x0:

        eps:  x0 = (x - s eps) / a
        x0:   eps = (x - a x0) / s
        v:    x0 = a x - s v,  eps = s x + a v
    """
    if prediction == "epsilon":
        return c._replace(x0_x=1 / a, x0_eps=-s / a)
    if prediction == "sample":
        own = c._replace(x0_x=torch.zeros_like(a), x0_eps=torch.ones_like(a))
        return own._replace(x=c.x + c.eps / s, eps=-c.eps * a / s)
    return c._replace(x0_x=a, x0_eps=-s, x=c.x + c.eps * s, eps=c.eps * a)


def _through_x0(c: Coefficients) -> Coefficients:
    """Return the same step written in x0 without epsilon, so that clipping x0 has its effect."""
    share = c.eps / c.x0_eps
    return c._replace(x=c.x - share * c.x0_x, eps=torch.zeros_like(share), x0=c.x0 + share)


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
        c = _coefficients(
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
        object.__setattr__(self, "eta", _number("eta", self.eta))
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta: expected a number from 0 to 1, got {self.eta}")

    def spacing(self, T: int, steps: int) -> list[int]:
        return strided_timesteps(T, steps)

    def rows(self, at: Nodes) -> tuple[list[int], Coefficients]:
        variance = 1 - (at.signal / at.next_signal) ** 2
        sigma = self.eta * at.next_noise / at.noise * variance.sqrt()
        eps = (at.next_noise**2 - sigma**2).clamp(min=0).sqrt()
        c = _coefficients(
            sigma,
            eps=eps,
            x0=at.next_signal,
            sigma=sigma,
            log_sigma_low=sigma.log(),
            log_sigma_high=sigma.log(),
        )
        return list(range(len(sigma))), c


@dataclass(frozen=True)
class DPMSolverPP(Solver):
    """DPM-Solver++(2M): second order, one evaluation a step, deterministic.

    With lambda = ln(a / s), h the step in lambda and r the previous step's h over this one's:

        D  = (1 + 1 / (2r)) x0 - 1 / (2r) x0_prev
        x' = s' / s x - a' (exp(-h) - 1) D

    The first and the last step, which goes to s = 0, are of first order.

    Timesteps: `spaced_timesteps`.

    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2.
    """

    def rows(self, at: Nodes) -> tuple[list[int], Coefficients]:
        h = (at.next_signal / at.next_noise).log() - (at.signal / at.noise).log()
        gain = -at.next_signal * torch.expm1(-h)
        half_over_r = torch.zeros_like(h)
        half_over_r[1:-1] = h[1:-1] / h[:-2] / 2
        c = _coefficients(
            h,
            x=at.next_noise / at.noise,
            x0=gain * (1 + half_over_r),
            x0_prev=-gain * half_over_r,
        )
        return list(range(len(h))), c


@dataclass(frozen=True)
class Heun(Solver):
    """Heun's method on the probability flow in sigma = s / a: second order, deterministic.

    With u = x / a the flow is du / dsigma = eps, and a step from sigma to sigma' is

        u~ = u + (sigma' - sigma) eps                     # Euler
        u' = u~ + (sigma' - sigma) / 2 * (eps~ - eps)     # eps~ at u~

    Every step evaluates the model twice, the second time at the next timestep, except the last
    step, which goes to sigma = 0 and is Euler's: 2 * steps - 1 evaluations in all. The first
    evaluation's eps is recomputed in the second as (u~ - x0_prev) / sigma'. This difference loses
    digits where a step is long: with two steps of the 1000-step cosine schedule float32 is off by
    a tenth, with 25 steps by less than a thousandth.

    Timesteps: `spaced_timesteps`.

    Source: Karras et al. 2022 (EDM), algorithm 1.
    """

    def rows(self, at: Nodes) -> tuple[list[int], Coefficients]:
        S = len(at.signal)
        delta = at.next_noise / at.next_signal - at.noise / at.signal
        euler = _coefficients(delta, x=at.next_signal / at.signal, eps=at.next_signal * delta)
        ratio = delta / 2 * at.next_signal / at.next_noise
        second = _coefficients(
            delta, x=1 - ratio, eps=at.next_signal * delta / 2, x0_prev=at.next_signal * ratio
        )
        interleaved = (
            torch.stack(pair, dim=1).flatten()[:-1] for pair in zip(euler, second, strict=True)
        )
        visits = [i // 2 + i % 2 for i in range(2 * S - 1)]
        return visits, Coefficients(*interleaved)


SOLVERS: dict[str, Solver] = {
    "ddpm": DDPM(),
    "ddim": DDIM(),
    "dpm++": DPMSolverPP(),
    "heun": Heun(),
}
