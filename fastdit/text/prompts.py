"""The embeddings of a batch of prompts, as text encoders return them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdit.errors import FLOAT_DTYPES, check_finite


class Prompts:
    """Embeddings of B prompts.

    Attributes:
        embeds: [B, M, C] floats, of which each prompt's own tokens come first.
        lengths: how many tokens are each prompt's own, B integers from 1 to M.
        pooled: [B, P] floats, or None.
    """

    def __init__(
        self,
        embeds: Tensor | Sequence[Tensor],
        pooled: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Take embeddings.

        Args:
            embeds: [B, M, C] floats, or B tensors [M_i, C] of prompts of different lengths.
            pooled: [B, P], the pooled embeddings that an MMDiT takes too; None for a PixArt.
            mask: [B, M], one where a token is the prompt's and zero where it is padding, as a
                tokenizer returns it; None where all are the prompt's. Only for a single tensor,
                of which what is padding is not read.

        Raises:
            ValueError: a shape or dtype is wrong, values are not finite, or a prompt has no token.
        """
        if isinstance(embeds, Tensor):
            _check_floats("embeds", embeds, "[B, M, width]")
            self.embeds, self.lengths = _packed(embeds, mask)
        else:
            if mask is not None:
                raise ValueError("mask: expected None beside a list of embeds, got a tensor")
            self.embeds, self.lengths = _padded(embeds)
        self.pooled = pooled
        check_finite("embeds", {"it": self.embeds})
        if pooled is not None:
            _check_floats("pooled", pooled, "[B, width]")
            if len(pooled) != len(self):
                expected = f"{len(self)} rows, as many as embeds has prompts"
                raise ValueError(f"pooled: expected {expected}, got {len(pooled)}")
            check_finite("pooled", {"it": pooled})

    def __len__(self) -> int:
        return len(self.embeds)


def _check_floats(name: str, value: object, shape: str) -> None:
    dims = shape.count(",") + 1
    if not isinstance(value, Tensor) or value.dtype not in FLOAT_DTYPES or value.dim() != dims:
        got = type(value).__name__
        if isinstance(value, Tensor):
            got = f"{value.dtype} of shape {list(value.shape)}"
        raise ValueError(f"{name}: expected a float tensor {shape}, got {got}")
    if not value.numel():
        raise ValueError(f"{name}: expected at least one value, got shape {list(value.shape)}")
    _check_has_values(name, value)


def _check_has_values(name: str, value: Tensor) -> None:
    if value.layout != torch.strided or value.is_meta:
        kind = "a meta tensor" if value.is_meta else str(value.layout)
        raise ValueError(f"{name}: expected values in a strided tensor, got {kind}")


def _packed(embeds: Tensor, mask: Tensor | None) -> tuple[Tensor, list[int]]:
    """Return embeds with the tokens that a mask keeps first, then zeros; and how many it keeps."""
    B, M, _ = embeds.shape
    if mask is None:
        return embeds, [M] * B
    if not isinstance(mask, Tensor) or mask.shape != (B, M):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask: expected shape {[B, M]}, as embeds has prompts, got {got}")
    _check_has_values("mask", mask)
    fits = (mask == 0) | (mask == 1)
    if not fits.all():  # such as a bias, which is zero where a mask is one
        raise ValueError(f"mask: expected values 0 and 1, got {mask[~fits][0].item():g}")
    embeds, counts = kept_first(embeds, mask.to(embeds.device) != 0)
    lengths = counts.tolist()
    if 0 in lengths:
        raise ValueError(f"mask: expected a token of each prompt, got none of {lengths.index(0)}")
    own = torch.arange(M, device=embeds.device) < counts[:, None]
    return torch.where(own[:, :, None], embeds, 0.0), lengths


def kept_first(embeds: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Move the tokens that a mask keeps to the front, in their order; no value is read.

    Args:
        embeds: [B, M, C].
        kept: [B, M] bool.

    Returns:
        embeds in the new order, and [B] int64, how many each prompt keeps.
    """
    order = torch.argsort(kept.logical_not().to(torch.int8), dim=1, stable=True)
    return embeds.gather(1, order[:, :, None].expand_as(embeds)), kept.sum(1)


def _padded(embeds: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Return tensors [M_i, C] in one, [B, M, C], filled up with zeros, and their lengths."""
    if not isinstance(embeds, list | tuple) or not embeds:
        got = "none" if isinstance(embeds, list | tuple) else type(embeds).__name__
        raise ValueError(
            f"embeds: expected a tensor [B, M, width] or a list of [M, width]; got {got}"
        )
    for one in embeds:
        _check_floats("embeds", one, "[M, width]")
        if one.device != embeds[0].device:
            got = f"{embeds[0].device} and {one.device}"
            raise ValueError(f"embeds: expected prompts on one device, got {got}")
        if one.shape[1] != embeds[0].shape[1]:
            widths = sorted({t.shape[1] for t in embeds})
            raise ValueError(f"embeds: expected prompts of one width, got {widths}")
    return torch.nn.utils.rnn.pad_sequence(list(embeds), batch_first=True), [*map(len, embeds)]
