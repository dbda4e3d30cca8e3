"""Solvers of a `FlowMatching` alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdit.errors import check_positive, unknown_name
from fastdit.flow import Amplitudes, FlowMatching, Process
from fastdit.solvers.base import (
    FlowSolver,
    Ode,
    Solver,
    StepTable,
    coefficients,
    equal_steps,
    positive,
    steps_ending,
)
from fastdit.update import Coefficients


@dataclass(frozen=True)
class Euler(FlowSolver):
    """Euler's method: first order, one evaluation a step, deterministic.

        x' = x + (t' - t) v

    Times: equal steps before the shift, 250 unless another number is asked for.

    Source: Ma et al. 2024 (SiT), `transport/integrators.py`. An ODE with their `num_steps` n is
    n - 1 steps here, for SiT and LightningDiT alike.
    """

    @classmethod
    def from_diffusers(cls, shift: float = 1.0, T: int = 1000) -> Euler:
        """Return the solver with the times of diffusers' FlowMatchEulerDiscreteScheduler.

            Sampler(model, published_flow("SD3", 128), Euler.from_diffusers(shift=3.0), steps=28)

        Their grid is equal steps of sigma, the noise's amplitude, from 1 to the shifted 1 / T, and
        all of it is shifted; a step from there to 0 follows.

        Args:
            shift: their `shift`, which moves sigma up; that of the solver is its reciprocal. Stable
                Diffusion 3 and 3.5 are published with 3.
            T: their `num_train_timesteps`, at least 2.

        Raises:
            ValueError: shift is not positive, or T is less than 2.

        Source: diffusers' `schedulers/scheduling_flow_match_euler_discrete.py`.
        """
        check_positive("T", T)
        if T < 2:
            raise ValueError(f"T: expected at least 2, got {T}")
        shift = positive("shift", shift)
        return cls(shift=1 / shift, last_size=shift / (T + shift - 1))

    def flow_rows(self, flow: FlowMatching, times: Tensor) -> tuple[list[int], Coefficients]:
        dt = times.diff()
        return list(range(len(dt))), coefficients(dt, x=torch.ones_like(dt), eps=dt)


def _sbdm(at: Amplitudes, s: Tensor, norm: float) -> Tensor:
    return norm * (at.signal_rate / at.signal * at.noise**2 - at.noise * at.noise_rate)


# Of amplitudes with rates in s, which is 0 at the noise and 1 at the data; and of s, and a norm.
DIFFUSIONS: dict[str, Callable[[Amplitudes, Tensor, float], Tensor]] = {
    "constant": lambda at, s, norm: torch.full_like(s, norm),
    "SBDM": _sbdm,
    "sigma": lambda at, s, norm: norm * at.noise,
    "linear": lambda at, s, norm: norm * (1 - s),
    "decreasing": lambda at, s, norm: (norm * torch.cos(math.pi * s) + 1) ** 2 / 4,
    "increasing-decreasing": lambda at, s, norm: norm * torch.sin(math.pi * s) ** 2,
}
LAST_STEPS = ("mean", "tweedie", "euler", None)


@dataclass(frozen=True)
class EulerMaruyama(FlowSolver):
    """Euler-Maruyama's method on a stochastic equation with the same densities as the flow.

    With h = |t' - t|, w the diffusion at t and the score computed from the velocity:

        x' = x + (t' - t) v + h w score + sqrt(2 w h) z

    Times: equal steps to `last_size` before the data, and the last step from there, all before the
    shift: `steps` in all, 250 unless another number is asked for.

    Source: Ma et al. 2024 (SiT), section 2.4 and `transport/` of their code.

    Attributes:
        diffusion: w, in terms of s, which is 0 at the noise and 1 at the data, and of the
            amplitudes a of the image and b of the noise, the latter before the flow's
            `noise_scale`, whose square multiplies w: "constant" (norm), "SBDM"
            (norm (a' / a b^2 - b b')), "sigma" (norm b), "linear" (norm (1 - s)), "decreasing"
            ((norm cos(pi s) + 1)^2 / 4) or "increasing-decreasing" (norm sin(pi s)^2). SiT and REPA
            sample with "sigma" at norm 1.
        norm: see there.
        last_step: "mean" (the same without noise), "tweedie" (the predicted x0), "euler" (along the
            velocity), or None, with which all steps are alike and the last one adds noise too.
        last_size: of the last step, in time; not looked at where `last_step` is None.
    """

    diffusion: str = "sigma"
    norm: float = 1.0
    last_step: str | None = "mean"
    last_size: float | None = field(default=0.04, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.diffusion not in list(DIFFUSIONS):  # which need not be hashable
            raise unknown_name("diffusion", self.diffusion, DIFFUSIONS)
        if self.last_step not in LAST_STEPS:
            raise unknown_name("last_step", self.last_step, LAST_STEPS)
        object.__setattr__(self, "norm", positive("norm", self.norm))
        if self.last_size is None and self.last_step is not None:
            expected = f"a number where last_step is {self.last_step!r}"
            raise ValueError(f"last_size: expected {expected}, got None")

    def grid(self, flow: FlowMatching, steps: int) -> Tensor:
        if self.last_step is None or self.last_size is None:
            return equal_steps(flow, steps)
        return steps_ending(flow, steps, self.last_size, flow.clean_at)

    def flow_rows(self, flow: FlowMatching, times: Tensor) -> tuple[list[int], Coefficients]:
        t, dt = times[:-1], times.diff()
        h, at = dt.abs(), flow.amplitudes(t)
        w = self._diffusion(flow, t)
        # The score is -z / b, where x = a x0 + b z and v = a' x0 + b' z.
        scale = at.noise * (at.signal * at.noise_rate - at.signal_rate * at.noise)
        of_x, of_v = at.signal_rate / scale, -at.signal / scale
        x, v, x0, sigma = (
            1 + h * w * of_x,
            dt + h * w * of_v,
            torch.zeros_like(h),
            (2 * w * h) ** 0.5,
        )
        if self.last_step is not None:
            sigma[-1] = 0
        if self.last_step == "euler":
            x[-1], v[-1] = 1, dt[-1]
        if self.last_step == "tweedie":
            x[-1], v[-1], x0[-1] = 0, 0, 1
        columns = dict(x=x, eps=v, x0=x0, sigma=sigma)
        columns |= dict(log_sigma_low=sigma.log(), log_sigma_high=sigma.log())
        return list(range(len(dt))), coefficients(dt, **columns)

    def _diffusion(self, flow: FlowMatching, t: Tensor) -> Tensor:
        """Return w at times t."""
        plain, sign = flow.amplitudes(t), 1 if flow.clean_at else -1
        at = Amplitudes(
            plain.signal,
            plain.noise / flow.noise_scale,
            sign * plain.signal_rate,
            sign * plain.noise_rate / flow.noise_scale,
        )
        w = DIFFUSIONS[self.diffusion](at, flow.data_time(t), self.norm) * flow.noise_scale**2
        if not w.isfinite().all():
            finite = [name for name in DIFFUSIONS if name != self.diffusion]
            raise ValueError(
                f"solver: expected a diffusion that is finite at t = {t[0]:g}, where sampling the "
                f"{flow.path!r} path begins, such as {', '.join(finite)}; got {self.diffusion!r}, "
                "which divides by the amplitude of the image"
            )
        return w


@dataclass(frozen=True)
class Dopri5(Solver):
    """The adaptive Runge-Kutta method of Dormand and Prince: fifth order, deterministic.

    It chooses its own steps, so that each image is solved by itself: with those of a batch an image
    would depend on the others. It needs the package torchdiffeq, and runs eagerly.

    Source: Dormand & Prince 1980; SiT's default for ODEs, with these tolerances.

    Attributes:
        rtol: relative tolerance of a step's error.
        atol: absolute tolerance of a step's error.
    """

    rtol: float = 1e-3
    atol: float = 1e-6

    processes = (FlowMatching,)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rtol", "atol"):
            object.__setattr__(self, name, positive(name, getattr(self, name)))

    def table(self, process: Process, steps: int | None = None) -> StepTable:
        self._check_process(process)
        assert isinstance(process, FlowMatching)
        if steps is not None:
            raise ValueError(f"steps: expected None, since dopri5 chooses its steps, got {steps!r}")
        ode = Ode(process, self.clip, self.rtol, self.atol)
        nothing = torch.empty(0, 10, dtype=torch.float64)
        return StepTable([], nothing, process.time_scale, process.noise_scale, ode)
