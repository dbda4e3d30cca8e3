"""The training loops that `train_throughput.py` times, and what they train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _harness import WithoutInit, build
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fastdit
from fastdit import DiTConfig, reference
from fastdit.train.losses import diffusion_loss
from fastdit.train.recipe import Recipe
from fastdit.train.runtime import PRECISIONS, Runtime
from fastdit.train.sources import ImageBatch, Source
from fastdit.train.trainer import Trainer

LATENTS = 512  # number of random latents that a published model is trained on
BASELINE, PLAIN_COMPILED = "plain eager", "plain compiled"
EAGER, BLOCK, COMPILED = "fastdit eager", "fastdit by block", "fastdit compiled"
COMPILE = {EAGER: "none", BLOCK: "block", COMPILED: "whole"}
WAYS = (BASELINE, PLAIN_COMPILED, *COMPILE)
Weights = dict[str, Tensor]


class RandomLatents:
    """Random latents of a preset's shape, in place of ImageNet's."""

    identity = {"kind": "random"}

    def __init__(self, config: DiTConfig) -> None:
        self.sample_shape = config.sample_shape
        self.label_names = tuple(map(str, range(config.num_classes)))
        own = torch.Generator().manual_seed(0)
        self.means = torch.randn(LATENTS, *config.sample_shape, generator=own)
        self.stds = torch.full_like(self.means, 0.1)
        self.labels = torch.randint(config.num_classes, (LATENTS,), generator=own)

    def __len__(self) -> int:
        return LATENTS

    def take(self, rows: Tensor) -> ImageBatch:
        return ImageBatch(self.means[rows], self.stds[rows], self.labels[rows])


@dataclass(frozen=True)
class Task:
    """What all loops train, and how."""

    config: DiTConfig
    recipe: Recipe
    source: Source
    device: torch.device
    precision: str = "float32"
    checkpointing: bool = False


class PlainLoop:
    """Textbook PyTorch: a DataLoader, AdamW, gradient clipping, a cosine schedule of the rate."""

    def __init__(self, task: Task, initial: Weights, compiled: bool) -> None:
        recipe, device = task.recipe, task.device
        torch.manual_seed(recipe.seed)
        self.task, self.recipe = task, recipe
        with WithoutInit():
            self.model = build(reference.DiT, task.config, device)
        self.model.load_state_dict(initial)
        self._predict = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.scheduler = fastdit.DiffusionScheduler(recipe.T, device, schedule=recipe.schedule)
        mean, std, labels = task.source.take(torch.arange(len(task.source)))
        data = TensorDataset(mean, torch.zeros(len(mean)) if std is None else std, labels)
        self._drawn = std is not None
        self.loader = DataLoader(data, recipe.batch_size, shuffle=True, drop_last=True)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        self.rate = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, recipe.steps)
        self.losses: list[float] = []
        self._batches = self._endless()

    def _endless(self) -> Iterator[list[Tensor]]:
        while True:
            yield from self.loader

    def train_step(self) -> None:
        mean, std, y = (part.to(self.task.device) for part in next(self._batches))
        x0 = mean + std * torch.randn_like(mean) if self._drawn else mean
        t = torch.randint(self.recipe.T, (len(x0),), device=x0.device)
        eps = torch.randn_like(x0)
        x_t = self.scheduler.q_sample(x0, t, eps)
        dtype = PRECISIONS[self.task.precision]
        with torch.autocast(x0.device.type, dtype, enabled=dtype is not None):
            out = self._predict(x_t, t, y)
        if self.task.config.learn_sigma:
            loss = diffusion_loss(out.float(), x0, x_t, t, eps, self.scheduler)
        else:
            loss = F.mse_loss(out.float(), eps)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip or torch.inf)
        self.optimizer.step()
        self.rate.step()
        self.losses.append(loss.item())


class FusedLoop(Trainer):
    """fastdit's own trainer, with its losses as a list."""

    def __init__(self, task: Task, initial: Weights, compile: str) -> None:
        runtime = Runtime(task.device, task.precision, compile, task.checkpointing)  # type: ignore[arg-type]
        with WithoutInit():
            super().__init__(task.config, task.recipe, task.source, runtime=runtime)
        self.model.load_state_dict(initial)

    @property
    def losses(self) -> list[float]:
        return self.history[0, : self.step].tolist()


Loop = PlainLoop | FusedLoop


def initial_weights(task: Task) -> Weights:
    """Return the weights that a `Trainer` begins with; on a GPU, other draws of the same kind."""
    with torch.random.fork_rng():
        torch.manual_seed(task.recipe.seed)
        return build(fastdit.DiT, task.config, task.device).state_dict()


def make_loop(way: str, task: Task, initial: Weights) -> Loop:
    if way in COMPILE:
        return FusedLoop(task, initial, COMPILE[way])
    return PlainLoop(task, initial, way == PLAIN_COMPILED)
