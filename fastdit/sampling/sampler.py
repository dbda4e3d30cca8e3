"""`fastdit.Sampler`: the one way to turn labels or prompts, and seeds, into images."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.errors import check_finite, unknown_name, warn
from fastdit.flow import Process, process_of
from fastdit.model import DiT, config_of, unwrap
from fastdit.sampling import arguments
from fastdit.sampling.adaptive import integrator
from fastdit.sampling.arguments import Embeds, Generators, Labels
from fastdit.sampling.executions import EXECUTIONS, Subject, automatic, obstacle
from fastdit.sampling.loop import Loop, Plan, Progress, Request
from fastdit.sampling.predictors import is_standard_dit
from fastdit.sampling.text import check_own_forward, is_text_model
from fastdit.solvers import SOLVERS, Solver, default_solver
from fastdit.text import TextModel
from fastdit.update import Guidance

TABLE_BYTES = 2**30


class Sampler:
    """Samples images from a model of a diffusion or of a flow.

        sampler = Sampler(model, DiffusionScheduler(T=200))
        images = sampler([0, 5, 10], seed=7)

    Noise is a function of the seed (`fastdit.noise`): image i of `seed=7` is the same image in any
    batch, on any device and in any execution, up to the arithmetic of the forward.

    A `fastdit.PixArt` or a `fastdit.MMDiT` takes a text encoder's embeddings in place of labels:

        sampler = Sampler(model, FlowMatching(clean_at=0, time_scale=1000))
        latents = sampler(prompt_embeds=Prompts(embeds, pooled), seeds=[11, 12])

    For these and for a `fastdit.DiT` modulation is computed for many steps at once, a text is
    encoded and weights are cast once a call at most, the state stays in tokens, and guidance, the
    solver's update and its noise are one op. Every call uses the weights that the model has at that
    time.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Process | None = None,
        solver: str | Solver | None = None,
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
            model: called as `model(x, t, y)` with x [B, C, H, W], t [B] int64 (for a FlowMatching
                float32, times its `time_scale`) and y [B] int64 or None; returns its prediction,
                like x, or [B, 2C, H, W] with the learned variance, which a flow does not use. It is
                sampled on the device of its first parameter (on the CPU if it has none) and keeps
                its mode. If it is compiled or data-parallel, a model of fastdit is unwrapped, since
                `execution` says how it runs. A `fastdit.PixArt` or a `fastdit.MMDiT` is called part
                by part, and must have its own forward, without hooks. The solver "ddpm" uses a
                PixArt's learned variance, as its own code does; diffusers' pipelines drop it.
            scheduler: the `DiffusionScheduler` or the `FlowMatching` that the model was trained
                on; None takes `model.diffusion`, which `fastdit.load` sets where a checkpoint tells
                it.
            solver: a name, or one of `fastdit.solvers` with its options, such as `DDIM(eta=0.5)` or
                `Euler(shift=0.3)`. Of a DiffusionScheduler "ddpm" (ancestral, the default) or
                "ddim"; of a FlowMatching "euler" (the default), "euler-maruyama" or "dopri5", which
                chooses its steps and runs eagerly only; of both "dpm++" (DPM-Solver++(2M)) or
                "heun".
            steps: number of steps: of a scheduler's T, where None takes all, or of a flow, where
                None is 250, or 50 for "heun" and "dpm++". The solver's docstring says which.
                Heun's method calls the model twice a step, except in the last.
            guidance: classifier-free guidance; needs a DiT with `null_class`, or negative prompts
                at every call. An interval is of integers for a DiffusionScheduler, of times from 0
                to 1 for a FlowMatching.
            dtype: of the forward, including its residual stream, which in the C++ trajectory is
                float32; None is the model's own, or under autocast autocast's dtype. A dtype that
                is not the model's own needs a model of fastdit. The sampler's state is at least
                float32.
            execution: how the loop runs. All ways but "eager" need a `fastdit.DiT`; "compile" and
                "graph" take a PixArt or an MMDiT too.
                "eager": op by op.
                "compile": each step is one graph of torch.compile, which pays off after some
                    hundred steps.
                "graph": each step is a replayed CUDA graph. Here and under "compile" texts are
                    padded to one of eight lengths, so that batches share a graph.
                "trajectory": many steps are one op, in C++ on a CPU (float32, and bfloat16 with
                    AVX512-BF16), or in Triton for small models. It reads only weights, and refuses
                    hooks and exchanged modules.
                "auto": "graph" on CUDA; on a CPU "trajectory" if it can run, except in bfloat16
                    with AMX, and at hidden sizes past 512 without AVX2; "eager" otherwise.
                    `execution_for` says which.
                "compile", "graph" and another dtype use a copy of the model, whose weights are
                renewed at every call; hooks and exchanged modules are copied once. On CUDA
                "trajectory" keeps two copies of the weights.
            table_bytes: bound on the memory of the modulation tables, which are made for as many
                steps at a time as fit into it.
            sample_shape: (C, H, W) of one image, for models other than DiT. That of a PixArt or
                an MMDiT may have any sides that are multiples of the patch; None is the size that
                it was trained at.

        Raises:
            ValueError: a name is unknown, or the model cannot be sampled as asked.
        """
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected a Module, got {type(model).__name__}")
        if not isinstance(scheduler, Process | None):
            got = type(scheduler).__name__
            raise ValueError(
                f"scheduler: expected a DiffusionScheduler or a FlowMatching, got {got}"
            )
        if not isinstance(solver, Solver | None) and not (
            isinstance(solver, str) and solver in SOLVERS
        ):
            raise unknown_name("solver", solver, SOLVERS)
        if execution not in ("auto", *EXECUTIONS):
            raise unknown_name("execution", execution, ("auto", *EXECUTIONS))
        if not isinstance(table_bytes, int) or table_bytes < 1:
            raise ValueError(f"table_bytes: expected a positive integer, got {table_bytes!r}")
        inner = unwrap(model)
        self.model = inner if is_standard_dit(inner) or is_text_model(inner) else model
        self.config = inner.cfg if is_text_model(inner) else config_of(inner)
        if is_text_model(inner):
            check_own_forward(inner)
        self.sample_shape = arguments.sample_shape(sample_shape, self.config)
        self.process = scheduler or _own_process(inner)
        if solver is None:
            solver = default_solver(self.process)
        self.solver = solver if isinstance(solver, Solver) else SOLVERS[solver]
        self.table = self.solver.table(self.process, steps)
        if self.table.ode is not None:
            integrator()  # an error here if it is missing
        self.guidance, self.dtype, self.table_bytes = guidance, dtype, table_bytes
        self.execution = execution
        arguments.check_guidance(guidance, self.config, self.process)
        arguments.check_dtype(dtype, self._device_and_dtype()[1], self._is_own_model())
        self._warn_of_slow_dtype()
        self._check_execution()
        self._loops: dict[tuple[torch.dtype, str], Loop] = {}
        self._built_for = self._device_and_dtype()
        self._turn = threading.Lock()
        self._whose_turn: int | None = None

    @torch.inference_mode(False)  # what a call keeps for the next one must be writable there
    @torch.no_grad()
    def __call__(
        self,
        labels: Labels | None = None,
        seed: int | None = None,
        *,
        prompt_embeds: Embeds | None = None,
        negative_prompt_embeds: Embeds | None = None,
        seeds: Sequence[int] | None = None,
        generator: Generators | None = None,
        first_index: int = 0,
        x_T: Tensor | None = None,
        noise: Tensor | None = None,
        progress: Progress = False,
    ) -> Tensor:
        """Sample one image for each label or prompt.

        Args:
            labels: [B] class labels, or one integer for one image. None samples without labels, as
                many images as `seeds` or `x_T` has. A PixArt or an MMDiT takes prompts instead.
            prompt_embeds: `fastdit.Prompts` of B prompts, or embeddings of which one can be made:
                a tensor [B, M, text_width], or a list of B tensors [M_i, text_width]. An MMDiT
                needs pooled embeddings too. An image depends on its own prompt alone, whatever the
                other prompts' lengths.
            negative_prompt_embeds: the same of B negative prompts, or of one for all images;
                needed with guidance, and only there.
            seed: key of the noise, 0 if none is given; image i uses its stream `first_index + i`.
            seeds: B keys, one an image, all with stream 0; they replace `seed`.
            generator: a `torch.Generator`, whose `initial_seed` is taken as the seed, or a list of
                B of them for `seeds`, as diffusers' pipelines take them. No number is drawn from
                them, so a second call with the same generator makes the same images.
            first_index: index of the first image, so that a set can be sampled in parts.
            x_T: [B, C, H, W] to start from instead of the seed's noise; a flow's `noise_scale`
                multiplies the seed's noise and not x_T.
            noise: [S, B, C, H, W] to add instead of the seed's: the k-th of S evaluations of the
                model uses noise[k]. The last one adds none, unless it is that of
                `EulerMaruyama(last_step=None)`, and deterministic solvers never do.
            progress: True shows a progress bar on stderr. A function is called after each
                evaluation of the model as `progress(k, x0)`, with k from 0 and the image predicted
                so far, [B, C, H, W]; under "trajectory" each is then an op of its own. On CUDA
                both run ahead of the device. "dopri5" makes one image after another, and those
                whose turn has not come are zeros in x0.

        Returns:
            [B, C, H, W] on the model's device: float32, or float64 for a float64 model.

        Raises:
            ValueError: an argument's shape or range is wrong, a weight is not finite, or under
                "graph" the model has moved to another device or dtype.
            FloatingPointError: the model's predictions were not finite.
            RuntimeError: `progress` called the sampler that calls it, or "trajectory" was named
                and its C++ cannot be built.
        """
        seed, seeds = arguments.from_generator(generator, seed, seeds)
        given, B = arguments.conditions(
            labels, prompt_embeds, negative_prompt_embeds, self.guidance, self.config
        )
        B = arguments.batch_size(B, seeds, x_T)
        keys = arguments.noise_keys(B, seed, seeds, first_index, is_text_model(self.model))
        arguments.check_tensor("x_T", x_T, (B, *self.sample_shape))
        arguments.check_tensor("noise", noise, (len(self.table.timesteps), B, *self.sample_shape))
        if not (isinstance(progress, bool) or callable(progress)):
            raise ValueError(f"progress: expected True, False or a function, got {progress!r}")
        with self._taking_turns():
            loop = self._current_loop()
            request = Request(given, keys.to(loop.device), x_T, noise)
            images = loop.sample(request, progress)
            if not images.isfinite().all():
                check_finite("model", dict(self.model.named_parameters()))
                raise FloatingPointError(
                    "model: expected finite predictions, but images hold NaN or Inf; "
                    f"{loop.dtype} may be too narrow for it"
                )
        return images

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be copied or sent; it is made anew."""
        return self.__dict__ | {"_loops": {}, "_turn": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_turn": threading.Lock()}

    @contextmanager
    def _taking_turns(self) -> Iterator[None]:
        """Let calls from other threads wait; refuse a call within a call, which could never end."""
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

    def _warn_of_slow_dtype(self) -> None:
        has = torch.cpu.get_capabilities()
        on_x86 = self._device_and_dtype()[0].type == "cpu" and has.get("architecture") == "x86_64"
        if self.dtype == torch.bfloat16 and on_x86:
            if not (has.get("avx512_bf16") or has.get("amx_tile")):
                warn(
                    "dtype: bfloat16 is slower than float32 on this CPU, which has neither "
                    "AVX512-BF16 nor AMX"
                )

    def _is_own_model(self) -> bool:
        """Return whether the loop calls the parts of the model, of which it may make a copy."""
        return is_text_model(self.model) or is_standard_dit(self.model)

    def execution_for(self) -> str:
        """Return how a call would run: `execution`, or what "auto" stands for."""
        return automatic(self._subject()) if self.execution == "auto" else self.execution

    def _check_execution(self) -> None:
        """Raise a ValueError for an execution that was named and cannot run."""
        if self.execution == "auto":
            return
        reason = obstacle(self.execution, self._subject())
        if reason:
            raise ValueError(f"execution: {self.execution!r} {reason}; use 'auto'")

    def _device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        floats = (p for p in self.model.parameters() if p.is_floating_point())
        first = next(floats, torch.empty(0, dtype=torch.float32))
        return first.device, first.dtype

    def _subject(self) -> Subject:
        """Return the model as it is now, with the dtype of a forward."""
        device, own = self._device_and_dtype()
        dtype = self.dtype or own
        if self.dtype is None and own != torch.float64 and self._is_own_model():
            if torch.is_autocast_enabled(device.type):
                dtype = torch.get_autocast_dtype(device.type)
        return Subject(self.model, device, dtype, self.table.ode is not None)

    def _current_loop(self) -> Loop:
        """Return the loop of this dtype and execution, a new one if the model has moved."""
        if is_text_model(self.model):
            check_own_forward(self.model)
        device, own = self._device_and_dtype()
        if device.type == "meta":
            raise ValueError("model: expected weights with values, got a model on meta")
        if (device, own) != self._built_for:
            if self.execution == "graph":
                raise ValueError(
                    f"model: expected {self._built_for[1]} on {self._built_for[0]}, as when this "
                    f"Sampler was made, got {own} on {device}; make a new Sampler"
                )
            self._loops.clear()
            self._built_for = device, own
        self._check_execution()
        subject, execution = self._subject(), self.execution_for()
        plan = Plan(self.table, self.guidance, self.table_bytes, self.sample_shape)
        key = subject.dtype, execution
        if key not in self._loops:
            self._loops[key] = EXECUTIONS[execution].build(subject, plan)
        self._loops[key].plan = plan  # the attributes may have been changed since the last call
        return self._loops[key]


def _own_process(model: nn.Module) -> Process:
    """Return the diffusion or the flow that a model knows it was trained on."""
    options = model.diffusion if isinstance(model, DiT | TextModel) else None
    if options is None:
        raise ValueError(
            "scheduler: expected the DiffusionScheduler or the FlowMatching of the model's "
            "training, since the model does not know it, got None"
        )
    return process_of(options)
