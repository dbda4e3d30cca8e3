"""The sampling loop: a predictor on one device, in one dtype, and the way its steps run."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fastdit import flops, functional, ops
from fastdit.config import DiTConfig
from fastdit.ops import dispatch
from fastdit.packed import PackedDiT
from fastdit.sampling.modulation import ModulationTables
from fastdit.sampling.predictors import AnyPredictor, HoistedDiT
from fastdit.sampling.steps import Compiled, Eager, Graphed, Inputs, State, Step
from fastdit.solvers import Guidance, StepTable

STEPS: dict[str, Callable[[], Step]] = {
    "eager": Eager,
    "compile": Compiled,
    "graph": Graphed,
}
Progress: TypeAlias = bool | Callable[[int, Tensor], None]

# Of one op on a CPU, which cannot be interrupted: half a second on two CPUs of 2025; more where
# laying out the weights, which an op begins with, would otherwise be felt.
_CALL_FLOP, _CALL_FLOP_PER_WEIGHT = 1e11, 3e4
_NOISE_CHUNK = 2**18  # normals made at a time: a small batch's steps are made together


class Batch(NamedTuple):
    """What to sample: arguments of `Sampler.__call__` that have been checked."""

    labels: list[int] | None  # B, or 2B with the null label's last
    keys: Tensor  # [B, 2] int64 (key, stream)
    x_T: Tensor | None  # [B, C, H, W]
    noise: Tensor | None  # [S, B, C, H, W]


class _Loop:
    """A predictor on one device, in one dtype, and the state that its loops begin with."""

    def __init__(
        self, predictor: HoistedDiT | AnyPredictor, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device, self.dtype = device, dtype
        self._predictor, self._layout = predictor, predictor.layout

    def _without_autocast(self) -> contextlib.AbstractContextManager:
        """A model that is called as it is keeps its caller's autocast."""
        if isinstance(self._predictor, AnyPredictor):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, enabled=False)

    def _start(self, batch: Batch, table: StepTable) -> tuple[State, Tensor]:
        """The state before the first step, and the solver's coefficients."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        if batch.x_T is None:
            x = self._seeded(batch.keys, torch.zeros(1, dtype=torch.int64, device=self.device))[0]
        else:
            x = self._layout.to_state(batch.x_T.to(self.device))
        # A copy, since the caller's x_T stays as it is, and no view, since a compiled step would
        # tell the first state from the later ones by it.
        x = x.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
        step = torch.zeros((), dtype=torch.int64, device=self.device)
        return State(x, torch.zeros_like(x), step), table.coefficients.to(self.device, dtype)

    def _seeded(self, keys: Tensor, steps: Tensor) -> Tensor:
        """Noise of some steps, each like the state; elements are counted in the state's order."""
        z = functional.normal(keys, steps, self._layout.shape.numel())
        return z.view(*z.shape[:2], *self._layout.shape)


