"""How a flow is trained: at which times, and with which losses beside the prediction's error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastdit.flow import FlowMatching
from fastdit.noise import box_muller


@dataclass(frozen=True)
class FlowTraining:
    """The options of a `Recipe` that only the training of a flow has; it documents them.

    Source: Esser et al. 2024, section 3.1, for the logit-normal, and equation 23 for the shift,
    here in the direction of LightningDiT's code; Yao et al. 2025 for the loss of the direction.
    """

    time_draw: Literal["uniform", "logit-normal"] = "uniform"
    time_mean: float = 0.0
    time_deviation: float = 1.0
    time_shift: float = 1.0
    direction_loss: float = 0.0

    def draw_times(self, words: Sequence[Tensor], flow: FlowMatching) -> Tensor:
        """Return the times of some samples.

        Args:
            words: four tensors [b] int64 of 32-bit unsigned values, the samples' own; the second is
                left for other draws.
            flow: for the direction of its time, and the span in which it can be trained.

        Returns:
            [b] float32, in the flow's own time.
        """
        for_uniform, _, r0, r1 = words
        # In float64, since the last digits differ with a sample's place in its batch.
        if self.time_draw == "uniform":
            t = (for_uniform >> 8).double() * 2**-24  # in [0, 1), and exact in float32 too
        else:
            normal, _ = box_muller(r0, r1, torch.float64)
            t = torch.sigmoid(self.time_mean + self.time_deviation * normal)
        if self.time_shift != 1:
            t = self.time_shift * t / (1 + (self.time_shift - 1) * t)
        noise, data = flow.training_span
        return (noise + (data - noise) * t).float()
