"""Training: the toy recipe, as fast as plain PyTorch runs it, resumable bit for bit.

A step is a pure function of (weights, optimizer state, recipe, step number): the order of the
images and the noise come from generators seeded by (seed, epoch) and (seed, step), so a run that
was killed continues as if it had not been, and no random state needs to be stored.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastdit.checkpoint import check_keys, read_tensors, save, write_tensors
from fastdit.config import DiTConfig
from fastdit.data import LABEL_NAMES, coloured_shapes
from fastdit.diffusion import DiffusionScheduler
from fastdit.errors import from_options
from fastdit.losses import diffusion_loss
from fastdit.model import DiT

# Mean squared error by epoch that the seed's author published for this recipe, on a set that
# differs from `fastdit.data` in detail.
PUBLISHED_LOSS = {1: 0.9147, 4: 0.2467, 8: 0.1685, 16: 0.1409, 24: 0.1262, 30: 0.1228}

WEIGHTS_FILE = "model.safetensors"
RESUME_FILE = "resume.safetensors"

_READBACK_STEPS = 10  # steps between two looks at the loss: each look waits for the device


@dataclass(frozen=True)
class Recipe:
    """What decides the outcome of a run, besides the model's config.

    Attributes:
        epochs: passes over the set.
        batch_size: images a step; the last step of an epoch takes what is left.
        lr: AdamW's rate, on a cosine from here to 0 over all steps.
        weight_decay: AdamW's.
        clip: bound on the gradient's norm.
        T: diffusion steps.
        schedule: a name in `fastdit.diffusion.SCHEDULES`.
        per_class: images of each of the 16 classes.
        seed: seed of the data, the weights, the order and the noise.
    """

    epochs: int = 30
    batch_size: int = 128
    lr: float = 5e-4
    weight_decay: float = 0.0
    clip: float = 1.0
    T: int = 200
    schedule: str = "linear"
    per_class: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "T", "per_class"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 2**31:
                raise ValueError(f"{name}: expected a positive integer below 2^31, got {value!r}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
        if type(self.weight_decay) not in (int, float) or not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected at least 0, got {self.weight_decay!r}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer in [0, 2^63), got {self.seed!r}")

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Recipe:
        return from_options(cls, options)


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run.

    Attributes:
        model: trained, on the device it was trained on.
        epoch_losses: mean loss of each epoch: the squared error of the noise and, with learned
            variance, the bound.
        images_per_second: over this call's steps but the first; NaN where it took fewer than two.
        first_step_seconds: the first step's time, which holds the compilation where there is one;
            NaN where no step was left to take.
    """

    model: DiT
    epoch_losses: list[float]
    images_per_second: float
    first_step_seconds: float


