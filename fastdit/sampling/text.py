"""Prompts in a sampling loop, and the models that take them: PixArt and MMDiT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.sampling.modulation import ChunkedTables, Projection
from fastdit.sampling.predictors import Constants, Prepared, TokenLayout, WeightsPredictor
from fastdit.text import MMDiT, PixArt, Prompts, Text, TextModel

_PIXELS = 8  # along a side of one cell of the latents of all published models
_BUCKETS = 8


@dataclass(frozen=True, eq=False)
class PromptRows:
    """Prompts of B rows, or of 2B with the negative ones last."""

    embeds: Tensor  # [R, M, text_width], of which M is the longest prompt's
    lengths: list[int]  # R of them, from 1 to M
    pooled: Tensor | None  # [R, pooled_width]

    @classmethod
    def of(cls, prompts: Prompts, negative: Prompts | None) -> PromptRows:
        """Take prompts, and as many negative ones after them, or one that serves all."""
        B, given = len(prompts), [prompts]
        if negative is not None:
            given.append(negative)
        copies = [B // len(one) for one in given]
        lengths = [n for one, k in zip(given, copies, strict=True) for n in one.lengths * k]
        most, like = max(lengths), prompts.embeds
        embeds = [
            _to_length(one.embeds, most).to(like.device, like.dtype).repeat(k, 1, 1)
            for one, k in zip(given, copies, strict=True)
        ]
        pooled = [
            one.pooled.to(like.device).repeat(k, 1)
            for one, k in zip(given, copies, strict=True)
            if one.pooled is not None
        ]
        return cls(torch.cat(embeds), lengths, torch.cat(pooled) if pooled else None)

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """The same rows as a model takes them, which does not change over the steps."""

    text: Text
    pooled: Tensor | None  # [U, D], the part of the conditioning of the distinct pooled embeddings
    row_of: list[int]  # R numbers of rows of `pooled`

    def __len__(self) -> int:
        return len(self.row_of)

    def pick(self, rows: Sequence[int]) -> EncodedRows:
        picked = list(rows)
        lengths = None if self.text.lengths is None else self.text.lengths[picked]
        text = Text(self.text.tokens[picked], lengths)
        return EncodedRows(text, self.pooled, [self.row_of[i] for i in picked])


def is_text_model(model: nn.Module) -> TypeGuard[TextModel]:
    """Return whether a model takes prompts."""
    return isinstance(model, TextModel)


def check_own_forward(model: TextModel) -> None:
    """Raise a ValueError for a text model whose forward is not its class' own, or is hooked.

    Sampling calls the parts of a forward one by one, and would miss such a change.
    """
    if model._forward_hooks or model._forward_pre_hooks:
        raise ValueError(
            "model: expected no hooks on its forward, which the Sampler does not call, got some; "
            "hook its parts instead"
        )
    base = PixArt if isinstance(model, PixArt) else MMDiT
    if getattr(type(model), "forward", None) is not base.forward or "forward" in vars(model):
        raise ValueError(
            f"model: expected {base.__name__}'s own forward, since the Sampler calls its parts one "
            f"by one, got another one in {type(model).__name__}"
        )


def _to_length(embeds: Tensor, length: int) -> Tensor:
    """Return embeddings [R, M, C] cut, or filled up with zeros, to a length."""
    embeds = embeds[:, :length]
    return F.pad(embeds, (0, 0, 0, length - embeds.shape[1]))


def bucket(tokens: int, most: int) -> int:
    """Return the length that a text is padded to where texts of several lengths share a graph.

    It is a multiple of an eighth of the model's most tokens, or that number itself.
    """
    unit = -(-most // _BUCKETS)
    return min(most, -(-tokens // unit) * unit)


class TextProjection(Projection):
    """The modulation of a text model, for some distinct conditions beside the timestep."""

    split, labels = False, "conditions"

    def __init__(self, model: TextModel, conditions: Tensor | None) -> None:
        """Take a model, and what is added to the timestep's part of the conditioning.

        Args:
            model: the model.
            conditions: [U, D], of which a label is the number of a row; None for nothing.
        """
        self.model: TextModel = model
        self._conditions = conditions
        weight = next(model.parameters())
        self._device = weight.device
        # The layers' outputs stand beside the table while they are put together.
        self.row_bytes = 2 * model.cfg.modulation_width * weight.element_size()

    @property
    def device(self) -> torch.device:
        return self._device

    def by_step(self, t: Tensor, labels: Tensor | None) -> Tensor:
        c = self.model.time_conditioning(t)[:, None]
        if self._conditions is not None:
            c = c + (self._conditions if labels is None else self._conditions[labels])
        return self.model.modulation_of(c.flatten(0, 1)).view(*c.shape[:2], -1)

    def by_label(self, labels: Tensor | None) -> None:
        return None


class TextPredictor(WeightsPredictor[TextModel]):
    """A PixArt or an MMDiT: its text is encoded and its modulation computed ahead of the steps.

    `constants` are the encoded text, its lengths and the positions.
    """

    def __init__(
        self,
        model: TextModel,
        dtype: torch.dtype,
        copies: bool,
        sample_shape: tuple[int, int, int],
    ) -> None:
        """With `copies` texts are padded to `bucket` too, so that several lengths share a graph."""
        super().__init__(model, dtype, copies, TokenLayout(sample_shape, model.cfg.patch_size))
        self.cfg, self._buckets, self._sample_shape = model.cfg, copies, sample_shape

    def encode(self, conditions: PromptRows) -> EncodedRows:
        embeds, lengths = conditions.embeds, conditions.lengths
        device = next(self.model.parameters()).device
        embeds = embeds.to(device, self.dtype)
        if self._buckets:
            embeds = _to_length(embeds, bucket(embeds.shape[1], self.cfg.text_tokens))
        all_whole = not self._buckets and set(lengths) == {embeds.shape[1]}
        own = None if all_whole else torch.tensor(lengths, device=device)
        text = self.model.encode_text(embeds, own)
        if isinstance(self.model, MMDiT):
            assert conditions.pooled is not None
            # In float64, since PyTorch does not sort all 16-bit floats on all devices.
            distinct, row_of = conditions.pooled.double().unique(dim=0, return_inverse=True)
            pooled = self.model.pooled_conditioning(distinct.to(device, self.dtype))
            return EncodedRows(text, pooled, row_of.tolist())
        return EncodedRows(text, self._size_conditioning(device), [0] * len(conditions))

    def _size_conditioning(self, device: torch.device) -> Tensor | None:
        """Return what the size of the images adds to the conditioning: [1, D], or None."""
        if not (isinstance(self.model, PixArt) and self.model.cfg.size_conditions):
            return None
        H, W = (_PIXELS * side for side in self._sample_shape[1:])
        size = torch.tensor([[H, W]], dtype=torch.float32, device=device)
        ratio = torch.tensor([[H / W]], dtype=torch.float32, device=device)
        return self.model.size_conditioning(size, ratio)

    def begin(
        self,
        timesteps: Sequence[int] | Sequence[float],
        conditions: EncodedRows,
        table_bytes: int,
    ) -> Prepared:
        projection = TextProjection(self.model, conditions.pooled)
        tables = ChunkedTables(projection, timesteps, conditions.row_of, table_bytes)
        positions = self.model.positions(self.layout.grid)
        made: dict[int, Constants] = {}

        def constants(count: int) -> Constants:
            if count not in made:
                made[count] = (*conditions.text.rows(count), positions)
            return made[count]

        return Prepared(tables.rows, constants)

    def __call__(self, x: Tensor, rows: Tensor, /, *constants: Any) -> Tensor:
        tokens, lengths, positions = constants
        given = self.layout.to_tokens(x, len(rows), self.dtype)
        out = self.model.denoise(given, rows, Text(tokens, lengths), positions)
        return out.view(len(rows), x.shape[1], -1)
