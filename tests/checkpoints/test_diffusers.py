"""A DiT of diffusers: its network is reproduced, its folders are read and written."""

import json
from dataclasses import replace

import pytest
import torch

import fastdit
from fastdit.pipeline import PipelineTransformer
from fastdit.testing import relative_error


@torch.no_grad()
def test_the_network_of_diffusers_is_reproduced(transformer):
    model = fastdit.load(transformer)
    assert model.cfg.t_freq_shift == 1 and model.cfg.mlp_ln_eps == 1e-5
    assert relative_error(model.pos_embed, transformer.pos_embed.pos_embed) < 1e-6
    x, t, y = torch.randn(5, 4, 8, 8), torch.randint(1000, (5,)), torch.randint(1001, (5,))
    expected = transformer(x, timestep=t, class_labels=y).sample
    assert relative_error(model(x, t, y), expected) < 1e-5
    plain = fastdit.DiT.from_config(replace(model.cfg, t_freq_shift=0, mlp_ln_eps=None))
    plain.load_state_dict(model.state_dict())
    assert relative_error(plain(x, t, y), expected) > 1e-4  # both choices matter


@pytest.mark.parametrize("as_pipeline", [False, True], ids=["transformer", "pipeline"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_folders_of_diffusers_are_read(transformer, tmp_path, as_pipeline, safe):
    folder = tmp_path / "transformer" if as_pipeline else tmp_path
    transformer.save_pretrained(folder, safe_serialization=safe)
    read, live = fastdit.load(tmp_path), fastdit.load(transformer)
    assert read.cfg == live.cfg
    assert all(map(torch.equal, read.state_dict().values(), live.state_dict().values()))


def test_a_round_trip_keeps_every_bit(transformer, tmp_path):
    from diffusers import DiTTransformer2DModel

    model = fastdit.load(transformer)
    fastdit.save(model, tmp_path / "folder", layout="diffusers")
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "folder").state_dict()
    assert theirs.keys() == transformer.state_dict().keys()
    assert all(torch.equal(theirs[name], t) for name, t in transformer.state_dict().items())
    again = fastdit.load(tmp_path / "folder")
    assert again.cfg == model.cfg
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_a_folder_that_is_not_a_dit_of_diffusers_is_an_error(transformer, tmp_path):
    with pytest.raises(ValueError, match="keys look like those of diffusers: pass the folder"):
        fastdit.load(transformer.state_dict())
    with pytest.raises(ValueError, match="expected config.json and diffusion_pytorch_model.safet"):
        fastdit.load(tmp_path)
    transformer.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    for text, message in (
        ("{", "config.json: expected JSON"),
        (config.replace("ada_norm_zero", "layer_norm"), "expected norm_type to be one of ada_norm"),
        (config.replace('"num_layers": 2', '"num_layers": 3'), "says 3 blocks.*have 2 blocks"),
        (
            config.replace('"sample_size"', '"size"'),
            "expected sample_size to be a positive integer",
        ),
        (config.replace('_head_dim": 16', '_head_dim": 1000000'), "says 2 blocks and.*2000000"),
        (config.replace('_heads": 2', '_heads": "2"'), "expected num_attention_heads to be a pos"),
        (config.replace('"out_channels": 8', '"out_channels": 7'), "expected out_channels of 4 or"),
        ("[" * 100_000, "config.json: expected JSON"),
        ("[]", "config.json: expected a JSON object"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            fastdit.load(tmp_path)
    published = replace(fastdit.PRESETS["DiT-S/8"], hidden=32, n_layers=1, n_heads=2)
    with pytest.raises(ValueError, match="diffusers can store such a DiT only as"):
        fastdit.save(fastdit.DiT.from_config(published), tmp_path / "new", layout="diffusers")
    with pytest.raises(ValueError, match="can store such a DiT only as"):
        fastdit.save(fastdit.load(transformer), tmp_path / "m.pt", layout="facebookresearch/DiT")


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0], ids=["plain", "guided"])
def test_a_pipeline_of_diffusers_gives_the_same_images(transformer, guidance_scale):
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    pipe = DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def images():
        return pipe(
            class_labels=[7, 207],
            guidance_scale=guidance_scale,
            generator=torch.manual_seed(5),
            num_inference_steps=5,
            output_type="pt",
        ).images

    expected = images()
    pipe.transformer = PipelineTransformer(fastdit.load(transformer))
    assert relative_error(images(), expected) < 1e-5
    pair = pipe.transformer(
        torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.tensor([7]), None, False
    )
    assert isinstance(pair, tuple) and pair[0].shape == (1, 8, 8, 8)
    with pytest.raises(ValueError, match="cross_attention_kwargs: expected None"):
        pipe.transformer(torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.tensor([7]), {"a": 1})


def test_positions_that_diffusers_would_not_compute_are_refused(transformer, tmp_path):
    model = fastdit.load(transformer)
    with torch.no_grad():
        model.pos_embed.add_(1)
    with pytest.raises(ValueError, match="pos_embed: expected the one that diffusers computes"):
        fastdit.save(model, tmp_path / "m", layout="diffusers")
    assert not (tmp_path / "m").exists()


def test_a_half_written_folder_is_not_loaded(transformer, tmp_path, monkeypatch):
    """The old config would fit the new weights and give a different network."""
    model = fastdit.load(transformer)
    fastdit.save(model, tmp_path / "m", layout="diffusers")
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        fastdit.save(model, tmp_path / "m", layout="diffusers")
    monkeypatch.setattr(json, "dumps", dumps)
    with pytest.raises(ValueError, match="expected config.json"):
        fastdit.load(tmp_path / "m")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="it is a pipeline's; save to its folder 'transformer'"):
        fastdit.save(model, tmp_path / "p", layout="diffusers")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_a_round_trip_keeps_16_bit_weights(transformer, tmp_path, dtype):
    model = fastdit.load(transformer).to(dtype)
    fastdit.save(model, tmp_path / "m", layout="diffusers")
    again = fastdit.load(tmp_path / "m")
    assert again.cfg == model.cfg and again.pos_embed.dtype == dtype
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
