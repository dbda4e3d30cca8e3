"""The stand-ins' inputs that are no tensors, as a hand-written loop may pass them."""

import re

import pytest
import torch

import fastdit
from fastdit.pipeline import PipelineTransformer

pytest.importorskip("diffusers")
SIZES = dict(img_size=4, in_channels=4, hidden=24, n_layers=1, n_heads=2, text_width=8)
GIVEN = dict(
    hidden_states=torch.zeros(1, 4, 4, 4),
    encoder_hidden_states=torch.zeros(1, 2, 8),
    timestep=torch.tensor([5]),
)


@pytest.mark.parametrize("kind", [fastdit.PixArt, fastdit.MMDiT])
@pytest.mark.parametrize("name", GIVEN)
def test_what_is_no_tensor_is_named(kind, name):
    pooled = {"pooled_projections": torch.zeros(1, 2048)} if kind is fastdit.MMDiT else {}
    with pytest.raises(ValueError, match=f"{name}: expected a tensor, got list"):
        PipelineTransformer(kind(**SIZES))(**GIVEN | pooled | {name: [5]})


def test_masks_and_blocks_that_are_none_are_named():
    pixart, mmdit = (PipelineTransformer(kind(**SIZES)) for kind in (fastdit.PixArt, fastdit.MMDiT))
    with pytest.raises(ValueError, match="encoder_attention_mask: expected a tensor, got list"):
        pixart(**GIVEN, encoder_attention_mask=[[1, 1]])
    for skipped in (1, [[0]]):
        with pytest.raises(ValueError, match=re.escape(f"not all of them; got {skipped}")):
            mmdit(**GIVEN, pooled_projections=torch.zeros(1, 2048), skip_layers=skipped)
