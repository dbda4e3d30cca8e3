"""A `fastdit.PixArt` as the transformer of diffusers' `PixArtAlphaPipeline` and Sigma's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdit.pipeline.base import (
    PipelineTransformer,
    TransformerOutput,
    check_tensors,
    is_traced,
    per_image,
)
from fastdit.pipeline.kept import KeptText, can_be_kept
from fastdit.text import PixArt, Text
from fastdit.text.prompts import kept_first
from fastdit.text_config import PixArtConfig

_DISCARDED = -1000.0  # a bias of at most this leaves nothing of a token after the softmax


class PixArtTransformer(PipelineTransformer, cfg=PixArtConfig):
    """A stand-in for diffusers' `PixArtTransformer2DModel`; `PipelineTransformer` makes it.

    The keys and values of the text are computed once for all steps: while gradients are off, a call
    with the same `encoder_hidden_states` and `encoder_attention_mask` as the last one, the same
    tensors and not only equal ones, takes them from there. They are computed again after a change
    of these tensors in place, or of the weights; one that PyTorch does not record, such as a change
    through `Tensor.data`, is seen after `train()`, `eval()`, `to()` or a forward with gradients.
    """

    theirs = "PixArtTransformer2DModel"

    def __init__(self, model: PixArt) -> None:
        super().__init__(model)
        self._kept = KeptText()
        self._checked: Tensor | None = None  # the last mask whose values were found to be fit

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor | None] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> TransformerOutput | tuple[Tensor]:
        """Predict the noise.

        Args:
            hidden_states: [B, C, H, W] latents.
            encoder_hidden_states: [B, M, text_width], a text encoder's embeddings.
            timestep: [B] timesteps, or one for all images, of shape [1] or [].
            added_cond_kwargs: "resolution" [B, 2], height and width in pixels, and "aspect_ratio"
                [B, 1], which a model with size_conditions needs and another one does not look at.
            cross_attention_kwargs: None, since there are no attention processors.
            attention_mask: None, since an image has no padding.
            encoder_attention_mask: of the text, [B, M], 1 for a token and 0 for padding; or
                [B, 1, M], a bias, 0 for a token and at most -1000 for padding. A text of padding
                only is taken whole. None takes all of M.
            return_dict: True returns a `TransformerOutput`, False a tuple.

        Returns:
            [B, C_out, H, W], as `sample` or as the tuple's only member.

        Raises:
            ValueError: a shape or a value does not fit; the message names the argument.
        """
        refused = dict(
            cross_attention_kwargs=(cross_attention_kwargs, "there are no attention processors"),
            attention_mask=(attention_mask, "an image has no padding"),
        )
        for name, (value, why) in refused.items():
            if value is not None and not (isinstance(value, dict) and not value):
                raise ValueError(f"{name}: expected None, since {why}; got {_described(value)}")
        needed = dict(encoder_hidden_states=encoder_hidden_states, timestep=timestep)
        if encoder_attention_mask is not None:
            needed["encoder_attention_mask"] = encoder_attention_mask
        check_tensors(hidden_states=hidden_states, **needed)
        assert encoder_hidden_states is not None and timestep is not None
        sizes: dict[str, Tensor | None] = {}
        if self.model.cfg.size_conditions:
            given = added_cond_kwargs or {}
            sizes = {name: given.get(name) for name in ("resolution", "aspect_ratio")}
        text = self._text(encoder_hidden_states, encoder_attention_mask, len(hidden_states))
        t = per_image(timestep, hidden_states)
        sample = self.model(hidden_states, t, text, **sizes)
        return TransformerOutput(sample) if return_dict else (sample,)

    def train(self, mode: bool = True) -> PixArtTransformer:
        self._kept.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **options: Any) -> Any:  # `to`, `half`, `cuda` and the like
        self._kept.clear()
        return super()._apply(*args, **options)

    def _text(self, embeds: Tensor, mask: Tensor | None, B: int) -> Text:
        """Return the encoded text of B prompts, that of the last call where nothing has changed."""
        if is_traced(embeds):
            return self._encoded(embeds, mask, B, read=False)
        sources = [embeds] if mask is None else [embeds, mask]
        weights = self._text_weights()
        if not can_be_kept([*sources, *weights]):
            self._kept.clear()
            # Reading values at every step would make every step wait for the device.
            return self._encoded(embeds, mask, B, read=embeds.device.type == "cpu")
        text = self._kept.get(sources, weights)
        if text is None:
            self._kept.clear()  # before the next one is made, so that there is one at a time
            text = self._encoded(embeds, mask, B, read=embeds.device.type != "meta")
            self._kept.put(sources, weights, text)
        return text

    def _text_weights(self) -> list[Tensor]:
        """Return the weights that the encoded text depends on."""
        layers = [block.cross.kv for block in self.model.blocks]
        if self.model.cfg.text_projection:
            layers += self.model.text_embed
        return [weight for layer in layers for weight in layer.parameters()]

    def _encoded(self, embeds: Tensor, mask: Tensor | None, B: int, read: bool) -> Text:
        """Encode the prompts' own tokens; with `read`, no more tokens than the longest has."""
        self.model.check_text(embeds, B, name="encoder_hidden_states")
        if mask is None:
            return self.model.encode_text(embeds)
        expected = [B, embeds.shape[1]] if mask.dim() == 2 else [B, 1, embeds.shape[1]]
        if list(mask.shape) != expected:
            got = list(mask.shape)
            raise ValueError(f"encoder_attention_mask: expected shape {expected}, got {got}")
        known = mask.device.type != "meta" and not is_traced(mask)
        if known and (read or mask is not self._checked):
            _check_values(mask)
            self._checked = mask
        kept = mask > 0.5 if mask.dim() == 2 else mask[:, 0] > _DISCARDED
        # Of equal biases nothing remains after the softmax, so padding only is as good as text.
        kept = kept | ~kept.any(dim=1, keepdim=True)
        embeds, lengths = kept_first(embeds, kept.to(embeds.device))
        if read:
            counts = lengths.tolist()
            embeds = embeds[:, : max(counts)]
            if min(counts) == max(counts):
                return self.model.encode_text(embeds)
        return self.model.encode_text(embeds, lengths)


def _check_values(mask: Tensor) -> None:
    """Raise a ValueError for a mask, or a bias, that weighs tokens and does not choose them."""
    if mask.dim() == 2:
        expected, fits = "0 and 1", (mask == 0) | (mask == 1)
    else:
        expected, fits = f"0 and at most {_DISCARDED:g}", (mask == 0) | (mask <= _DISCARDED)
    if not fits.all():
        got = mask[~fits][0].item()
        raise ValueError(f"encoder_attention_mask: expected values {expected}, got {got:g}")


def _described(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
