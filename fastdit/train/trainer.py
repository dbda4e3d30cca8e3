"""The training loop, for one process or many and for pixels or latents; it resumes bit for bit.

A step is a pure function of weights, optimizer state, recipe and step number: the order of the
images and everything random follow from the number of a sample (`fastdit.train.objective`). So a
killed run continues as if it had not been interrupted, and no random state is stored. At a fixed
batch size the loss depends on the number of processes and micro-batches only by rounding. A run
that goes on with another recipe or other data records the change (`fastdit.train.changes`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.checkpoints import save
from fastdit.config import DiTConfig
from fastdit.data.features import Features
from fastdit.diffusion import DiffusionScheduler
from fastdit.errors import warn
from fastdit.model import DiT
from fastdit.train import distributed
from fastdit.train.alignment import describe_features, make_alignment, reopen_features
from fastdit.train.changes import Numbering, continue_saved, divergence
from fastdit.train.ema import EMA
from fastdit.train.loading import BatchLoader
from fastdit.train.meter import Meter
from fastdit.train.monitor import Monitor
from fastdit.train.objective import Objective
from fastdit.train.placement import place, wrap
from fastdit.train.recipe import BETA1, Recipe
from fastdit.train.run_folder import RunFolder, Saved
from fastdit.train.runtime import PRECISIONS, Runtime
from fastdit.train.sources import Source, check_fits
from fastdit.train.state import (
    copy_weights,
    create_optimizer_state,
    gather,
    model_from,
    restore,
    run_tensors,
)


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run.

    Attributes:
        finished: whether all steps were taken.
        losses: [steps] the loss of each step, on the host; 0 for steps not taken.
        images_per_second: speed after this call's first step; NaN if it took fewer than two.
        first_step_seconds: time of this call's first step, including any compilation; NaN if no
            step was left to take.
    """

    finished: bool
    losses: Tensor
    images_per_second: float
    first_step_seconds: float


