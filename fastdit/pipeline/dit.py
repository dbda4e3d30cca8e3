"""A `fastdit.DiT` as the transformer of diffusers' `DiTPipeline`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit.config import DiTConfig
from fastdit.errors import warn
from fastdit.model import DiT
from fastdit.pipeline.base import PipelineTransformer, TransformerOutput, is_traced, per_image


class DiTTransformer(PipelineTransformer, cfg=DiTConfig):
    """A stand-in for diffusers' `DiTTransformer2DModel`; `PipelineTransformer` makes it.

    `DiTPipeline` itself makes square latents only; for other shapes `config.sample_size` is
    (height, width).
    """

    theirs = "DiTTransformer2DModel"

    def __init__(self, model: DiT) -> None:
        super().__init__(model)
        self._checked: Tensor | None = None  # the last labels that were found to be in range
        self._warned = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> TransformerOutput | tuple[Tensor]:
        """Predict the noise.

        Args:
            hidden_states: [B, C, H, W] latents.
            timestep: [B] timesteps, or one for all images, of shape [1] or [].
            class_labels: [B] int64; num_classes is the null label, and so is any label past it,
                since diffusers' `DiTPipeline` asks for label 1000 whatever the model's classes are.
            cross_attention_kwargs: None, since a DiT has no cross attention.
            return_dict: True returns a `TransformerOutput`, False a tuple.

        Returns:
            [B, C_out, H, W], as `sample` or as the tuple's only member.

        Raises:
            ValueError: a shape does not fit, a label is negative, a label is past the last class of
                a model without a null class, or cross_attention_kwargs are given.

        Warns:
            UserWarning: a label past the null label was taken for it; once for each transformer.
        """
        if cross_attention_kwargs:
            raise ValueError("cross_attention_kwargs: expected None, a DiT has no cross attention")
        labels = self._in_range(class_labels) if self.model.cfg.use_class_cond else class_labels
        sample = self.model(hidden_states, per_image(timestep, hidden_states), labels)
        return TransformerOutput(sample) if return_dict else (sample,)

    def _in_range(self, labels: Tensor) -> Tensor:
        """Return labels that the model has, each one past the null label replaced by it.

        Reading them waits for the device, so labels are read once, though a pipeline passes the
        same tensor at every step; and not where a graph is traced or captured.
        """
        if not is_traced(labels) and labels is not self._checked and labels.numel():
            self._check(labels)
            self._checked = labels
        cfg = self.model.cfg
        return labels.clamp(max=cfg.num_classes) if cfg.null_class else labels

    def _check(self, labels: Tensor) -> None:
        cfg = self.model.cfg
        low, high = torch.stack(torch.aminmax(labels)).tolist()
        if low < 0 or (high >= cfg.num_classes and not cfg.null_class):
            hint = "" if cfg.null_class else "; guidance_scale=1 needs no null class"
            raise ValueError(
                f"class_labels: expected labels in [0, {cfg.class_rows}), got {low} to {high}{hint}"
            )
        if high > cfg.num_classes and not self._warned:
            warn(
                f"class_labels: label {high} is taken for the null label, {cfg.num_classes}, since "
                f"the model has {cfg.num_classes} classes; diffusers' DiTPipeline always asks for "
                "1000"
            )
            self._warned = True
