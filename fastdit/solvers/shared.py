"""Solvers of a `DiffusionScheduler` and of a `FlowMatching` alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdit.diffusion import DiffusionScheduler
from fastdit.flow import FlowMatching
from fastdit.solvers.base import FlowSolver, Nodes, coefficients, interleaved
from fastdit.update import Coefficients


@dataclass(frozen=True)
class DPMSolverPP(FlowSolver):
    """DPM-Solver++(2M): second order, one evaluation a step, deterministic.

    With lambda = ln(a / s), h the step in lambda and r the previous step's h over this one's:

        D  = (1 + 1 / (2r)) x0 - 1 / (2r) x0_prev
        x' = s' / s x - a' (exp(-h) - 1) D

    The first and the last step, which goes to s = 0, are of first order. Where a flow begins with
    no signal, ln(a / s) is minus infinity and so is the first h; the second step is then of first
    order too.

    Timesteps: `spaced_timesteps`; of a flow equal steps, 50 unless another number is asked for.

    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2.
    """

    processes = (DiffusionScheduler, FlowMatching)
    flow_steps = 50

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
