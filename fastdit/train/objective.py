"""The loss of training samples, in which everything random follows from a sample's number.

Samples are numbered in the order in which a run sees them. The noise and the timestep of sample n,
and whether it keeps its label, are words of Philox at the counter n, under a key derived from the
run's seed (`fastdit.noise`). So a run does not depend on how its samples are split into processes
and micro-batches, and it continues from any step without a stored random state.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdit import functional
from fastdit.config import DiTConfig
from fastdit.diffusion import DiffusionScheduler
from fastdit.noise import philox4x32
from fastdit.train.losses import diffusion_loss
from fastdit.train.sources import ImageBatch

# The second word of the counter, by what is drawn; the noise of a latent itself is at _EPS + 1.
_EPS, _CHOICES = 0, 2


class NoisyBatch(NamedTuple):
    """The inputs of a model in training, and the noise that it should predict."""

    x0: Tensor  # [b, C, H, W]
    x_t: Tensor  # [b, C, H, W]
    t: Tensor  # [b] int64
    labels: Tensor | None  # [b] int64, the null class where they were dropped
    eps: Tensor  # [b, C, H, W]


class Objective(nn.Module):
    """The `diffusion_loss` of a model on numbered samples."""

    def __init__(
        self,
        model: nn.Module,
        config: DiTConfig,
        scheduler: DiffusionScheduler,
        seed: int,
        label_dropout: float = 0.0,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Set up the loss of a model.

        Args:
            model: called as `model(x_t, t, labels)`.
            config: the model's config, for its classes.
            scheduler: the diffusion.
            seed: seed of everything that is drawn.
            label_dropout: share of labels that become the null class.
            autocast: dtype of the model's matrix products; None leaves them in the weights' dtype.

        Raises:
            ValueError: labels are dropped, and the model has no null class.
        """
        super().__init__()
        if label_dropout and not config.null_class:
            raise ValueError("label_dropout: needs a model with null_class=True")
        self.model, self.scheduler = model, scheduler
        self._config, self._label_dropout, self._autocast = config, label_dropout, autocast
        self._key = random_key(seed, "training noise")

    @torch.no_grad()
    def draw(self, images: ImageBatch, numbers: Tensor) -> NoisyBatch:
        """Add noise to images whose sample numbers are `numbers`, [b] int64."""
        mean, std, labels = images
        seeds = torch.stack([torch.full_like(numbers, self._key), numbers], dim=1)
        kinds = torch.arange(_EPS, _EPS + (1 if std is None else 2), device=numbers.device)
        drawn = functional.normal(seeds, kinds, mean[0].numel()).view(len(kinds), *mean.shape)
        drawn = drawn.to(mean.dtype)
        x0 = mean if std is None else mean + std * drawn[1]

        zero = torch.zeros_like(numbers)
        counter = (zero, torch.full_like(numbers, _CHOICES), numbers, zero)
        for_t, for_label, _, _ = philox4x32(counter, seeds[:, 0])
        t = (for_t * self.scheduler.T) >> 32  # floor(T * u) for a uniform u = for_t / 2^32
        y = labels if self._config.use_class_cond else None
        if y is not None and self._label_dropout:
            dropped = for_label < int(self._label_dropout * 2**32)
            y = y.masked_fill(dropped, self._config.num_classes)
        return NoisyBatch(x0, self.scheduler.q_sample(x0, t, drawn[0]), t, y, drawn[0])

    def forward(self, images: ImageBatch, numbers: Tensor) -> Tensor:
        """Return the mean loss of the samples `numbers`: [], in at least float32."""
        batch = self.draw(images, numbers)
        device = batch.x0.device.type
        with torch.autocast(device, self._autocast, enabled=self._autocast is not None):
            out = self.model(batch.x_t, batch.t, batch.labels)
        out = out.to(torch.promote_types(batch.x0.dtype, torch.float32))
        return diffusion_loss(out, batch.x0, batch.x_t, batch.t, batch.eps, self.scheduler)


def random_key(seed: int, purpose: str) -> int:
    """Return a 63-bit key for one purpose; the hash keeps neighbouring seeds apart."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
