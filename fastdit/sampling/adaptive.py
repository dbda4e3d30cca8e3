"""The sampling loop of a solver that chooses its own steps."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdit import functional
from fastdit.sampling.loop import Loop, Progress, Request, progress_bar
from fastdit.sampling.predictors import Conditions

_FIRST_STEP = 0.01  # of time; where its error is too large, the method shortens it


def integrator() -> Callable[..., Any]:
    """Return the `odeint` of torchdiffeq; raise a ValueError where it is not installed."""
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        message = "solver: 'dopri5' needs the package torchdiffeq; pip install 'fastdit[ode]'"
        raise ValueError(message) from error
    return odeint


class AdaptiveLoop(Loop):
    """Solves a flow's equation for one image after another, eagerly.

    A step is accepted or not by the error of the whole state, so that images which are solved
    together would depend on each other. Every step waits for the device.
    """

    def sample(self, request: Request, progress: Progress) -> Tensor:
        ode = self.plan.table.ode
        assert ode is not None
        odeint, count = integrator(), itertools.count()
        self._predictor.refresh()
        with self._without_autocast(), progress_bar(progress) as bar:
            conditions = self._predictor.encode(request.conditions)
            x = self._start(request)[0].x
            x0 = torch.zeros_like(x)
            times = torch.tensor(ode.flow.span, dtype=torch.float64, device=x.device)
            # Without these the first step would be sought outside the span, and the last end there.
            options = {"first_step": _FIRST_STEP, "step_t": times[1:]}
            how = dict(rtol=ode.rtol, atol=ode.atol, method="dopri5", options=options)

            def velocity(image: int, t: Tensor, now: Tensor) -> Tensor:
                rows = slice(image, image + 1)
                change, x0[rows] = self._velocity(float(t), now, conditions, image)
                bar.update()
                if callable(progress):
                    progress(next(count), self._layout.to_images(x0).clone())
                return change

            for i in range(len(x)):
                now = x[i : i + 1]
                x[i : i + 1] = odeint(functools.partial(velocity, i), now, times, **how)[-1]
            return self._layout.to_images(x)

    def _velocity(
        self, t: float, x: Tensor, conditions: Conditions | None, image: int
    ) -> tuple[Tensor, Tensor]:
        """Return the velocity of one image's state at time t, and the predicted x0."""
        ode, guidance, table_bytes = self.plan.table.ode, self.plan.guidance, self.plan.table_bytes
        assert ode is not None
        is_guided = guidance is not None and guidance.active(t)
        own, rows = conditions, 2 if is_guided else 1
        if conditions is not None:
            own = conditions.pick([image, len(conditions) // 2 + image][:rows])
        prepared = self._predictor.begin([t * ode.flow.time_scale], own, table_bytes)
        change, x0 = functional.sampler_update(
            x,
            self._predictor(x, prepared.rows(0, rows), *prepared.constants(rows)),
            ode.row(t).to(x.device, x.dtype),
            0,
            guidance=guidance if is_guided else None,
        )
        if not change.isfinite().all():  # torchdiffeq would only say that its steps get too short
            raise FloatingPointError(
                f"model: expected finite predictions, but at t = {t:g} they hold NaN or Inf; "
                f"{self.dtype} may be too narrow for it"
            )
        return change, x0
