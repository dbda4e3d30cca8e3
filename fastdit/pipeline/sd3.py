"""A `fastdit.MMDiT` as the transformer of diffusers' `StableDiffusion3Pipeline`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdit.pipeline.base import (
    PipelineTransformer,
    TransformerOutput,
    check_tensors,
    per_image,
)
from fastdit.text_config import MMDiTConfig


class SD3Transformer(PipelineTransformer, cfg=MMDiTConfig):
    """A stand-in for diffusers' `SD3Transformer2DModel`; `PipelineTransformer` makes it."""

    theirs = "SD3Transformer2DModel"

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        block_controlnet_hidden_states: list[Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        skip_layers: list[int] | None = None,
    ) -> TransformerOutput | tuple[Tensor]:
        """Predict the velocity.

        Args:
            hidden_states: [B, C, H, W] latents.
            encoder_hidden_states: [B, M, text_width], the text encoders' embeddings.
            pooled_projections: [B, pooled_width], their pooled embeddings.
            timestep: [B] timesteps, or one for all images, of shape [1] or [].
            block_controlnet_hidden_states: None, since there are no ControlNets.
            joint_attention_kwargs: None, or "scale": 1, since LoRA was merged at its full scale
                before the exchange.
            return_dict: True returns a `TransformerOutput`, False a tuple.
            skip_layers: numbers of blocks to leave out, for skip-layer guidance.

        Returns:
            [B, C, H, W], as `sample` or as the tuple's only member.

        Raises:
            ValueError: a shape or a value does not fit, or an argument asks for something that the
                model does not have; the message names the argument.
        """
        check_tensors(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
        )
        if block_controlnet_hidden_states is not None:
            name, why = "block_controlnet_hidden_states", "fastdit's model takes no ControlNet"
            got = type(block_controlnet_hidden_states).__name__
            raise ValueError(f"{name}: expected None, since {why}; got a {got}")
        _check_attention_options(joint_attention_kwargs or {})
        skipped = self._skipped(skip_layers or [])
        self.model.check_text(
            encoder_hidden_states, len(hidden_states), name="encoder_hidden_states"
        )
        t = per_image(timestep, hidden_states)  # type: ignore[arg-type]
        text, pooled = encoder_hidden_states, pooled_projections
        sample = self.model(hidden_states, t, text, pooled, skip_layers=skipped)
        return TransformerOutput(sample) if return_dict else (sample,)

    def _skipped(self, skip_layers: list[int]) -> list[int]:
        n_layers = self.model.cfg.n_layers
        known = isinstance(skip_layers, list | tuple) and all(
            i in range(n_layers) for i in skip_layers
        )
        if not known or len(set(skip_layers)) == n_layers:
            expected = f"numbers of blocks from 0 to {n_layers - 1}, not all of them"
            raise ValueError(f"skip_layers: expected {expected}; got {skip_layers}")
        return skip_layers


def _check_attention_options(options: dict[str, Any]) -> None:
    """Raise a ValueError for an option that would change what attention computes."""
    for name, value in options.items():
        at = f"joint_attention_kwargs[{name!r}]"
        if name.startswith("ip_"):
            raise ValueError(f"{at}: expected none, since fastdit's model takes no IP adapter")
        if name != "scale":
            raise ValueError(f"{at}: expected no option but 'scale'")
        if value not in (None, 1):
            raise ValueError(
                f"{at}: expected None or 1, since LoRA was merged by fastdit.load before the "
                f"exchange; got {value}"
            )
