"""The sampling loop: the base class of all executions, and the loop of single steps."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from fastdit import functional
from fastdit.ops.dispatch import choose
from fastdit.sampling.predictors import ClassLabels, ModelPredictor, Predictor
from fastdit.sampling.steps import Eager, Inputs, State, Step
from fastdit.sampling.text import PromptRows
from fastdit.solvers import StepTable
from fastdit.update import Guidance

Progress: TypeAlias = bool | Callable[[int, Tensor], None]

_NOISE_CHUNK = 2**18  # normals made at a time: a small batch's steps are made together


class Plan(NamedTuple):
    """The attributes of a sampler that its loop follows."""

    table: StepTable
    guidance: Guidance | None
    table_bytes: int  # bound of the modulation tables
    sample_shape: tuple[int, int, int]  # (C, H, W) of an image


class Request(NamedTuple):
    """What to sample: arguments of `Sampler.__call__` that have been checked."""

    # B rows, or 2B with null labels or negative prompts last
    conditions: ClassLabels | PromptRows | None
    keys: Tensor  # [B, 2] int64 (key, stream)
    x_T: Tensor | None  # [B, C, H, W]
    noise: Tensor | None  # [S, B, C, H, W]


class Loop(ABC):
    """Runs sampling loops of one predictor on one device and in one dtype."""

    def __init__(
        self, predictor: Predictor, device: torch.device, dtype: torch.dtype, plan: Plan
    ) -> None:
        self.device, self.dtype, self.plan = device, dtype, plan
        self._predictor, self._layout = predictor, predictor.layout

    @abstractmethod
    def sample(self, request: Request, progress: Progress) -> Tensor:
        """Return [B, C, H, W] images by the model's present weights.

        They are float32, or float64 if the forward is. Nothing in the loop waits for the device, so
        that progress counts steps that were launched.
        """

    def _without_autocast(self) -> contextlib.AbstractContextManager:
        """Turn autocast off, except for a model that is called as it is."""
        if isinstance(self._predictor, ModelPredictor):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, enabled=False)

    def _start(self, request: Request) -> tuple[State, Tensor]:
        """Return the state before the first step, and the solver's coefficients."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        if request.x_T is None:
            x = self._seeded(request.keys, torch.zeros(1, dtype=torch.int64, device=self.device))[0]
            if self.plan.table.noise_scale != 1:
                x = x * self.plan.table.noise_scale
        else:
            x = self._layout.to_state(request.x_T.to(self.device))
        # A copy, since the caller's x_T must not change, and no view, since a compiled step would
        # be compiled once more for the first state if it were one.
        x = x.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
        step = torch.zeros((), dtype=torch.int64, device=self.device)
        coefficients = self.plan.table.coefficients.to(self.device, dtype)
        return State(x, torch.zeros_like(x), step), coefficients

    def _seeded(self, keys: Tensor, steps: Tensor) -> Tensor:
        """Return the noise of some steps, each like the state, counted in the state's order."""
        z = functional.normal(keys, steps, self._layout.shape.numel())
        return z.view(*z.shape[:2], *self._layout.shape)


class StepLoop(Loop):
    """Runs one step after another: eagerly, compiled, or as a CUDA graph."""

    def __init__(
        self,
        predictor: Predictor,
        device: torch.device,
        dtype: torch.dtype,
        plan: Plan,
        step: Step,
    ) -> None:
        super().__init__(predictor, device, dtype, plan)
        self._step = step

    def sample(self, request: Request, progress: Progress) -> Tensor:
        table, guidance, table_bytes, _ = self.plan
        predictor, B = self._predictor, len(request.keys)
        predictor.refresh()
        guided = [guidance is not None and guidance.active(t) for t in table.timesteps]
        with self._without_autocast():
            conditions = predictor.encode(request.conditions)
            prepared = predictor.begin(table.model_times, conditions, table_bytes)
            state, coefficients = self._start(request)
            noise = self._noise(request, state.x, len(table.timesteps))
            steps = progress_bar(progress, guided)
            for k, (is_guided, (z, seeds)) in enumerate(zip(steps, noise, strict=True)):
                rows = 2 * B if is_guided else B
                needed = prepared.rows(k, rows, self._step.conditioning_buffer(rows))
                inputs = Inputs(needed, z, seeds, coefficients, prepared.constants(rows))
                state = self._step(predictor, state, inputs, guidance if is_guided else None)
                if callable(progress):
                    progress(k, self._layout.to_images(state.x0).clone())
            # A copy, since the next replay of a graph overwrites its state.
            return self._layout.to_images(state.x).clone()

    def _noise(self, request: Request, x: Tensor, S: int) -> Iterable[tuple[Tensor | None, ...]]:
        """Return each step's noise and seeds, one of which is None.

        The first step takes noise 1, since x_T is noise 0.
        """
        if request.noise is not None:
            noise = request.noise.to(self.device)
            return ((self._layout.to_state(z).to(x.dtype, copy=True), None) for z in noise)
        if not isinstance(self._step, Eager) or choose("sampler_update", None, x) != "reference":
            return [(None, request.keys)] * S
        return ((z.to(x.dtype), None) for z in self._seeded_steps(request.keys, S))

    def _seeded_steps(self, keys: Tensor, S: int) -> Iterator[Tensor]:
        chunk = max(1, _NOISE_CHUNK // (len(keys) * self._layout.shape.numel()))
        for first in range(1, S + 1, chunk):
            steps = torch.arange(first, min(first + chunk, S + 1), device=self.device)
            yield from self._seeded(keys, steps)


def progress_bar(
    progress: Progress, steps: Iterable[Any] | None = None, total: int | None = None
) -> tqdm:
    """Return a bar over the steps, or of `total` of them, shown where progress is True."""
    hidden = progress is not True
    return tqdm(steps, desc="sampling", unit="step", leave=None, disable=hidden, total=total)
