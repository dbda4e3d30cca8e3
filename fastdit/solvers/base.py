"""What a solver is: a table of coefficients, made of its rows and of what the model predicts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastdit.diffusion import DiffusionScheduler, spaced_timesteps
from fastdit.errors import check_positive
from fastdit.flow import FlowMatching, Process
from fastdit.update import Coefficients

# Columns of a table: a bound that does not clip, and logarithms of no noise.
_MAY_BE_INFINITE = ("x0_limit", "log_sigma_low", "log_sigma_high")

# The solvers by name, filled by the package.
SOLVERS: dict[str, Solver] = {}


def default_solver(process: Process) -> str:
    """Return the name of the solver that a process is sampled by where none is asked for."""
    return "euler" if isinstance(process, FlowMatching) else "ddpm"


def number(name: str, value: Any) -> float:
    """Return a value as a float; raise a ValueError where it is no number."""
    if isinstance(value, str | bool):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: expected a number, got {value!r:.40}") from error


def positive(name: str, value: Any) -> float:
    """Return a value as a float; raise a ValueError unless it is positive and finite."""
    value = number(name, value)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected a positive number, got {value}")
    return value


class Ode(NamedTuple):
    """A flow's differential equation, for a method that chooses its own steps."""

    flow: FlowMatching
    clip: float | None
    rtol: float
    atol: float

    def row(self, t: float) -> Tensor:
        """Return coefficients [1, 10] whose x_next is the velocity at time t."""
        at = torch.tensor([t], dtype=torch.float64)
        zero = torch.zeros_like(at)
        c = coefficients(at, x=zero, eps=torch.ones_like(at))
        return _stack(_from_velocity(self.flow, c, at), self.clip)


class StepTable(NamedTuple):
    """A loop's times and coefficients, one row for each evaluation of the model."""

    # [S], in the order in which the model is called at them: integers for a DiffusionScheduler,
    # floats for a FlowMatching.
    timesteps: list[int] | list[float]
    coefficients: Tensor  # [S, 10] float64 on the CPU, as `functional.sampler_update` takes them
    time_scale: float = 1  # a time times it is what the model gets; an integer keeps timesteps so
    noise_scale: float = 1.0  # the noise of a seed times it is the first state
    ode: Ode | None = None  # for a method that chooses its own steps; the table is then empty

    @property
    def model_times(self) -> list[int] | list[float]:
        """What the model is called with at the timesteps."""
        return [t * self.time_scale for t in self.timesteps]


class Nodes(NamedTuple):
    """The times that a solver steps through, noisiest first; each field is [S] float64."""

    signal: Tensor  # the image's amplitude in the state, such as sqrt(alpha_bar)
    noise: Tensor  # the noise's, such as sqrt(1 - alpha_bar)
    next_signal: Tensor  # the same after the step; 1 and 0 after the last
    next_noise: Tensor


