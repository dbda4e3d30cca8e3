"""The checkpoints of diffusers that several tests read."""

import pytest
import torch

from fastdit.testing import randomize


def make_transformer(**options):
    """Return a tiny DiT of diffusers, whose blocks have different embedders."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = dict(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    model = diffusers.DiTTransformer2DModel(**sizes | options)
    randomize(model)
    return model.eval()


@pytest.fixture(scope="session")
def transformer():
    """A DiT of diffusers with 1,000 classes, whose blocks have the same embedders."""
    model = make_transformer()
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


@pytest.fixture(scope="session")
def from_scratch():
    """A DiT as diffusers trains it from scratch: each block has embedders of its own."""
    return make_transformer(num_layers=3)


@pytest.fixture(scope="session")
def from_scratch_without_variance():
    """The same with the noise as its only output, since pipelines drop a learned variance."""
    return make_transformer(num_layers=3, out_channels=4)


@pytest.fixture(scope="session")
def vae():
    """An autoencoder for their latents."""
    AutoencoderKL = pytest.importorskip("diffusers").AutoencoderKL
    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    ).eval()