class Trainer:
    """A run: a model, its optimizer and the data, at some step. `fastdit.train` has an example."""

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
        initial: DiT | None = None,
        features: Features | None = None,
    ) -> None:
        """Set up a run at step 0.

        Args:
            config: the model's config.
            recipe: the training settings.
            source: the images.
            out: the run's folder (`fastdit.train.run_folder`); None writes nothing to disk.
            runtime: how to compute the run; None is float32 on the CPU.
            save_every: steps between two checkpoints, besides those at the start and at the end.
            keep: number of checkpoints to keep.
            initial: a model of this config, such as `fastdit.load` fits to the data, from whose
                weights to start; they are trained in float32 whatever their dtype is. None draws
                fresh ones.
            features: an encoder's of the images, with which `recipe.align_weight` aligns the model;
                row `r + k * images` is that of variant k of image r (`Source`).

        Raises:
            ValueError: config, recipe, data and runtime do not fit each other.
            FileExistsError: out already holds weights or a run.
        """
        self.runtime = runtime = runtime or Runtime()
        check_fits(config, source)
        if config.learn_sigma and recipe.path is None and recipe.T < 2:
            raise ValueError(f"T: a learned variance needs 2 or more, got {recipe.T}")
        if save_every < 1:
            raise ValueError(f"save_every: expected at least 1, got {save_every}")
        runtime.check_batch_size(recipe.batch_size)
        self.folder = None if out is None else RunFolder(out, keep)
        if self.folder is not None:
            self.folder.check_unused()
        self.config, self.recipe, self.source, self.features = config, recipe, source, features
        self.save_every = save_every
        self.scheduler = recipe.process(runtime.device)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(recipe.seed)
            self.model = DiT.from_config(config).float()
            self.alignment = make_alignment(config, recipe, source, features)
        # What is kept of the initial model: the digest of its weights, and what a caller adds.
        self.origin = None if initial is None else copy_weights(self.model, initial)
        place(self.model, self.alignment, runtime)
        objective = Objective(
            self.model,
            config,
            self.scheduler,
            recipe.seed,
            recipe.label_dropout,
            PRECISIONS[runtime.precision],
            flow=recipe.flow_training(),
            alignment=self.alignment,
        )
        self.objective = wrap(objective, runtime)
        trained = [p for _, p in self._trained()]
        if self.alignment is not None:
            trained += self.alignment.parameters()
        self.optimizer = torch.optim.AdamW(
            trained,
            lr=recipe.lr,
            betas=(BETA1, recipe.beta2),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.ema = None if recipe.ema is None else EMA(self._trained())
        self.step = 0
        self._set_changes([])
        # Loss and gradient norm of every step. Losses are averaged over the processes at each
        # reading only.
        self.history = torch.zeros(2, recipe.steps, dtype=torch.float32, device=runtime.device)
        self._read_to, self._saved_at = 0, -1
        self._stop_asked = self._changed = False

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def _set_changes(self, changes: list[dict[str, Any]]) -> None:
        """Number and load the samples as the recorded changes of the run say."""
        self.changes, cfg = changes, self.config
        self.numbering = Numbering.after(changes, self.recipe.batch_size)
        self.loader = BatchLoader(
            self.source,
            self.recipe,
            self.runtime,
            num_classes=cfg.num_classes if cfg.use_class_cond else None,
            numbering=self.numbering,
            features=self.features,
        )

    def run(self, monitor: Monitor | None = None) -> TrainResult:
        """Take all remaining steps, and save at the end.

        All processes must call it together, with monitors that measure and show at the same steps.
        Only the monitor of rank 0 receives anything.

        Raises:
            FloatingPointError: a loss or a gradient is NaN or Inf; it is in no checkpoint.
            OSError: saving failed.
            ValueError: the processes are not at the same step of the same run.
            FileExistsError: another run is in progress in the folder.
        """
        monitor = monitor or Monitor()
        self.runtime.world.check_same(
            {
                "step": self.step,
                "config": self.config.to_dict(),
                "recipe": asdict(self.recipe),
                "data": {**self.source.identity, "folder": None},
                "features": self.features and self.features.identity,
                "numbering": asdict(self.numbering),
                "save_every": self.save_every,
                **monitor.cadence,
                **self.runtime.environment(),
            }
        )
        if self.folder is None or self.runtime.world.rank > 0:
            return self._run(monitor)
        with self.folder.claimed():
            self.folder.remove_after(self.step)
            return self._run(monitor)

    def _run(self, monitor: Monitor) -> TrainResult:
        recipe, runtime = self.recipe, self.runtime
        meter = Meter(self.config, recipe.batch_size, runtime, self.step)
        first_step = self.step
        if first_step < recipe.steps and isinstance(self.scheduler, DiffusionScheduler):
            self.scheduler.warn_of_signal()  # since compiled calls of q_sample cannot warn
        if first_step == 0:
            self._warn_of_null_row()
        if first_step == 0 or self._changed:  # a change is on record before it takes effect
            self.save()
            self._changed = False
        monitor.begin(self.step, recipe.steps)
        meter.pause()
        try:
            while self.step < recipe.steps and not runtime.world.any(self._stop_asked):
                self.train_step()
                monitor.advance()
                last = self.step == recipe.steps
                saves = self.step % self.save_every == 0 or last
                shows = monitor.due(self.step, last)
                if saves or shows or meter.awaits_first_step or self.step % monitor.log_every == 0:
                    values = self._read_history() | meter.read(self.step)
                    if runtime.world.rank == 0:
                        monitor.log(self.step, values)
                if saves:
                    self.save()
                if shows:
                    self._show(monitor)
                if saves or shows:
                    meter.pause()
            finished = self.step == recipe.steps
            if not finished:
                self._read_history()
                if self._saved_at != self.step:
                    self.save()
            elif first_step == self.step and monitor.due(self.step, last=True):
                self._show(monitor)  # the run had been finished before
        finally:
            monitor.end()
        return TrainResult(
            finished, self.history[0].cpu(), meter.images_per_second, meter.first_step_seconds
        )

    def _warn_of_null_row(self) -> None:
        if self.config.null_class and not self.recipe.label_dropout and self.origin is None:
            warn(
                "label_dropout: it is 0, so that the row of the null class stays as it was drawn, "
                "and guidance uses it; drop some labels, or make the model with null_class=False"
            )

    def _show(self, monitor: Monitor) -> None:
        model = self.sampling_model()
        if model is not None:
            monitor.show(self.step, model.to(self.runtime.device))

    def request_stop(self) -> None:
        """Let `run` save and end in all processes after this step; a signal handler may call it."""
        self._stop_asked = True

    @torch.enable_grad()
    def train_step(self) -> None:
        """Take one optimizer step."""
        recipe, runtime = self.recipe, self.runtime
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr_at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float32, device=runtime.device)
        for i in range(runtime.accumulate):
            images, numbers = self.loader.load(self.step, i)
            last = i == runtime.accumulate - 1
            with nullcontext() if last else distributed.without_gradient_sync(self.objective):
                loss = self.objective(images, numbers) / runtime.accumulate
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
        self.history[1, self.step] = distributed.full_tensor(norm)
        self.step += 1

    def _read_history(self) -> dict[str, float]:
        """Wait for the device, average the latest losses over the processes, and check them.

        The last step's measurements are returned.
        """
        fresh = self.history[:, self._read_to : self.step]
        fresh[0] = self.runtime.world.total(fresh[0].clone()) / self.runtime.world.size
        for i, (loss, norm) in enumerate(fresh.T.tolist()):
            if not math.isfinite(loss) or not math.isfinite(norm):
                at, first = self._read_to + i, self.numbering.first(self._read_to + i)
                told = divergence(self.recipe, self.runtime, self.folder, at, first)
                raise FloatingPointError(f"loss is {loss}, gradient norm {norm} at {told}")
        self._read_to = self.step
        if self.step == 0:
            return {}
        loss, norm = self.history[:, self.step - 1].tolist()
        return {"loss": loss, "grad_norm": norm, "lr": self.recipe.lr_at(self.step - 1)}

    def sampling_model(self) -> DiT | None:
        """Return a copy of the model on the host, with averaged weights if there are any.

        All processes must call this together; only rank 0 gets the model, the others get None.
        """
        wanted = {n: t for n, t in self._tensors().items() if n.startswith(("model.", "ema."))}
        gathered = gather(wanted, self.runtime.world)
        return model_from(self.config, gathered) if gathered else None

    def save(self) -> None:
        """Write a checkpoint and the model to sample from; all processes call this together."""
        if self.folder is None:
            return
        names = self.source.label_names if self.config.use_class_cond else None
        header = {
            "config": self.config.to_dict(),
            "recipe": asdict(self.recipe),
            "data": self.source.identity,
            "labels": names and list(names),
            "environment": self.runtime.environment(),
            "changes": self.changes,
            "origin": self.origin,
            "features": describe_features(self.features),
        }
        gathered = gather(self._tensors(), self.runtime.world)
        if gathered:
            self.folder.write(self.step, gathered, header)
            model = model_from(self.config, gathered)
            save(model, self.folder.weights, self.scheduler, names)
        self._saved_at = self.step
        self.runtime.world.wait()

    def _tensors(self) -> dict[str, Tensor]:
        return run_tensors(self.model, self.optimizer, self.ema, self.history, self.alignment)

    @classmethod
    def resume(
        cls,
        saved: Saved,
        out: str | os.PathLike[str],
        runtime: Runtime | None = None,
        source: Source | None = None,
        *,
        changes: Mapping[str, Any] | None = None,
        new_data: bool = False,
        save_every: int = 100,
        keep: int = 2,
        features: Features | None = None,
    ) -> Trainer:
        """Return a run at the step of a checkpoint, such as `RunFolder(out).newest()`.

        On one process the rest of the run has the bits of an uninterrupted one, if torch, the
        number of threads and the runtime are the same; a warning names those that differ. A run
        that goes on with changes saves them at once, and every later checkpoint lists them.

        Args:
            saved: the checkpoint.
            out: the folder to continue in; `run` removes files of later steps from it.
            runtime: how to compute the run; it need not be the one before.
            source: the images; None opens them from where they were.
            changes: fields of the recipe with the values that they have from this step on, such as
                `{"steps": 20_000, "lr": 1e-4}`. Everything may change but seed, name, what the
                process and the alignment are, and whether there is one. A cosine is that of the new
                steps and lr, so a longer run's rate rises again at the change. An average that
                begins here begins at the present weights.
            new_data: whether source may hold other images than the run's, of the same shape and
                classes; the samples go on with a new pass over them.
            save_every, keep: as for the constructor.
            features: of the images; None opens the run's from where they were.

        Raises:
            ValueError: the checkpoint is not of such a run, the data are not the run's, or a change
                makes no sense for it; the message says why.
        """
        run = continue_saved(saved, source, changes or {}, new_data)
        features = reopen_features(saved.header.get("features"), features, new_data)
        rest: dict[str, Any] = dict(save_every=save_every, features=features)
        trainer = cls(run.config, run.recipe, run.source, None, runtime, **rest)
        trainer.folder, trainer.origin = RunFolder(out, keep), saved.header.get("origin")
        trainer._set_changes(run.changes)
        trainer.step = trainer._read_to = trainer._saved_at = run.step
        trainer._changed = bool(run.changed)
        if run.step:
            create_optimizer_state(trainer.optimizer)
        starts_average = run.changed.get("ema", [0])[0] is None
        if starts_average:
            trainer.ema = None
        restore(trainer._tensors(), saved._replace(tensors=run.tensors), run.step)
        if starts_average:
            trainer.ema = EMA(trainer._trained())
        trainer.runtime.warn_of_changes(saved.header["environment"])
        return trainer