class Engine(_Loop):
    """Runs batches through one model; the copy of its weights and its graphs are kept."""

    def __init__(
        self,
        predictor: HoistedDiT | AnyPredictor,
        device: torch.device,
        dtype: torch.dtype,
        execution: str,
    ) -> None:
        super().__init__(predictor, device, dtype)
        self._execution, self._step = execution, STEPS[execution]()

    def sample(
        self,
        batch: Batch,
        table: StepTable,
        guidance: Guidance | None,
        table_bytes: int,
        progress: Progress,
    ) -> Tensor:
        """[B, C, H, W] in float32, or float64 for that dtype; the model's weights as they are now.

        Nothing in the loop waits for the device, so that progress counts steps that were launched.
        """
        predictor, B = self._predictor, len(batch.keys)
        predictor.refresh()
        guided = [guidance is not None and guidance.active(t) for t in table.timesteps]
        with self._without_autocast():
            conditioning = predictor.begin(table.timesteps, batch.labels, table_bytes)
            state, coefficients = self._start(batch, table)
            noise = self._noise(batch, state.x, len(table.timesteps))
            steps = _bar(progress, guided)
            for k, (is_guided, (z, seeds)) in enumerate(zip(steps, noise, strict=True)):
                rows = 2 * B if is_guided else B
                needed = conditioning(k, rows, self._step.conditioning_buffer(rows))
                inputs = Inputs(needed, z, seeds, coefficients)
                state = self._step(predictor, state, inputs, guidance if is_guided else None)
                if callable(progress):
                    progress(k, self._layout.to_images(state.x0).clone())
            return self._layout.to_images(state.x).clone()  # what a graph wrote, it overwrites

    def _noise(self, batch: Batch, x: Tensor, S: int) -> Iterable[tuple[Tensor | None, ...]]:
        """Each step's noise and seeds, one of them None; the k-th step (from 1) is step k."""
        if batch.noise is not None:
            noise = batch.noise.to(self.device)
            return ((self._layout.to_state(z).to(x.dtype, copy=True), None) for z in noise)
        if self._execution != "eager" or dispatch.makes_noise(x):
            return [(None, batch.keys)] * S
        return ((z.to(x.dtype), None) for z in self._seeded_steps(batch.keys, S))

    def _seeded_steps(self, keys: Tensor, S: int) -> Iterator[Tensor]:
        chunk = max(1, _NOISE_CHUNK // (len(keys) * self._layout.shape.numel()))
        for first in range(1, S + 1, chunk):
            steps = torch.arange(first, min(first + chunk, S + 1), device=self.device)
            yield from self._seeded(keys, steps)


class _Prepared(NamedTuple):
    """What was made of a model's weights."""

    weights: Tensor  # a copy of them all, to tell whether they are still the same
    planned: tuple[DiTConfig, tuple[int, ...], int]  # and the bound of the tables
    packed: PackedDiT
    tables: ModulationTables


class TrajectoryEngine(_Loop):
    """Runs a loop in as few ops as there is reason for; the weights alone are read.

    A new op begins where guidance does or ends, where the next steps' modulation tables must be
    made, and on a CPU where a call would last so long that it could be neither watched nor
    interrupted; on CUDA a call returns at once. Nothing between two ops waits for the device:
    `_prepare` does, before the first, to compare the weights, and whoever looks at the images.
    """

    def __init__(self, predictor: HoistedDiT, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(predictor, device, dtype)
        self._hoisted = predictor  # `_predictor`, known to be a DiT's
        self._prepared: _Prepared | None = None

    def sample(
        self,
        batch: Batch,
        table: StepTable,
        guidance: Guidance | None,
        table_bytes: int,
        progress: Progress,
    ) -> Tensor:
        B, S = len(batch.keys), len(table.timesteps)
        with self._without_autocast(), _bar(progress, total=S) as bar:
            packed, tables = self._prepare(table.timesteps, table_bytes)
            tables.serve(batch.labels)
            state, coefficients = self._start(batch, table)
            x, x0, k = state.x, state.x0, 0
            while k < S:
                now = guidance if guidance and guidance.active(table.timesteps[k]) else None
                rows = 2 * B if now else B
                most = self._run_length(
                    *(table.timesteps[k:], guidance, rows, packed.weights.numel())
                )
                if batch.noise is not None:  # a call's noise is on the device at once
                    most = min(most, max(1, table_bytes // batch.noise[0].nbytes))
                modulation = tables.steps(k, most, rows)
                steps = slice(k, k + len(modulation.by_step))
                noise = None if batch.noise is None else self._to_states(batch.noise[steps])
                x, x0 = functional.trajectory(
                    *(x, x0, packed, modulation, coefficients[steps], k),
                    seeds=batch.keys if noise is None else None,
                    noise=noise,
                    guidance=now,
                    backend="cpp" if self.device.type == "cpu" else "triton",
                )
                bar.update(steps.stop - k)
                k = steps.stop
            tables.release()
            return self._layout.to_images(x)

    def _prepare(
        self, timesteps: list[int], table_bytes: int
    ) -> tuple[PackedDiT, ModulationTables]:
        """What was made of the weights before, if a look at all of them finds none changed.

        PyTorch's counters of changes would miss some: `p.data.mul_` passes them by.
        """
        source = self._hoisted.source
        planned = source.cfg, tuple(timesteps), table_bytes
        weights = torch.cat([p.detach().reshape(-1) for p in source.parameters()])
        old = self._prepared
        if old is None or old.planned != planned or not torch.equal(old.weights, weights):
            self._prepared = None  # what follows may fail half way
            self._hoisted.refresh()
            model = self._hoisted.model
            linear = ops.linear if self.device.type == "cpu" else F.linear
            tables = ModulationTables(model, timesteps, table_bytes, linear)
            old = self._prepared = _Prepared(weights, planned, PackedDiT.of(model), tables)
        return old.packed, old.tables

    def _run_length(
        self, timesteps: list[int], guidance: Guidance | None, rows: int, weights: int
    ) -> int:
        """How many steps from here on are guided alike, and on a CPU are a call's work at most."""
        most = len(timesteps)
        if self.device.type == "cpu":
            flop = max(_CALL_FLOP, _CALL_FLOP_PER_WEIGHT * weights)
            most = min(most, max(1, int(flop // flops.flop(self._hoisted.cfg, rows))))
        if guidance is None:
            return most
        active = guidance.active(timesteps[0])
        alike = itertools.takewhile(lambda t: guidance.active(t) == active, timesteps[:most])
        return sum(1 for _ in alike)

    def _to_states(self, noise: Tensor) -> Tensor:
        """[K, B, C, H, W] images -> [K, B, P, C], on the device, like the state."""
        images = noise.flatten(0, 1).to(self.device, torch.float32)
        return self._layout.to_state(images).unflatten(0, noise.shape[:2])


def _bar(progress: Progress, steps: Iterable[Any] | None = None, total: int | None = None) -> tqdm:
    hidden = progress is not True
    return tqdm(steps, desc="sampling", unit="step", leave=None, disable=hidden, total=total)
