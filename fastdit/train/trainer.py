"""Training: one loop for one process or many, for pixels or latents, resumable bit for bit.

A step is a pure function of weights, optimizer state, recipe and step number: the order of the
images and all that is random follow from the number of a sample (`fastdit.train.objective`). So a
run that was killed continues as if it had not been, no random state is stored, and at a fixed batch
size the loss does not depend on how many processes or micro-batches share it, beyond rounding.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastdit.checkpoints.native import save
from fastdit.config import DiTConfig
from fastdit.diffusion import DiffusionScheduler
from fastdit.model import DiT
from fastdit.train import distributed
from fastdit.train.ema import EMA
from fastdit.train.meter import Meter
from fastdit.train.monitor import Monitor
from fastdit.train.objective import Objective
from fastdit.train.recipe import Recipe
from fastdit.train.run_folder import RunFolder, Saved
from fastdit.train.runtime import PRECISIONS, Runtime
from fastdit.train.sources import Ahead, Order, Samples, Source, check_fits, check_same, open_source
from fastdit.train.state import fill_optimizer, gather, model_of, restore, tensors_of


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run.

    Attributes:
        finished: whether all steps were taken.
        losses: [steps] the loss of each, on the host; 0 for those not taken.
        images_per_second: over this call's steps but the first; NaN where it took fewer than two.
        first_step_seconds: the first step's time, which holds the compilation where there is one;
            NaN where no step was left to take.
    """

    finished: bool
    losses: Tensor
    images_per_second: float
    first_step_seconds: float


