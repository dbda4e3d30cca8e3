"""A `fastdit.DiT` as the transformer of diffusers' `DiTPipeline`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdit.model import DiT


class TransformerOutput(NamedTuple):
    """The output of a transformer, as in diffusers."""

    sample: Tensor  # [B, C_out, H, W]


class PipelineTransformer(nn.Module):
    """A stand-in for diffusers' `DiTTransformer2DModel` that computes with a `fastdit.DiT`.

        pipe = DiTPipeline.from_pretrained(folder)
        pipe.transformer = PipelineTransformer(fastdit.load(pipe.transformer))

    This is for code that is built around a pipeline. `fastdit.Sampler` is faster than any pipeline,
    since a pipeline runs the whole model, its conditioning included, at every step. `DiTPipeline`
    itself makes square latents only; for other shapes `config.sample_size` is (height, width).
    """

    def __init__(self, model: DiT) -> None:
        super().__init__()
        self.model = model
        cfg = model.cfg
        self.config = SimpleNamespace(
            sample_size=cfg.img_size,
            patch_size=cfg.patch_size,
            in_channels=cfg.in_channels,
            out_channels=cfg.out_channels,
            num_layers=cfg.n_layers,
            num_attention_heads=cfg.n_heads,
            attention_head_dim=cfg.head_dim,
            num_embeds_ada_norm=cfg.num_classes,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.model.pos_embed.dtype

    @property
    def device(self) -> torch.device:
        return self.model.pos_embed.device

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
            timestep: [B] timesteps.
            class_labels: [B] int64; num_classes is the null label.
            cross_attention_kwargs: None, since a DiT has no cross attention.
            return_dict: True returns a `TransformerOutput`, False a tuple.

        Returns:
            [B, C_out, H, W], as `sample` or as the tuple's only member.

        Raises:
            ValueError: a shape does not fit, or cross_attention_kwargs are given.
        """
        if cross_attention_kwargs:
            raise ValueError("cross_attention_kwargs: expected None, a DiT has no cross attention")
        sample = self.model(hidden_states, timestep, class_labels)
        return TransformerOutput(sample) if return_dict else (sample,)