class Trainer:
    """One run: a model, its optimizer and the data, at some step.

    result = Trainer(DiTConfig(), Recipe(), out="runs/toy").run(progress=True)
    """

    def __init__(
        self,
        config: DiTConfig,
        recipe: Recipe,
        out: str | os.PathLike[str] | None = None,
        device: torch.device | str = "cpu",
        compile: bool = False,
        save_every: int = 100,
    ) -> None:
        """Set a run up at step 0.

        Args:
            config: the model's; it must fit the coloured-shapes set.
            recipe: the training's.
            out: folder for the weights and the resume file; None keeps nothing on disk.
            device: where to train.
            compile: run forward, backward and loss through torch.compile.
            save_every: steps between two saves; there is one at the start and one at the end too.

        Raises:
            ValueError: the config does not fit the data, or the loss cannot train it.
            FileExistsError: out already holds weights or a run.
        """
        _check_fits_data(config)
        if save_every < 1:
            raise ValueError(f"save_every: expected at least 1, got {save_every}")
        for file, remedy in (
            (RESUME_FILE, "continue that run (--resume), or name another folder"),
            (WEIGHTS_FILE, "name another folder"),
        ):
            if out is not None and (Path(out) / file).exists():
                raise FileExistsError(f"out: {out} already holds {file}; {remedy}")
        self.config, self.recipe = config, recipe
        self.out = None if out is None else Path(out)
        self.save_every = save_every
        self.device = torch.device(device)
        self.scheduler = DiffusionScheduler(recipe.T, self.device, recipe.schedule)
        images, labels = coloured_shapes(recipe.per_class, recipe.seed)
        self.images, self.labels = images.to(self.device), labels.to(self.device)
        self.steps_per_epoch = math.ceil(len(images) / recipe.batch_size)
        self.total_steps = recipe.epochs * self.steps_per_epoch
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(recipe.seed)
            self.model = DiT.from_config(config)
        self.model.to(self.device, torch.float32)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.step = 0
        self.losses = torch.zeros(self.total_steps, dtype=torch.float32, device=self.device)
        self._grad_norm = torch.zeros((), dtype=torch.float32, device=self.device)
        self._compile = compile
        self._loss = torch.compile(self._loss_of) if compile else self._loss_of

    def run(self, progress: bool = False) -> TrainResult:
        """Take every step that is left, and save at the end.

        Raises:
            FloatingPointError: the loss or the gradient is NaN or Inf; the last save is whole.
            OSError: a save failed.
        """
        if self.step == 0:
            self.save()
        images_seen, first_step_seconds = 0, math.nan
        start = time.perf_counter()
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not progress,
        )
        with bar:
            while self.step < self.total_steps:
                batch = self.train_step()
                bar.update()
                if math.isnan(first_step_seconds):
                    self._read_loss()
                    first_step_seconds = time.perf_counter() - start
                    start = time.perf_counter()
                else:
                    images_seen += batch
                save_now = self.step % self.save_every == 0 or self.step == self.total_steps
                if save_now or self.step % _READBACK_STEPS == 0:
                    rate = images_seen / (time.perf_counter() - start)
                    bar.set_postfix_str(f"loss {self._read_loss():.4f}, {rate:.0f} img/s")
                if save_now:
                    self.save()
        seconds = time.perf_counter() - start
        return TrainResult(
            self.model,
            self._epoch_losses(),
            images_seen / seconds if images_seen else math.nan,
            first_step_seconds,
        )

    def _epoch_losses(self) -> list[float]:
        """Means over images, not over steps: the last step of an epoch may be short."""
        sizes = torch.full((self.steps_per_epoch,), self.recipe.batch_size, dtype=torch.float32)
        sizes[-1] = len(self.images) - (self.steps_per_epoch - 1) * self.recipe.batch_size
        by_epoch = self.losses.cpu().view(-1, self.steps_per_epoch)
        return (by_epoch @ sizes / len(self.images)).tolist()

    def train_step(self) -> int:
        """One optimizer step; returns the number of images in it."""
        recipe = self.recipe
        rate = 0.5 * recipe.lr * (1 + math.cos(math.pi * self.step / self.total_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.batch()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(*batch)
        loss.backward()
        self._grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        self.losses[self.step] = loss.detach()
        self.step += 1
        return len(batch[0])

    def _loss_of(self, x0: Tensor, x_t: Tensor, t: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        return diffusion_loss(self.model(x_t, t, y), x0, x_t, t, eps, self.scheduler)

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The batch of the step at hand.

        Returns:
            (x0, x_t, t, y, eps): [B, 3, 16, 16] images, the same with noise, [B] int64 timesteps,
            [B] int64 labels and the noise in x_t, on the run's device.
        """
        epoch, i = divmod(self.step, self.steps_per_epoch)
        order_generator = _generator("cpu", self.recipe.seed, "order", epoch)
        order = torch.randperm(len(self.images), generator=order_generator)
        rows = order[i * self.recipe.batch_size : (i + 1) * self.recipe.batch_size]
        rows = rows.to(self.device)
        x0, y = self.images[rows], self.labels[rows]
        generator = _generator(self.device, self.recipe.seed, "noise", self.step)
        t = torch.randint(self.recipe.T, (len(rows),), device=self.device, generator=generator)
        eps = torch.randn(x0.shape, dtype=x0.dtype, device=self.device, generator=generator)
        return x0, self.scheduler.q_sample(x0, t, eps), t, y, eps

    def _read_loss(self) -> float:
        """The last step's loss; waits for the device, and stops a run that has gone astray."""
        loss, norm = torch.stack([self.losses[self.step - 1], self._grad_norm]).tolist()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(
                f"loss is {loss}, gradient norm {norm} at step {self.step} of {self.total_steps} "
                f"(seed {self.recipe.seed}, lr {self.recipe.lr}); lower lr"
            )
        return loss

    def save(self) -> None:
        """Write the weights for users, and beside them all that `resume` needs."""
        if self.out is None:
            return
        header = {
            "step": self.step,
            "config": self.config.to_dict(),
            "recipe": asdict(self.recipe),
            "environment": self._environment(),
        }
        # This order: a kill between the two leaves a run that resumes.
        write_tensors(self.out / RESUME_FILE, self._tensors(), header)
        save(self.model, self.out / WEIGHTS_FILE, self.scheduler, LABEL_NAMES)

    @classmethod
    def resume(cls, out: str | os.PathLike[str], **options: Any) -> Trainer:
        """The run whose files are in `out`, at the step it was last saved at.

        The continuation has the bits of an uninterrupted run where torch, the device, the number
        of threads and `compile` are the same; a warning names what is not.

        Args:
            out: the run's folder.
            options: device, compile and save_every, as in the constructor.

        Raises:
            FileNotFoundError: there is nothing to resume.
            ValueError: the file is truncated or foreign.
        """
        path = Path(out) / RESUME_FILE
        tensors, header = read_tensors(path)
        if not {"step", "config", "recipe", "environment"} <= header.keys():
            raise ValueError(f"{path}: expected a resume file of fastdit train, got {list(header)}")
        config = from_options(DiTConfig, header["config"], complete=True)
        recipe = from_options(Recipe, header["recipe"], complete=True)
        trainer = cls(config, recipe, **options)
        trainer.out = Path(out)
        trainer.step = header["step"]
        if type(trainer.step) is not int or not 0 <= trainer.step <= trainer.total_steps:
            raise ValueError(
                f"{path}: expected a step in [0, {trainer.total_steps}], got {trainer.step!r}"
            )
        trainer._load(str(path), tensors)
        for name, now in trainer._environment().items():
            then = dict(header["environment"] or {}).get(name)
            if then != now:
                warnings.warn(
                    f"{name}: the run was saved under {then}, and goes on under {now}; its bits "
                    "will differ from those of an uninterrupted run",
                    stacklevel=2,
                )
        return trainer

    def _load(self, source: str, tensors: dict[str, Tensor]) -> None:
        if self.step:  # AdamW makes its state at the first step; zero gradients make it here
            for p in self.optimizer.param_groups[0]["params"]:
                p.grad = torch.zeros_like(p)
            self.optimizer.step()
        own = self._tensors()
        check_keys(source, own, tensors)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        taken = {int(t) for name, t in own.items() if name.endswith(".step")} or {0}
        if taken != {self.step}:
            raise ValueError(
                f"{source}: the optimizer took {taken} steps, the header says {self.step}"
            )

    def _tensors(self) -> dict[str, Tensor]:
        """Everything a resume needs that is a tensor, by its name in the file."""
        tensors = {f"model.{name}": p for name, p in self.model.state_dict().items()}
        for name, p in self.model.named_parameters():
            for entry, tensor in self.optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{name}.{entry}"] = tensor
        return tensors | {"losses": self.losses}

    def _environment(self) -> dict[str, Any]:
        """What the bits of a step depend on, besides the run itself."""
        return {
            "torch": torch.__version__,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "compile": self._compile,
        }


def _check_fits_data(config: DiTConfig) -> None:
    if config.sample_shape != (3, 16, 16):
        raise ValueError(
            "config: the coloured shapes are 3 x 16 x 16; expected in_channels=3, img_size=16, got "
            f"in_channels={config.in_channels}, img_size={config.img_size}"
        )
    if not config.use_class_cond or config.num_classes != len(LABEL_NAMES):
        raise ValueError(
            f"config: the coloured shapes have {len(LABEL_NAMES)} classes; expected "
            f"use_class_cond=True, num_classes={len(LABEL_NAMES)}, got "
            f"use_class_cond={config.use_class_cond}, num_classes={config.num_classes}"
        )


def _generator(device: torch.device | str, seed: int, purpose: str, index: int) -> torch.Generator:
    """A generator for one purpose and index; the hash spreads neighbours over all seeds."""
    text = f"{seed}/{purpose}/{index}".encode()
    digest = hashlib.blake2b(text, digest_size=4).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