class Trainer:
    """One run: a model, its optimizer and the data, at some step.

    trainer = Trainer(DiTConfig(), Recipe(), Shapes(), out="runs/toy")
    result = trainer.run(Monitor(progress=True))
    """

    def __init__(
        self,
        config: DiTConfig,
        recipe: Recipe,
        source: Source,
        out: str | os.PathLike[str] | None = None,
        runtime: Runtime | None = None,
        *,
        save_every: int = 100,
        keep: int = 2,
        resuming: bool = False,
    ) -> None:
        """Set a run up at step 0.

        Args:
            config: the model's.
            recipe: the training's.
            source: the images.
            out: the run's folder (`fastdit.train.run_folder`); None keeps nothing on disk.
            runtime: how to compute it; None is float32 on the CPU.
            save_every: steps between two checkpoints; there is one at the start and the end too.
            keep: how many checkpoints stay.
            resuming: `out` may hold a run already, as `resume` has it.

        Raises:
            ValueError: config, recipe, data and runtime do not fit each other.
            FileExistsError: out already holds weights or a run.
        """
        self.runtime = runtime = runtime or Runtime()
        check_fits(config, source)
        if config.learn_sigma and recipe.T < 2:
            raise ValueError(f"T: a learned variance needs 2 or more, got {recipe.T}")
        if save_every < 1:
            raise ValueError(f"save_every: expected at least 1, got {save_every}")
        shares = runtime.world.size * runtime.accumulate
        if recipe.batch_size % shares:
            raise ValueError(
                f"batch_size: expected a multiple of {shares}, {runtime.world.size} processes of "
                f"{runtime.accumulate} parts, got {recipe.batch_size}"
            )
        self.folder = None if out is None else RunFolder(out, keep)
        if self.folder is not None and not resuming:
            self.folder.check_unused()
        self.config, self.recipe, self.source = config, recipe, source
        self.save_every = save_every
        self.scheduler = DiffusionScheduler(recipe.T, runtime.device, recipe.schedule)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(recipe.seed)
            self.model = DiT.from_config(config)
        self._place()
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [p for _, p in trained], lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        self.ema = None if recipe.ema is None else EMA(trained)
        self.step = 0
        # Loss and gradient norm of every step; those of other processes join at each reading.
        self.history = torch.zeros(2, recipe.steps, dtype=torch.float32, device=runtime.device)
        self._order = Order(len(source), recipe.seed)
        self._ahead = Ahead(source, runtime.device, in_background=runtime.device.type != "cpu")
        self._read_to, self._saved_at = 0, -1
        self._stop_asked = False

    def _place(self) -> None:
        """Put the model where it is trained, in the parts and the way the runtime says."""
        runtime, recipe = self.runtime, self.recipe
        self.model.to(dtype=torch.float32)
        if not runtime.split:
            self.model.to(runtime.device)
        for block in self.model.blocks:
            block.checkpointing = runtime.checkpointing
            if runtime.compile == "block":
                block.compile(dynamic=False)
        if runtime.split:
            distributed.shard(self.model, runtime.device, PRECISIONS[runtime.precision])
        objective = Objective(
            self.model,
            self.config,
            self.scheduler,
            recipe.seed,
            recipe.label_dropout,
            PRECISIONS[runtime.precision],
        )
        if runtime.compile == "whole":
            objective.compile(dynamic=False)
        several = runtime.world.size > 1 and not runtime.split
        self.objective = distributed.replicate(objective, runtime.device) if several else objective

    def run(self, monitor: Monitor | None = None) -> TrainResult:
        """Take every step that is left, and save at the end.

        All processes call it alike, with monitors that measure and show at the same steps; only
        the first one's gets to see anything.

        Raises:
            FloatingPointError: a loss or a gradient is NaN or Inf; the last checkpoint is whole.
            OSError: a save failed.
            ValueError: several processes are not at the same run and step.
            FileExistsError: another run is going on in the folder.
        """
        monitor = monitor or Monitor()
        self.runtime.world.check_same(
            {
                "step": self.step,
                "config": self.config.to_dict(),
                "recipe": asdict(self.recipe),
                "data": {**self.source.identity, "folder": None},
                "save_every": self.save_every,
                **monitor.cadence,
                **self.runtime.environment(),
            }
        )
        if self.folder is None or self.runtime.world.rank > 0:
            return self._run(monitor)
        with self.folder.claimed():
            self.folder.forget_after(self.step)
            return self._run(monitor)

    def _run(self, monitor: Monitor) -> TrainResult:
        recipe, runtime = self.recipe, self.runtime
        meter = Meter(self.config, recipe.batch_size, runtime, self.step)
        first_step = self.step
        if first_step == 0:
            self.save()
        monitor.begin(self.step, recipe.steps)
        meter.pause()
        try:
            while self.step < recipe.steps and not runtime.world.any(self._stop_asked):
                self.train_step()
                monitor.advance()
                last = self.step == recipe.steps
                saves = self.step % self.save_every == 0 or last
                shows = monitor.due(self.step, last)
                if saves or shows or meter.first or self.step % monitor.log_every == 0:
                    values = self._read()
                    rates = meter.read(self.step)
                    if runtime.world.rank == 0:
                        monitor.log(self.step, {**values, **rates})
                if saves:
                    self.save()
                if shows:
                    self._show(monitor)
                if saves or shows:
                    meter.pause()
            finished = self.step == recipe.steps
            if not finished:
                self._read()
                if self._saved_at != self.step:
                    self.save()
            elif first_step == self.step and monitor.due(self.step, last=True):
                self._show(monitor)  # of a run that had been finished before
        finally:
            monitor.end()
        return TrainResult(
            finished, self.history[0].cpu(), meter.images_per_second, meter.first_step_seconds
        )

    def _show(self, monitor: Monitor) -> None:
        model = self.sampling_model()
        if model is not None:
            monitor.show(self.step, model.to(self.runtime.device))

    def request_stop(self) -> None:
        """Let `run` save and return after the step at hand; a signal handler may call it.

        Of several processes one that is asked is enough.
        """
        self._stop_asked = True

    @torch.enable_grad()
    def train_step(self) -> None:
        """One optimizer step."""
        recipe, runtime = self.recipe, self.runtime
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr_at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float32, device=runtime.device)
        for part in range(runtime.accumulate):
            samples, numbers = self.samples(part)
            last = part == runtime.accumulate - 1
            with contextlib.nullcontext() if last else distributed.apart(self.objective):
                loss = self.objective(samples, numbers) / runtime.accumulate
                loss.backward()
            total += loss.detach()
        trained = self.optimizer.param_groups[0]["params"]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if recipe.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, recipe.clip, norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(recipe.ema_at(self.step))
        self.history[0, self.step] = total
        self.history[1, self.step] = distributed.whole(norm)
        self.step += 1

    def samples(self, part: int = 0) -> tuple[Samples, Tensor]:
        """What this process sees in a part of the step at hand.

        Returns:
            (samples, [b] int64 their numbers), both on the run's device.
        """
        first, size = self._part(self.step, part)
        last = part == self.runtime.accumulate - 1
        after = self._part(self.step + 1, 0) if last else self._part(self.step, part + 1)
        more = after[0] < self.recipe.steps * self.recipe.batch_size
        samples = self._ahead.take(
            self._order.rows(first, size), self._order.rows(*after) if more else None
        )
        numbers = torch.arange(first, first + size, device=self.runtime.device)
        return samples, numbers

    def _part(self, step: int, part: int) -> tuple[int, int]:
        """(first, count) of the samples that are this process's in a part of a step."""
        world, parts = self.runtime.world, self.runtime.accumulate
        size = self.recipe.batch_size // (world.size * parts)
        return step * self.recipe.batch_size + (world.rank * parts + part) * size, size

    def _read(self) -> dict[str, float]:
        """What was measured at the last step, when the losses of all processes are made one.

        It waits for the device, and stops a run that has gone astray.
        """
        fresh = self.history[:, self._read_to : self.step]
        fresh[0] = self.runtime.world.total(fresh[0].clone()) / self.runtime.world.size
        for i, (loss, norm) in enumerate(fresh.T.tolist()):
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise FloatingPointError(self._astray(self._read_to + i, loss, norm))
        self._read_to = self.step
        if self.step == 0:
            return {}
        loss, norm = self.history[:, self.step - 1].tolist()
        return {"loss": loss, "grad_norm": norm, "lr": self.recipe.lr_at(self.step - 1)}

    def _astray(self, step: int, loss: float, norm: float) -> str:
        recipe, first = self.recipe, step * self.recipe.batch_size
        saved = self.folder.checkpoints() if self.folder is not None else []
        return (
            f"loss is {loss}, gradient norm {norm} at step {step + 1} of {recipe.steps}, lr "
            f"{recipe.lr_at(step):g}, on samples {first} to {first + recipe.batch_size - 1} of "
            f"seed {recipe.seed}; "
            + (f"the last good checkpoint is {saved[-1][1]}; " if saved else "")
            + "lower lr, or resume from there with another precision"
        )

    def sampling_model(self) -> DiT | None:
        """The model to sample from, of the moving average where there is one: a copy on the host.

        All processes must ask for it together; it is the first one's, the others get None.
        """
        wanted = {n: t for n, t in self._tensors().items() if n.startswith(("model.", "ema."))}
        gathered = gather(wanted, self.runtime.world)
        return model_of(self.config, gathered) if gathered else None

    def save(self) -> None:
        """Write a checkpoint, and beside it the model for users; all processes call it together."""
        if self.folder is None:
            return
        header = {
            "config": self.config.to_dict(),
            "recipe": asdict(self.recipe),
            "data": self.source.identity,
            "environment": self.runtime.environment(),
        }
        gathered = gather(self._tensors(), self.runtime.world)
        if gathered:
            self.folder.write(self.step, gathered, header)
            names = self.source.label_names if self.config.use_class_cond else None
            save(model_of(self.config, gathered), self.folder.weights, self.scheduler, names)
        self._saved_at = self.step
        self.runtime.world.wait()

    def _tensors(self) -> dict[str, Tensor]:
        return tensors_of(self.model, self.optimizer, self.ema, self.history)

    @classmethod
    def resume(
        cls,
        saved: Saved,
        out: str | os.PathLike[str],
        runtime: Runtime | None = None,
        source: Source | None = None,
        **options: Any,
    ) -> Trainer:
        """A run at the step it was saved at, as `RunFolder(out).newest()` reads it.

        On one process the continuation has the bits of an uninterrupted run where torch, the
        number of threads and the runtime are the same; a warning names what is not.

        Args:
            saved: the checkpoint.
            out: the folder to go on in; what is later there than the checkpoint is removed when
                it runs.
            runtime: how to compute it.
            source: the images, where they are no longer where they were.
            options: save_every and keep, as in the constructor.

        Raises:
            ValueError: the checkpoint is of something else, or the data are not the run's.
        """
        header, path = saved.header, saved.path
        config = DiTConfig.from_saved(header["config"])
        recipe = Recipe.from_dict(header["recipe"], complete=True)
        if source is None:
            source = open_source(header["data"])
        else:
            check_same(source.identity, header["data"])
        step = header["step"]
        if type(step) is not int or not 0 <= step <= recipe.steps:
            raise ValueError(f"{path}: expected a step in [0, {recipe.steps}], got {step!r}")
        trainer = cls(config, recipe, source, out, runtime, resuming=True, **options)
        trainer.step = trainer._read_to = trainer._saved_at = step
        if step:
            fill_optimizer(trainer.optimizer)
        restore(trainer._tensors(), saved, step)
        trainer._compare(header["environment"])
        return trainer

    def _compare(self, then: Any) -> None:
        """Warn of all that is not as it was when the checkpoint was written."""
        for name, now in self.runtime.environment().items():
            before = then.get(name) if isinstance(then, dict) else None
            if before != now:
                warnings.warn(
                    f"{name}: the run was saved under {before}, and goes on under {now}; its bits "
                    "will differ from those of an uninterrupted run",
                    stacklevel=3,
                )
