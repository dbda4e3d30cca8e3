"""The checkpoint of diffusers that several tests read."""

import pytest
import torch

from fastdit.testing import randomize


@pytest.fixture(scope="session")
def transformer():
    """A tiny DiT of diffusers with 1,000 classes, whose blocks have the same embedders."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    randomize(model)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model.eval()
