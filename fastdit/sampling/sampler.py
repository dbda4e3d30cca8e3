"""`fastdit.Sampler`: the one way to turn labels and seeds into images."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fastdit import reference
from fastdit.config import DiTConfig
from fastdit.diffusion import DiffusionScheduler
from fastdit.errors import check_finite, check_range, unknown_name
from fastdit.model import unwrap
from fastdit.sampling import executions
from fastdit.sampling.executions import EXECUTIONS
from fastdit.sampling.loop import Batch, Engine, Progress, TrajectoryEngine
from fastdit.sampling.predictors import AnyPredictor, HoistedDiT, ImageLayout, TokenLayout, hoists
from fastdit.solvers import SOLVERS, Guidance, Solver

TABLE_BYTES = 2**30
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Labels: TypeAlias = Sequence[int] | Tensor | np.ndarray


class Sampler:
    """Samples images from a noise predictor.

        sampler = Sampler(model, DiffusionScheduler(T=200))
        images = sampler([0, 5, 10], seed=7)

    Noise is counted, not drawn (`fastdit.noise`): image i of `seed=7` is the same image in a batch
    of one, in a batch of a thousand, on any device and in any execution, up to the arithmetic of
    the forward.

    For a `fastdit.DiT` nothing is in the loop that need not be: every step's modulation is
    computed before it, weights are cast once a call, the state stays in tokens, and guidance, the
    solver's update and its noise are one op. Changes of the weights between two calls are seen.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: DiffusionScheduler,
        solver: str | Solver = "ddpm",
        steps: int | None = None,
        *,
        guidance: Guidance | None = None,
        dtype: torch.dtype | None = None,
        execution: str = "auto",
        table_bytes: int = TABLE_BYTES,
        sample_shape: tuple[int, int, int] | None = None,
    ) -> None:
        """Prepare to sample.

        Args:
            model: called as `model(x, t, y)` with x [B, C, H, W], t [B] int64 and y [B] int64 or
                None; returns the predicted noise, like x, or [B, 2C, H, W] with the learned
                variance. It stays in the mode it is in, on the device of its first parameter (on
                the CPU where it has none). A compiled or data parallel `fastdit.DiT` is unwrapped:
                `execution` says how it runs.
            scheduler: the diffusion the model was trained on.
            solver: "ddpm" (ancestral), "ddim", "dpm++" (DPM-Solver++(2M)) or "heun", or one of
                `fastdit.solvers` with its options, such as `DDIM(eta=0.5)` or `DDPM(clip=1.0)`.
            steps: how many of the scheduler's T steps to take; None takes all. Which ones, the
                solver's docstring says. Heun's method calls the model twice a step, but once in
                the last.
            guidance: classifier-free guidance; needs a DiT with `null_class`.
            dtype: of the forward, its residual stream included; None is the model's own, or
                autocast's inside autocast. Other than its own needs a `fastdit.DiT`. The sampler's
                state is at least float32 whatever it is.
            execution: "eager"; "compile", the step as one graph of torch.compile, which pays back
                after some hundred steps; "graph", the step replayed as a CUDA graph; "trajectory",
                all steps as one op, for small models, from their weights alone, in C++ on a CPU
                in float32. All but "eager" need a `fastdit.DiT`. "compile" and "graph" copy it, as
                another dtype does: later calls see its weights as they are then, but not modules
                that were exchanged or hooks that came; "trajectory" refuses these, and keeps two
                copies of the weights. "auto" is "graph" for a `fastdit.DiT` on CUDA; on a CPU
                "trajectory" where it can be and `progress` is no function; "eager" elsewhere
                (`execution_for` says which).
            table_bytes: bound of the memory of the modulation tables, which are made for as many
                steps at a time as fit.
            sample_shape: (C, H, W) of one image, for models other than DiT.

        Raises:
            ValueError: an unknown name, or a model this sampler cannot serve.
        """
        if not isinstance(solver, Solver) and solver not in SOLVERS:
            raise unknown_name("solver", solver, SOLVERS)
        if execution not in ("auto", *EXECUTIONS):
            raise unknown_name("execution", execution, ("auto", *EXECUTIONS))
        inner = unwrap(model)
        self.model = inner if hoists(inner) else model
        self.config = inner.cfg if isinstance(inner, reference.DiT) else None
        self.sample_shape = _check_shape(sample_shape, self.config)
        self.solver = solver if isinstance(solver, Solver) else SOLVERS[solver]
        self.table = self.solver.table(scheduler, steps)
        self.guidance, self.dtype, self.table_bytes = guidance, dtype, table_bytes
        self._check_guidance()
        self._check_dtype()
        if not isinstance(table_bytes, int) or table_bytes < 1:
            raise ValueError(f"table_bytes: expected a positive integer, got {table_bytes!r}")
        self.execution = execution
        self._check_execution()
        self._engines: dict[tuple[torch.dtype, str], Engine | TrajectoryEngine] = {}
        self._built_for = self._device_and_dtype()
        self._turn = threading.Lock()
        self._whose_turn: int | None = None

    @torch.inference_mode(False)  # what a call keeps for the next one must be writable there
    @torch.no_grad()
    def __call__(
        self,
        labels: Labels | None,
        seed: int = 0,
        *,
        seeds: Sequence[int] | None = None,
        first_index: int = 0,
        x_T: Tensor | None = None,
        noise: Tensor | None = None,
        progress: Progress = False,
    ) -> Tensor:
        """Sample one image a label.

        Args:
            labels: [B] class labels. None samples without labels; the batch is then as large as
                `seeds` or `x_T`.
            seed: key of the noise; image i uses stream `first_index + i` of it.
            seeds: B keys, one an image, all at stream 0; replaces `seed`.
            first_index: index of the first image, so that a set can be sampled in parts.
            x_T: [B, C, H, W] to start from, instead of the seed's.
            noise: [S, B, C, H, W] to add, instead of the seed's: the k-th of S evaluations of
                the model uses noise[k] (the last adds none, and a deterministic solver none at
                all).
            progress: True shows a progress bar on stderr; a function is called after each step
                as `progress(k, x0)`, with k from 0 and the image predicted so far [B, C, H, W],
                which "trajectory" does not show.
                On CUDA both run ahead of the device, which works on what was launched.

        Returns:
            [B, C, H, W] on the model's device: float32, or float64 for a float64 model.

        Raises:
            ValueError: an argument's shape or range is wrong, or a weight is not finite; or under
                "graph" the model has moved to another device or dtype.
            FloatingPointError: the model's predictions were not finite.
            RuntimeError: `progress` called the sampler that calls it; or "trajectory" was named,
                and its C++ cannot be built.
        """
        y = self._check_labels(labels)
        B = _batch_size(y, seeds, x_T)
        keys = _check_seeds(B, seed, seeds, first_index)
        self._check_tensor("x_T", x_T, (B, *self.sample_shape))
        self._check_tensor("noise", noise, (len(self.table.timesteps), B, *self.sample_shape))
        check_finite("x_T", {} if x_T is None else {"it": x_T})
        check_finite("noise", {} if noise is None else {"it": noise})
        if not (isinstance(progress, bool) or callable(progress)):
            raise ValueError(f"progress: expected True, False or a function, got {progress!r}")
        with self._taking_turns():
            engine = self._current_engine(callable(progress))
            batch = Batch(self._with_null(y), keys.to(engine.device), x_T, noise)
            images = engine.sample(batch, self.table, self.guidance, self.table_bytes, progress)
            if not images.isfinite().all():
                raise FloatingPointError(
                    "model: expected finite predictions, but images hold NaN or Inf; "
                    f"{engine.dtype} may be too narrow for it"
                )
        return images

    def __getstate__(self) -> dict[str, Any]:
        """Without what cannot be copied or sent, and is made anew."""
        return self.__dict__ | {"_engines": {}, "_turn": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_turn": threading.Lock()}

    @contextmanager
    def _taking_turns(self) -> Iterator[None]:
        """Calls from several threads wait; one from within another would wait for ever."""
        if self._whose_turn == threading.get_ident():
            raise RuntimeError(
                "progress: a sampler cannot sample within its own call; use another Sampler there"
            )
        with self._turn:
            self._whose_turn = threading.get_ident()
            try:
                yield
            finally:
                self._whose_turn = None

    def _check_guidance(self) -> None:
        guidance, cfg = self.guidance, self.config
        if guidance is None:
            return
        if not isinstance(guidance, Guidance):
            raise ValueError(f"guidance: expected fastdit.Guidance(scale), got {guidance!r}")
        if cfg is None or not cfg.null_class:
            raise ValueError("guidance: expected None, since the model is no DiT with null_class")
        if guidance.channels is not None and guidance.channels > cfg.in_channels:
            raise ValueError(
                f"guidance: expected at most the model's {cfg.in_channels} channels, got "
                f"{guidance.channels}"
            )

    def _check_dtype(self) -> None:
        dtype, own = self.dtype, self._device_and_dtype()[1]
        if dtype is None:
            return
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
        if dtype != own and not hoists(self.model):
            raise ValueError(
                f"dtype: expected {own} or None, since the model is no fastdit.DiT, got {dtype}"
            )

    def execution_for(self, watched: bool = False) -> str:
        """How a call would run: `execution`, or what "auto" stands for.

        Args:
            watched: whether a function would be called after each step.
        """
        if self.execution != "auto":
            return self.execution
        device, dtype = self._device_and_dtype()[0], self._forward_dtype()
        return executions.automatic(self.model, device, dtype, watched)

    def _check_execution(self, watched: bool = False) -> None:
        """Raise for an execution that was named and cannot be."""
        device, dtype = self._device_and_dtype()[0], self._forward_dtype()
        reason = None
        if self.execution != "auto":
            reason = executions.obstacle(self.execution, self.model, device, dtype)
        if reason:
            raise ValueError(f"execution: {self.execution!r} {reason}; use 'auto'")
        if watched and self.execution == "trajectory":
            raise ValueError(
                "progress: execution='trajectory' shows no x0, since its steps are one op; use "
                "progress=True, or another execution"
            )

    def _device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        floats = (p for p in self.model.parameters() if p.is_floating_point())
        first = next(floats, torch.empty(0, dtype=torch.float32))
        return first.device, first.dtype

    def _forward_dtype(self) -> torch.dtype:
        device, own = self._device_and_dtype()
        if self.dtype is None and hoists(self.model) and own != torch.float64:
            if torch.is_autocast_enabled(device.type):
                return torch.get_autocast_dtype(device.type)
        return self.dtype or own

    def _current_engine(self, watched: bool) -> Engine | TrajectoryEngine:
        """An engine for how the model is now; one more for each autocast dtype and execution."""
        device, own = self._device_and_dtype()
        if (device, own) != self._built_for:
            if self.execution == "graph":
                raise ValueError(
                    f"model: expected {self._built_for[1]} on {self._built_for[0]}, as when this "
                    f"Sampler was made, got {own} on {device}; make a new Sampler"
                )
            self._engines.clear()
            self._built_for = device, own
        self._check_execution(watched)
        dtype, execution = self._forward_dtype(), self.execution_for(watched)
        if (dtype, execution) not in self._engines:
            self._engines[dtype, execution] = self._make_engine(device, dtype, execution)
        return self._engines[dtype, execution]

    def _make_engine(
        self, device: torch.device, dtype: torch.dtype, execution: str
    ) -> Engine | TrajectoryEngine:
        if not hoists(self.model):
            layout = TokenLayout(self.config) if self.config else ImageLayout(self.sample_shape)
            predictor = AnyPredictor(self.model, device, dtype, layout)
            return Engine(predictor, device, dtype, execution)
        if execution == "trajectory":
            return TrajectoryEngine(HoistedDiT(self.model, dtype, twin=False), device, dtype)
        hoisted = HoistedDiT(self.model, dtype, twin=execution != "eager")
        return Engine(hoisted, device, dtype, execution)

    def _with_null(self, y: Tensor | None) -> list[int] | None:
        """The labels as the engine takes them: where there is guidance, as many null ones more."""
        if self.guidance is None:
            return None if y is None else y.tolist()
        assert self.config is not None
        if y is None:
            raise ValueError("labels: guidance needs some, got None")
        return y.tolist() + [self.config.num_classes] * len(y)

    def _check_labels(self, labels: Labels | None) -> Tensor | None:
        """[B] int64 on the CPU, in range for a model that says its classes."""
        if labels is None:
            return None
        if self.config is not None and not self.config.use_class_cond:
            raise ValueError("labels: expected None, since the model has use_class_cond=False")
        expected = "labels: expected a non-empty list of integers, one an image"
        if isinstance(labels, np.ndarray):
            labels = labels.tolist()  # of any strides
        try:
            y = torch.as_tensor(labels, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{expected}; got {labels!r}") from error
        numbers = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
        if y.dim() != 1 or not numbers or not len(y):
            raise ValueError(f"{expected}; got {y.dtype} of shape {list(y.shape)}")
        y = y.to(torch.int64)
        if self.config is not None:
            check_range("labels", y, self.config.num_classes)
        return y

    @staticmethod
    def _check_tensor(name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
        if value is None:
            return
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: expected a float tensor, got {got}")
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")


def _check_shape(
    sample_shape: tuple[int, int, int] | None, cfg: DiTConfig | None
) -> tuple[int, int, int]:
    if sample_shape is not None:
        sample_shape = tuple(sample_shape)  # type: ignore[assignment]
    shape = cfg.sample_shape if cfg else sample_shape
    if shape is None:
        raise ValueError("sample_shape: expected (C, H, W), since the model is no DiT, got None")
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"sample_shape: expected three positive integers, got {shape}")
    if sample_shape not in (None, shape):
        raise ValueError(f"sample_shape: expected the model's {shape}, got {sample_shape}")
    return shape


def _batch_size(y: Tensor | None, seeds: Sequence[int] | None, x_T: Tensor | None) -> int:
    if seeds is not None and not isinstance(seeds, Sequence | Tensor | np.ndarray):
        raise ValueError(f"seeds: expected a sequence of integers, got {type(seeds).__name__}")
    given = y if y is not None else seeds if seeds is not None else x_T
    if given is None or not len(given):
        raise ValueError(
            "labels: expected labels, or seeds or x_T to tell the batch size, got none"
        )
    return len(given)


def _check_seeds(B: int, seed: int, seeds: Sequence[int] | None, first_index: int) -> Tensor:
    """[B, 2] int64 rows of (key, stream)."""
    if seeds is None:
        first = _check_integer("first_index", first_index, bits=32)
        if first + B > 2**32:
            raise ValueError(f"first_index: expected at most 2^32 - {B}, got {first}")
        key = _check_integer("seed", seed, bits=63)
        rows = [(key, first + i) for i in range(B)]
    elif len(seeds) != B:
        raise ValueError(f"seeds: expected {B}, one an image; got {len(seeds)}")
    elif first_index:
        raise ValueError("first_index: expected 0 where seeds names every image's key")
    else:
        rows = [(_check_integer("seeds", key, bits=63), 0) for key in seeds]
    return torch.tensor(rows, dtype=torch.int64)


def _check_integer(name: str, value: int, bits: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 2**bits:
        raise ValueError(f"{name}: expected an integer in [0, 2^{bits}), got {value}")
    return number