@dataclass(frozen=True)
class Solver:
    """A rule for going from one timestep to the next.

    Attributes:
        clip: bound of the predicted x0 at every step, such as 1.0 for pixels; None does not clip.
            Where x0 is clipped, what is computed from it is that of the clipped x0.
    """

    clip: float | None = None

    processes: ClassVar[tuple[type, ...]] = (DiffusionScheduler,)

    def __post_init__(self) -> None:
        if self.clip is not None:
            object.__setattr__(self, "clip", number("clip", self.clip))
            if not self.clip > 0:
                raise ValueError(f"clip: expected a positive number, or None, got {self.clip}")

    def spacing(self, T: int, steps: int) -> list[int]:
        """Return the timesteps of a DiffusionScheduler to take, ascending."""
        return spaced_timesteps(T, steps)

    def rows(self, at: Nodes) -> tuple[list[int], Coefficients]:
        """Return the evaluations of a loop over S timesteps, in terms of predicted noise.

        Returns:
            (visits, coefficients): the index among the S times of each evaluation, and its
            coefficients, without those that predict x0.
        """
        raise NotImplementedError

    def table(self, process: Process, steps: int | None = None) -> StepTable:
        """Plan a loop.

        Args:
            process: the diffusion or the flow, and what its model predicts.
            steps: the number of steps; None takes all T of a DiffusionScheduler, and a flow's
                published number.

        Raises:
            ValueError: the solver cannot take that process or that number of steps.
        """
        self._check_process(process)
        assert isinstance(process, DiffusionScheduler)
        timesteps = self.spacing(process.T, process.T if steps is None else steps)[::-1]
        alpha_bar = process.tables["alpha_bars"][timesteps]
        following = torch.cat([alpha_bar[1:], alpha_bar.new_ones(1)])
        at = Nodes(*(f.sqrt() for a in (alpha_bar, following) for f in (a, 1 - a)))
        visits, c = self.rows(at)
        c = _predicting(process.prediction, c, at.signal[visits], at.noise[visits])
        return StepTable([timesteps[i] for i in visits], _stack(c, self.clip))

    def _check_process(self, process: Process) -> None:
        if not isinstance(process, self.processes):
            can = [name for name, s in SOLVERS.items() if isinstance(process, s.processes)]
            kind = type(process).__name__
            raise ValueError(
                f"solver: expected one that takes a {kind}, which are {', '.join(can)}; got {self}"
            )


@dataclass(frozen=True)
class FlowSolver(Solver):
    """A rule for going from one time of a flow to the next, on a fixed grid.

    The grid has equal steps between the ends of the flow's `span`, before the shift; or, with
    `last_size`, equal steps but the last.

    Attributes:
        shift: moves each time, counted from noise (s = 0) to data (1), to
            `shift s / (1 + (shift - 1) s)`. LightningDiT's 0.3 puts more steps near the noise, and
            so does 1/3, which is Stable Diffusion 3's shift of 3, counted from data to noise there.
            1 does not shift, and a DiffusionScheduler takes nothing else.
        last_size: how long before the data the last step begins, in time before the shift. None
            makes the last step as long as the others. `Euler.from_diffusers` sets it.

    Source: Esser et al. 2024 (Stable Diffusion 3), equation 23; LightningDiT's
    `transport/integrators.py`, whose shift is the reciprocal of theirs; for `last_size`, the
    `sigma_min` of diffusers' FlowMatchEulerDiscreteScheduler, which then steps to 0.
    """

    shift: float = 1.0
    last_size: float | None = field(default=None, kw_only=True)

    processes: ClassVar[tuple[type, ...]] = (FlowMatching,)
    flow_steps: ClassVar[int] = 250  # where none are asked for

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "shift", positive("shift", self.shift))
        if self.last_size is not None:
            size = number("last_size", self.last_size)
            if not 0 < size < 1:
                raise ValueError(f"last_size: expected a number between 0 and 1, got {size}")
            object.__setattr__(self, "last_size", size)

    def grid(self, flow: FlowMatching, steps: int) -> Tensor:
        """Return the times of a flow to step through before the shift: [steps + 1] float64."""
        if self.last_size is None:
            return equal_steps(flow, steps)
        _, end = flow.span
        left_out = abs(flow.clean_at - end)
        if not self.last_size > left_out:
            raise ValueError(
                f"last_size: expected more than {left_out:g}, which sampling of the flow leaves "
                f"out at the data, got {self.last_size}"
            )
        return steps_ending(flow, steps, self.last_size, end)

    def flow_rows(self, flow: FlowMatching, times: Tensor) -> tuple[list[int], Coefficients]:
        """Return the evaluations of a loop over a flow's times, in terms of velocity.

        Args:
            flow: the flow.
            times: [S + 1] float64, from noise to data.

        Returns:
            (visits, coefficients): as `rows` does, but the column `eps` multiplies the velocity.
        """
        raise NotImplementedError

    def table(self, process: Process, steps: int | None = None) -> StepTable:
        if not isinstance(process, FlowMatching):
            if self.shift != 1 and isinstance(process, self.processes):
                raise ValueError(
                    f"shift: expected 1, since only a FlowMatching is shifted, got {self.shift}"
                )
            if self.last_size is not None and isinstance(process, self.processes):
                raise ValueError(
                    "last_size: expected None, since only a FlowMatching has times of its own, got "
                    f"{self.last_size}"
                )
            return super().table(process, steps)
        steps = self.flow_steps if steps is None else steps
        check_positive("steps", steps)
        times = self.grid(process, steps)
        if self.shift != 1:
            s = process.data_time(times)
            s = self.shift * s / (self.shift * s + (1 - s))  # so exactly 1 at the data
            times = s if process.clean_at else 1 - s
        visits, c = self.flow_rows(process, times)
        table = _stack(_from_velocity(process, c, times[visits]), self.clip)
        finite = table[:, [i for i, name in enumerate(c._fields) if name not in _MAY_BE_INFINITE]]
        if not finite.isfinite().all():
            raise ValueError(
                "solver: expected steps from the noise that all end before the data but the last, "
                f"got coefficients that are not finite; {self} puts times too near an end"
            )
        return StepTable(times[visits].tolist(), table, process.time_scale, process.noise_scale)


