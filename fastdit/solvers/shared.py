"""Solvers of a `DiffusionScheduler` and of a `FlowMatching` alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdit.diffusion import DiffusionScheduler
from fastdit.errors import check_positive, unknown_name
from fastdit.flow import FlowMatching
from fastdit.solvers.base import FlowSolver, Nodes, coefficients, interleaved
from fastdit.update import Coefficients

LAST_TIMESTEPS = ("zero", "stride")


@dataclass(frozen=True)
class DPMSolverPP(FlowSolver):
    """DPM-Solver++(2M): second order, one evaluation a step, deterministic.

    With lambda = ln(a / s), h the step in lambda and r the previous step's h over this one's:

        D  = (1 + 1 / (2r)) x0 - 1 / (2r) x0_prev
        x' = s' / s x - a' (exp(-h) - 1) D

    The first and the last step, which goes to s = 0, are of first order. Where a flow begins with
    no signal, ln(a / s) is minus infinity and so is the first h; the second step is then of first
    order too.

    Timesteps: `spaced_timesteps`, or as `last_timestep` says; of a flow equal steps, 50 unless
    another number is asked for.

    Attributes:
        last_timestep: of a DiffusionScheduler, which a flow does not look at: "zero" takes equal
            distances from T - 1 to 0; "stride" takes equal distances that would reach 0 with one
            step more, and goes from the last of them to the image, as diffusers'
            DPMSolverMultistepScheduler does. PixArt is published with "stride" and 20 steps. The
            step to timestep 0 is by far the longest in lambda, and extrapolating over it costs more
            than it brings where steps are few.

    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2; diffusers'
    `schedulers/scheduling_dpmsolver_multistep.py`, `timestep_spacing="linspace"`, for "stride".
    """

    last_timestep: Literal["zero", "stride"] = "zero"

    processes = (DiffusionScheduler, FlowMatching)
    flow_steps = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last_timestep not in LAST_TIMESTEPS:
            raise unknown_name("last_timestep", self.last_timestep, LAST_TIMESTEPS)

    def spacing(self, T: int, steps: int) -> list[int]:
        if self.last_timestep == "zero":
            return super().spacing(T, steps)
        check_positive("steps", steps)
        if steps >= T:
            expected = f"at most {T - 1}, since last_timestep='stride' leaves out timestep 0"
            raise ValueError(f"steps: expected {expected}, got {steps}")
        return [round(k * ((T - 1) / steps)) for k in range(1, steps + 1)]

    def rows(self, at: Nodes) -> tuple[list[int], Coefficients]:
        h = (at.next_signal / at.next_noise).log() - (at.signal / at.noise).log()
        gain = -at.next_signal * torch.expm1(-h)
        half_over_r = torch.zeros_like(h)
        half_over_r[1:-1] = h[1:-1] / h[:-2] / 2
        c = coefficients(
            h,
            x=at.next_noise / at.noise,
            x0=gain * (1 + half_over_r),
            x0_prev=-gain * half_over_r,
        )
        return list(range(len(h))), c

    def flow_rows(self, flow: FlowMatching, times: Tensor) -> tuple[list[int], Coefficients]:
        at = flow.amplitudes(times)
        return self.rows(Nodes(at.signal[:-1], at.noise[:-1], at.signal[1:], at.noise[1:]))


@dataclass(frozen=True)
class Heun(FlowSolver):
    """Heun's method on the probability flow: second order, deterministic.

    For a DiffusionScheduler it runs in sigma = s / a. With u = x / a the flow is du / dsigma = eps,
    and a step from sigma to sigma' is

        u~ = u + (sigma' - sigma) eps                     # Euler
        u' = u~ + (sigma' - sigma) / 2 * (eps~ - eps)     # eps~ at u~

    For a FlowMatching it runs in the model's time, with x for u and the velocity for eps.

    Every step evaluates the model twice, the second time at the next timestep, except the last
    step, which goes to sigma = 0 and is Euler's: 2 * steps - 1 evaluations in all. The first
    evaluation's eps is recomputed in the second, from u~ and x0_prev. In sigma this difference
    loses digits where a step is long: with two steps of the 1000-step cosine schedule float32 is
    off by a tenth, with 25 steps by less than a thousandth.

    Timesteps: `spaced_timesteps`; of a flow equal steps, JiT's 50 unless another number is asked
    for.

    Source: Karras et al. 2022 (EDM), algorithm 1; `denoiser.py` of JiT for flows.
    """

    processes = (DiffusionScheduler, FlowMatching)
    flow_steps = 50

    def rows(self, at: Nodes) -> tuple[list[int], Coefficients]:
        delta = at.next_noise / at.next_signal - at.noise / at.signal
        euler = coefficients(delta, x=at.next_signal / at.signal, eps=at.next_signal * delta)
        ratio = delta / 2 * at.next_signal / at.next_noise
        second = coefficients(
            delta, x=1 - ratio, eps=at.next_signal * delta / 2, x0_prev=at.next_signal * ratio
        )
        return interleaved(euler, second)

    def flow_rows(self, flow: FlowMatching, times: Tensor) -> tuple[list[int], Coefficients]:
        t, dt = times[:-1], times.diff()
        x0, v = flow.denoised_from(t), flow.velocity_from(t)
        # As x0_prev = p x + q v and x = x~ - dt v, v is (x0_prev - p x~) / (q - p dt).
        q = x0.out / v.out
        p = x0.x - q * v.x
        half = dt / 2 / (q - p * dt)
        euler = coefficients(dt, x=torch.ones_like(dt), eps=dt)
        second = coefficients(dt, x=1 + half * p, eps=dt / 2, x0_prev=-half)
        return interleaved(euler, second)
