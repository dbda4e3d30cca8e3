"""The loss of training samples, in which everything random follows from a sample's number.

Samples are numbered in the order in which a run sees them. The noise and the time of sample n, and
whether it keeps its label, are words of Philox at the counter n, under a key derived from the
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
from fastdit.flow import FlowMatching, Process
from fastdit.noise import philox4x32
from fastdit.train.alignment import Alignment
from fastdit.train.flows import FlowTraining
from fastdit.train.losses import diffusion_loss, flow_loss
from fastdit.train.sources import FeaturedBatch, ImageBatch

# The second word of the counter, by what is drawn; the noise of a latent itself is at _EPS + 1.
_EPS, _CHOICES = 0, 2


class NoisyBatch(NamedTuple):
    """The inputs of a model in training, and what they are made of."""

    x0: Tensor  # [b, C, H, W]
    x_t: Tensor  # [b, C, H, W]
    t: Tensor  # [b] int64 timesteps, or float32 times of a flow
    labels: Tensor | None  # [b] int64, the null class where they were dropped
    eps: Tensor  # [b, C, H, W]


class Objective(nn.Module):
    """The loss of a model on numbered samples: `diffusion_loss` or `flow_loss`, and alignment."""

    def __init__(
        self,
        model: nn.Module,
        config: DiTConfig,
        scheduler: Process,
        seed: int,
        label_dropout: float = 0.0,
        autocast: torch.dtype | None = None,
        *,
        flow: FlowTraining | None = None,
        alignment: Alignment | None = None,
    ) -> None:
        """Set up the loss of a model.

        Args:
            model: called as `model(x_t, t, labels)`, and with `hidden_after` where there is an
                alignment.
            config: the model's config, for its classes.
            scheduler: the diffusion or the flow.
            seed: seed of everything that is drawn.
            label_dropout: share of labels that become the null class.
            autocast: dtype of the model's matrix products; None leaves them in the weights' dtype.
            flow: how a flow is trained; None draws uniform times and has no further loss.
            alignment: the loss of a hidden state, which needs the batches' features.

        Raises:
            ValueError: labels are dropped, and the model has no null class.
        """
        super().__init__()
        if label_dropout and not config.null_class:
            raise ValueError("label_dropout: needs a model with null_class=True")
        self.model, self.scheduler, self.alignment = model, scheduler, alignment
        self._flow = flow or FlowTraining()
        self._config, self._label_dropout, self._autocast = config, label_dropout, autocast
        self._key = random_key(seed, "training noise")

    @torch.no_grad()
    def draw(self, images: ImageBatch | FeaturedBatch, numbers: Tensor) -> NoisyBatch:
        """Add noise to images whose sample numbers are `numbers`, [b] int64."""
        mean, std, labels = images.mean, images.std, images.labels
        seeds = torch.stack([torch.full_like(numbers, self._key), numbers], dim=1)
        kinds = torch.arange(_EPS, _EPS + (1 if std is None else 2), device=numbers.device)
        drawn = functional.normal(seeds, kinds, mean[0].numel()).view(len(kinds), *mean.shape)
        drawn = drawn.to(mean.dtype)
        x0 = mean if std is None else mean + std * drawn[1]

        zero = torch.zeros_like(numbers)
        counter = (zero, torch.full_like(numbers, _CHOICES), numbers, zero)
        words = philox4x32(counter, seeds[:, 0])
        for_t, for_label, _, _ = words
        if isinstance(self.scheduler, FlowMatching):
            t = self._flow.draw_times(words, self.scheduler)
            x_t = self.scheduler.interpolate(x0, t, drawn[0])
        else:
            t = (for_t * self.scheduler.T) >> 32  # floor(T * u) for a uniform u = for_t / 2^32
            x_t = self.scheduler.q_sample(x0, t, drawn[0])
        y = labels if self._config.use_class_cond else None
        if y is not None and self._label_dropout:
            dropped = for_label < int(self._label_dropout * 2**32)
            y = y.masked_fill(dropped, self._config.num_classes)
        return NoisyBatch(x0, x_t, t, y, drawn[0])

    def forward(self, images: ImageBatch | FeaturedBatch, numbers: Tensor) -> Tensor:
        """Return the mean loss of the samples `numbers`: [], in at least float32."""
        batch, process = self.draw(images, numbers), self.scheduler
        device = batch.x0.device.type
        with torch.autocast(device, self._autocast, enabled=self._autocast is not None):
            out, aligned = self._call(batch, images)
        out = out.to(torch.promote_types(batch.x0.dtype, torch.float32))
        if isinstance(process, FlowMatching):
            direction = self._flow.direction_loss
            loss = flow_loss(out, batch.x0, batch.t, batch.eps, process, direction)
        else:
            loss = diffusion_loss(out, batch.x0, batch.x_t, batch.t, batch.eps, process)
        return loss if aligned is None else loss + aligned

    def _call(
        self, batch: NoisyBatch, images: ImageBatch | FeaturedBatch
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the model predicts, and the loss of its alignment with features if any."""
        t = batch.t
        if isinstance(self.scheduler, FlowMatching):
            t = self.scheduler.scaled(t)
        if self.alignment is None:
            return self.model(batch.x_t, t, batch.labels), None
        assert isinstance(images, FeaturedBatch), "a run with an alignment loads them"
        depth = self.alignment.depth
        out, hidden = self.model(batch.x_t, t, batch.labels, hidden_after=depth)
        return out, self.alignment(hidden, images.features)


def random_key(seed: int, purpose: str) -> int:
    """Return a 63-bit key for one purpose; the hash keeps neighbouring seeds apart."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