def equal_steps(flow: FlowMatching, steps: int) -> Tensor:
    """Return times between the ends of a flow's span: [steps + 1] float64."""
    return torch.linspace(*flow.span, steps + 1, dtype=torch.float64)


def steps_ending(flow: FlowMatching, steps: int, last_size: float, end: float) -> Tensor:
    """Return equal steps to `last_size` before the data, and one from there to `end`.

    Returns:
        [steps + 1] float64.
    """
    first, _ = flow.span
    longest = abs(flow.clean_at - first)
    if last_size > longest:
        expected = f"at most {longest:g}, where sampling of the flow begins"
        raise ValueError(f"last_size: expected {expected}, got {last_size}")
    before_last = 1 - last_size if flow.clean_at else last_size
    times = torch.linspace(first, before_last, steps, dtype=torch.float64)
    return torch.cat([times, times.new_tensor([end])])


def coefficients(like: Tensor, **columns: Tensor) -> Coefficients:
    """Return coefficients by name; the others are 0, and x0 is not clipped."""
    rest = dict.fromkeys(Coefficients._fields, torch.zeros_like(like))
    rest["x0_limit"] = torch.full_like(like, math.inf)
    return Coefficients(**rest | columns)


def interleaved(first: Coefficients, second: Coefficients) -> tuple[list[int], Coefficients]:
    """Return the evaluations of steps that call the model twice, at both ends of the step.

    The last step calls it once, for `first`: 2 S - 1 evaluations.
    """
    both = (torch.stack(pair, dim=1).flatten()[:-1] for pair in zip(first, second, strict=True))
    visits = [i // 2 + i % 2 for i in range(2 * len(first.x) - 1)]
    return visits, Coefficients(*both)


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


def _from_velocity(flow: FlowMatching, c: Coefficients, t: Tensor) -> Coefficients:
    """Turn coefficients of a velocity into those of what the model returns at times t."""
    x0, v = flow.denoised_from(t), flow.velocity_from(t)
    return c._replace(x0_x=x0.x, x0_eps=x0.out, x=c.x + c.eps * v.x, eps=c.eps * v.out)


def _stack(c: Coefficients, clip: float | None) -> Tensor:
    """Return the columns side by side; where x0 is clipped, the step is written in x0 alone."""
    if clip is not None:
        share = c.eps / c.x0_eps
        c = c._replace(
            x=c.x - share * c.x0_x,
            eps=torch.zeros_like(share),
            x0=c.x0 + share,
            x0_limit=torch.full_like(c.x, clip),
        )
    return torch.stack(c, dim=1)
