"""Decoding: the autoencoder's own images, a few at a time, from the command line too."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fastdit
from fastdit import DiffusionScheduler
from fastdit.cli import app
from fastdit.images import to_pixels
from fastdit.latents import decode, load_vae
from fastdit.testing import randomize


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.25,
    )
    folder = tmp_path_factory.mktemp("pipeline")
    vae.save_pretrained(folder / "vae")
    return folder


@torch.no_grad()
def test_slices_are_the_autoencoders_own_images(vae_folder):
    vae, latents = load_vae(vae_folder / "vae"), torch.randn(5, 4, 8, 8)
    expected = vae.decode(latents / 0.25).sample
    seen = []
    decoder = vae.decode
    vae.decode = lambda z: seen.append(len(z)) or decoder(z)
    assert torch.allclose(decode(vae, latents, at_once=2), expected, atol=1e-5)
    assert seen == [2, 2, 1]


def test_what_cannot_be_decoded_is_named(vae_folder, tmp_path, monkeypatch):
    vae = load_vae(vae_folder)  # a pipeline's
    with pytest.raises(ValueError, match=r"latents: expected shape \[B, 4, h, w\].*got \[1, 3, 8"):
        decode(vae, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="at_once: expected at least 1, got 0"):
        decode(vae, torch.zeros(1, 4, 8, 8), at_once=0)
    with pytest.raises(ValueError, match="vae: expected an AutoencoderKL in"):
        load_vae(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"vae: needs the package diffusers; pip install 'fastdit"):
        load_vae(vae_folder)


@pytest.mark.parametrize("suffix", [".png", ".npz"])
def test_the_command_line_decodes(vae_folder, tmp_path, suffix):
    cfg = replace(
        fastdit.PRESETS["DiT-S/8"], img_size=16, hidden=32, n_layers=1, n_heads=2, num_classes=5
    )
    model = fastdit.DiT.from_config(cfg)
    randomize(model)
    scheduler = DiffusionScheduler(5, schedule="cosine")
    path, out = tmp_path / "m.safetensors", tmp_path / f"s{suffix}"
    fastdit.save(model, path, scheduler)
    chosen = ["--labels", "3,4", "--count", "1", "--seed", "2", "--out", str(out)]
    done = CliRunner().invoke(app, ["sample", str(path), *chosen, "--vae", str(vae_folder)])
    assert done.exit_code == 0, done.output
    latents = fastdit.Sampler(model, scheduler)([3, 4], seed=2)
    expected = to_pixels(decode(load_vae(vae_folder), latents))
    if suffix == ".npz":
        with np.load(out) as file:
            assert np.array_equal(file["arr_0"], expected)
    else:
        with Image.open(out) as grid:
            assert grid.size == (64, 130)  # two images of 32 pixels, twice their size, in a column
    done = CliRunner().invoke(app, ["sample", str(path), *chosen])
    assert done.exit_code == (1 if suffix == ".png" else 0)
    assert suffix == ".npz" or "expected --vae to decode them" in done.stderr
