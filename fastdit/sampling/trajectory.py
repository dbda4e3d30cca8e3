"""The sampling loop of a DiT as one op, or a few where it must be cut."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit import flops, functional
from fastdit.config import DiTConfig
from fastdit.ops import definitions
from fastdit.ops.trajectory import DiTWeights
from fastdit.sampling.loop import Loop, Plan, Progress, Request, progress_bar
from fastdit.sampling.modulation import PlainProjection, TableStore
from fastdit.sampling.predictors import ClassLabels, DiTPredictor

_CALL_FLOP = 1e11  # of one op on a CPU, where it cannot be interrupted: a quarter of a second


class _Kept(NamedTuple):
    """What is made of a model's weights, and kept while they stay the same."""

    made_for: tuple[DiTConfig, tuple[float, ...], int]  # the config, the times and `table_bytes`
    copies: list[Tensor]  # of the weights, to tell whether they are still the same
    tables: TableStore
    weights: DiTWeights | None = None  # those that the op reads on CUDA

    def serves(self, made_for: tuple[Any, ...], present: list[Tensor]) -> bool:
        return self.made_for == made_for and all(map(torch.equal, self.copies, present))


class TrajectoryLoop(Loop):
    """Runs many steps as one op, which reads a model's weights and not its modules.

    A new op begins where guidance begins or ends, where the next modulation tables must be made,
    where brought noise would exceed `table_bytes`, on a CPU where a call would be too long to be
    interrupted, and at every step where a function is called after each. Nothing between two ops
    waits for the device; `_prepare` does before the first, where it compares the weights.

    On a CPU the op reads the weights where the model has them, and copies are kept only of those
    that make modulation, if it is split, since its tables are kept. On CUDA the op reads a copy.
    """

    def __init__(
        self, predictor: DiTPredictor, device: torch.device, dtype: torch.dtype, plan: Plan
    ) -> None:
        super().__init__(predictor, device, dtype, plan)
        self._dit = predictor  # `_predictor`, known to be a DiT's
        self._kept: _Kept | None = None

    def sample(self, request: Request, progress: Progress) -> Tensor:
        table, guidance, table_bytes, _ = self.plan
        B, S = len(request.keys), len(table.timesteps)
        with self._without_autocast(), progress_bar(progress, total=S) as bar:
            weights, store = self._prepare()
            labels = request.conditions
            assert isinstance(labels, ClassLabels | None)
            tables = store.serve(labels)
            state, coefficients = self._start(request)
            x, x0, k = state.x, state.x0, 0
            while k < S:
                now = guidance if guidance and guidance.active(table.timesteps[k]) else None
                rows = 2 * B if now else B
                most = 1 if callable(progress) else self._run_length(k, rows)
                if request.noise is not None:  # a call's noise is on the device at once
                    most = min(most, max(1, table_bytes // request.noise[0].nbytes))
                modulation = tables.steps(k, most, rows)
                steps = slice(k, k + len(modulation.by_step))
                noise = None if request.noise is None else self._to_states(request.noise[steps])
                x, x0 = functional.trajectory(
                    x,
                    x0,
                    weights,
                    modulation,
                    coefficients[steps],
                    first=k,
                    seeds=request.keys if noise is None else None,
                    noise=noise,
                    guidance=now,
                    backend="cpp" if self.device.type == "cpu" else "triton",
                )
                del modulation  # so that its tables are freed before the next are made
                bar.update(steps.stop - k)
                k = steps.stop
                if callable(progress):
                    progress(k - 1, self._layout.to_images(x0).clone())
            return self._layout.to_images(x)

    def _prepare(self) -> tuple[DiTWeights, TableStore]:
        """Return the weights and the tables, made anew if what they depend on has changed.

        PyTorch's counters of changes would miss some: `p.data.mul_` passes them by.
        """
        model, timesteps = self._dit.model, self.plan.table.model_times
        table_bytes = self.plan.table_bytes
        made_for = model.cfg, tuple(timesteps), table_bytes
        if self.device.type != "cpu":
            # In one tensor, since each comparison waits for the device.
            present = torch.cat([p.detach().reshape(-1) for p in self._dit.source.parameters()])
            if self._kept is None or not self._kept.serves(made_for, [present]):
                self._kept = None  # what follows may fail half way
                self._dit.refresh()
                store = TableStore(PlainProjection(model, F.linear), timesteps, table_bytes)
                self._kept = _Kept(made_for, [present], store, DiTWeights.of(model))
            assert self._kept.weights is not None
            return self._kept.weights, self._kept.tables
        self._dit.refresh()
        projection = PlainProjection(model, definitions.linear, torch.float32)
        if not projection.split:
            return DiTWeights.of(model), TableStore(projection, timesteps, table_bytes)
        of_tables = [p.detach() for p in projection.parameters()]
        if self._kept is None or not self._kept.serves(made_for, of_tables):
            copies = [p.clone() for p in of_tables]
            self._kept = _Kept(made_for, copies, TableStore(projection, timesteps, table_bytes))
        return DiTWeights.of(model), self._kept.tables

    def _run_length(self, k: int, rows: int) -> int:
        """Return the number of steps from k on for one op: all guided, or none.

        On a CPU they are no more than a call's work, but at least one.
        """
        timesteps, guidance = self.plan.table.timesteps[k:], self.plan.guidance
        most = len(timesteps)
        if self.device.type == "cpu":
            most = min(most, max(1, int(_CALL_FLOP // flops.flop(self._dit.cfg, rows))))
        if guidance is None:
            return most
        active = guidance.active(timesteps[0])
        alike = itertools.takewhile(lambda t: guidance.active(t) == active, timesteps[:most])
        return sum(1 for _ in alike)

    def _to_states(self, noise: Tensor) -> Tensor:
        """Return images [K, B, C, H, W] as states on the device: [K, B, P, C] float32."""
        images = noise.flatten(0, 1).to(self.device, torch.float32)
        return self._layout.to_state(images).unflatten(0, noise.shape[:2])
