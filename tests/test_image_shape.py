"""Images that are not square, through training, files, commands and other projects' layouts."""

import json
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import fastdit
from fastdit import PRESETS, DiffusionScheduler, DiTConfig, Sampler, reference
from fastdit.cli import train as train_command
from fastdit.cli.app import app
from fastdit.data.images import to_pixels
from fastdit.pipeline import PipelineTransformer
from fastdit.testing import randomize
from fastdit.train.recipe import Recipe
from fastdit.train.run_folder import RunFolder
from fastdit.train.sources import ImageBatch
from fastdit.train.trainer import Trainer

WIDE = DiTConfig(img_size=(8, 16), hidden=8, n_layers=1, n_heads=2, num_classes=2)
RECIPE = Recipe(steps=4, batch_size=6)
PUBLISHED = replace(
    PRESETS["DiT-S/2"], img_size=(4, 8), hidden=16, n_layers=1, n_heads=2, num_classes=3
)


class Stripes:
    """Ten images of 8 x 16 pixels."""

    sample_shape = (3, 8, 16)
    label_names = ("light", "dark")
    identity = {"kind": "stripes"}

    def __init__(self):
        self.images = torch.randn(10, 3, 8, 16, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return 10

    def take(self, rows):
        return ImageBatch(self.images[rows], None, rows % 2)


def make_model(cfg):
    model = fastdit.DiT.from_config(cfg)
    randomize(model)
    return model


def run(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_steps_equal_a_plain_loop():
    ours = Trainer(WIDE, RECIPE, Stripes())
    plain = reference.DiT.from_config(WIDE)
    plain.load_state_dict(ours.model.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=RECIPE.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=RECIPE.steps)
    losses = []
    for _ in range(RECIPE.steps):
        batch = ours.objective.draw(*ours.loader.load(ours.step))
        loss = F.mse_loss(plain(batch.x_t, batch.t, batch.labels), batch.eps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        ours.train_step()
    assert ours.history[0].tolist() == pytest.approx(losses, rel=1e-4)


def test_a_run_is_saved_and_resumed(tmp_path):
    whole = Trainer(WIDE, RECIPE, Stripes())
    whole.run()
    first = Trainer(WIDE, RECIPE, Stripes(), tmp_path)
    first.train_step()
    first.save()
    resumed = Trainer.resume(RunFolder(tmp_path).newest(), tmp_path, source=Stripes())
    assert resumed.config == WIDE
    resumed.run()
    assert same_weights(resumed.model, whole.model)
    model = fastdit.load(tmp_path / "model.safetensors")
    assert model.cfg == WIDE and model.cfg.img_size == (8, 16)


@pytest.mark.parametrize("cfg", [WIDE, PUBLISHED], ids=["learned", "sincos"])
def test_a_file_keeps_the_shape(tmp_path, cfg):
    model = make_model(cfg)
    fastdit.save(model, tmp_path / "m.safetensors")
    again = fastdit.load(tmp_path / "m.safetensors")
    assert again.cfg == cfg and same_weights(again, model)
    x, t, y = torch.randn(2, *cfg.sample_shape), torch.tensor([3, 9]), torch.tensor([0, 1])
    assert torch.equal(again(x, t, y), model(x, t, y))


def test_samples_are_written_in_their_shape(tmp_path):
    path, model, scheduler = (
        tmp_path / "m",
        make_model(WIDE),
        DiffusionScheduler(4, schedule="cosine"),
    )
    fastdit.save(model, path, scheduler)
    expected = to_pixels(Sampler(model, scheduler)([0, 0, 1, 1], seed=0))
    assert expected.shape == (4, 8, 16, 3)
    run("sample", path, "--count", 2, "--out", tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as file:
        assert np.array_equal(file["arr_0"], expected)
    run("sample", path, "--count", 2, "--out", tmp_path / "s.png")
    with Image.open(tmp_path / "s.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape == ((2 * 9 - 1) * 4, (2 * 17 - 1) * 4, 3)  # a pixel is 4 x 4
    assert np.array_equal(sheet[36:68:4, 68:132:4], expected[3])
    run("sample", path, "--num-images", 3, "--batch-size", 3, "--out", tmp_path / "many.npz")
    with np.load(tmp_path / "many.npz") as file:
        assert file["arr_0"].shape == (3, 8, 16, 3)


def test_info_prints_the_shape(tmp_path):
    fastdit.save(make_model(WIDE), tmp_path / "m")
    printed = run("info", tmp_path / "m")
    assert "img_size         (8, 16)\n" in printed
    parameters = sum(p.numel() for p in fastdit.DiT.from_config(WIDE).parameters())
    assert f"parameters       {parameters:,}\n" in printed


class Doubles(nn.Module):
    """A stand-in for an autoencoder: pixels are the first three channels, doubled in size."""

    config = types.SimpleNamespace(latent_channels=4, scaling_factor=1.0)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def decode(self, z):
        pixels = z[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)
        return types.SimpleNamespace(sample=pixels)


def test_the_command_trains_on_latents_of_any_shape_and_shows_them(tmp_path, monkeypatch):
    folder, out = tmp_path / "latents", tmp_path / "run"
    folder.mkdir()
    plan = dict(num=4, batch_size=4, labels=[0, 0, 1, 1], classes=["cat", "dog"])
    (folder / "plan.json").write_text(json.dumps(plan))
    both = np.random.default_rng(0).standard_normal((4, 8, 4, 8)).astype(np.float32)
    both[:, 4:] = 0.1  # the standard deviations
    np.save(folder / "00000000.npy", both)
    small = DiTConfig(hidden=8, n_layers=1, n_heads=1)
    monkeypatch.setitem(PRESETS, "toy", small)
    monkeypatch.setattr(train_command, "load_vae", lambda source, device: Doubles())
    brief = ["--steps", 2, "--batch-size", 4, "--diffusion-steps", 25, "--schedule", "cosine"]
    run("train", "--data", folder, "--vae", "any", *brief, "--out", out)
    cfg = replace(small, in_channels=4, img_size=(4, 8), num_classes=2)
    assert fastdit.load(out / "model.safetensors").cfg == cfg
    with Image.open(out / "samples" / "step-00000002.png") as grid:
        assert grid.size == ((4 * 17 - 1) * 3, (4 * 9 - 1) * 3)  # of 8 x 16 pixels


@pytest.mark.parametrize("size", [(4, 16), (4, 8)], ids=str)
def test_the_other_layouts_keep_a_shape_or_refuse_it(tmp_path, size):
    """facebookresearch's keeps it in its positions, and diffusers' DiT is square."""
    model = make_model(replace(PUBLISHED, img_size=size))
    fastdit.save(model, tmp_path / "m.pt", layout="facebookresearch/DiT")
    assert fastdit.load(tmp_path / "m.pt").cfg == model.cfg
    theirs = make_model(replace(PUBLISHED, img_size=size, mlp_ln_eps=1e-5, t_freq_shift=1))
    with pytest.raises(ValueError, match=r"layout: .* square images only, got img_size \(4, "):
        fastdit.save(theirs, tmp_path / "m", layout="diffusers")


def test_a_pipelines_transformer_takes_any_shape():
    model = make_model(PUBLISHED)
    stand_in = PipelineTransformer(model)
    assert stand_in.config.sample_size == (4, 8)
    x, t, y = torch.randn(2, 4, 4, 8), torch.tensor([3, 9]), torch.tensor([0, 3])
    assert torch.equal(stand_in(x, t, y).sample, model(x, t, y))
