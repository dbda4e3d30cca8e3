"""`fastdit train`: what it starts, shows and refuses."""

import json
import os
import types
from dataclasses import replace

import pytest
import torch
from PIL import Image

import fastdit
from fastdit.cli import train
from fastdit.cli.train import print_losses
from fastdit.train.recipe import RECIPES, SHOWINGS, Recipe
from fastdit.train.run_folder import RunFolder
from fastdit.train.sources import Shapes
from fastdit.train.trainer import TrainResult

BRIEF = "--steps 4 --per-class 2 --batch-size 16".split()


QUICK = [*BRIEF, *"--diffusion-steps 25 --schedule cosine".split()]


def test_train_then_resume_then_sample(run, tmp_path):
    out = tmp_path / "run"
    done = run("train", *BRIEF, "--out", out, "--log-every", 1, "--sample-every", 2)
    assert done.exit_code == 0, done.output
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert {name for name in found if not name.startswith("tensorboard/")} == {
        ".lock",
        "model.safetensors",
        "metrics.jsonl",
        "checkpoints/step-00000000.safetensors",
        "checkpoints/step-00000004.safetensors",
        "samples/step-00000002.png",
        "samples/step-00000004.png",
    }
    assert "pass    step   loss" in done.stdout and "   2       4   0." in done.stdout
    assert "published" not in done.stdout  # the recipe is not the published one
    assert "160 samples: colour accuracy" in done.stdout and "images/s" in done.stdout
    assert f"wrote {out}/model.safetensors and {out}/samples/step-00000004.png" in done.stdout
    assert done.stderr.count("warning: terminal SNR") == 1
    assert "loss " in done.stderr and "img/s" in done.stderr and "MFU" in done.stderr
    with Image.open(out / "samples" / "step-00000004.png") as grid:
        assert grid.size == ((16 * 17 - 1) * 3, (4 * 17 - 1) * 3)  # one row per colour
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "shape" in line] == [2, 4]

    again = run("train", *BRIEF, "--out", out)
    assert again.exit_code == 1 and "already holds a run; continue it (--resume auto)" in (
        again.stderr
    )
    resumed = run("train", "--resume", "auto", "--out", out)
    assert resumed.exit_code == 0 and "resuming at step 4 of 4" in resumed.stderr
    assert "nan" not in resumed.stdout
    other = run("train", "--resume", "auto", "--out", out, "--steps", 3)
    assert other.exit_code == 1
    assert "--steps: expected more than the 4 that the run has taken, got 3" in other.stderr

    sampled = run("sample", out / "model.safetensors", "--out", tmp_path / "s.png", "--count", 1)
    assert sampled.exit_code == 0, sampled.output
    assert "sampling" in sampled.stderr and "terminal SNR" not in sampled.stderr


def test_the_sharp_recipe_trains_with_all_its_options(run, tmp_path):
    out = tmp_path / "run"
    done = run("train", "--recipe", "sharp", *QUICK, "--out", out)
    assert done.exit_code == 0, done.output
    header = RunFolder(out).newest().header
    assert Recipe.from_dict(header["recipe"]) == replace(
        RECIPES["sharp"], steps=4, batch_size=16, T=25, warmup=3
    )
    info = fastdit.checkpoints.inspect(out / "model.safetensors")
    assert info.config.null_class and info.diffusion["schedule"] == "cosine"


def test_options_change_the_recipe(run, tmp_path):
    out = tmp_path / "run"
    changes = "--lr 0.01 --lr-schedule constant --warmup 1 --weight-decay 0.1 --clip 0 --ema 0.5"
    done = run("train", *QUICK, *changes.split(), "--label-dropout", 0.2, "--seed", 3, "--out", out)
    assert done.exit_code == 0, done.output
    recipe = Recipe.from_dict(RunFolder(out).newest().header["recipe"])
    assert recipe == Recipe(
        steps=4,
        batch_size=16,
        lr=0.01,
        lr_schedule="constant",
        warmup=1,
        weight_decay=0.1,
        clip=None,
        ema=0.5,
        label_dropout=0.2,
        T=25,
        schedule="cosine",
        seed=3,
    )
    done = run("train", "--resume", "auto", "--out", out, "--clip", 0, "--ema", 0.5)
    assert done.exit_code == 0, done.output


def test_latents_train_any_preset(run, latents, tmp_path, monkeypatch):
    """A published model with learned variance trains on the latents of `fastdit encode`."""
    small = replace(fastdit.PRESETS["DiT-S/4"], hidden=32, n_layers=2, n_heads=2)
    monkeypatch.setitem(fastdit.PRESETS, "DiT-S/4", small)
    out = tmp_path / "run"
    arguments = ["--data", latents[0], "--model", "DiT-S/4", "--recipe", "dit", "--lr", 1e-3]
    brief = ["--steps", 30, "--batch-size", 8, "--diffusion-steps", 50]
    done = run("train", *arguments, *brief, "--log-every", 1, "--out", out)
    assert done.exit_code == 0, done.output
    info = fastdit.checkpoints.inspect(out / "model.safetensors")
    assert info.config.sample_shape == (4, 8, 8) and info.config.num_classes == 3
    assert info.config.learn_sigma and info.labels == ("cat", "dog", "eel")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert "samples" not in done.stdout and not (out / "samples").exists()
    resumed = run("train", "--resume", "auto", "--out", out)
    assert resumed.exit_code == 0 and "resuming at step 30 of 30" in resumed.stderr


def test_a_run_says_whether_its_latents_have_flips(run, flipped_latents, tmp_path):
    arguments = ["--data", flipped_latents[0], "--diffusion-steps", 25, "--schedule", "cosine"]
    brief = ["--batch-size", 4, "--save-every", 1]
    out = tmp_path / "a"
    done = run("train", *arguments, *brief, "--steps", 3, "--recipe", "dit", "--out", out)
    assert done.exit_code == 0, done.output
    assert "data: latents with flips\n" in done.stderr
    # A resumed run draws the same variants.
    middle = out / "checkpoints" / "step-00000002.safetensors"
    done = run("train", "--resume", middle, "--out", tmp_path / "b")
    assert done.exit_code == 0, done.output
    whole, resumed = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
    assert whole == resumed


@pytest.mark.parametrize("recipe", ["seed", "dit", "sit"])
def test_missing_flips_are_named_where_the_recipe_has_them(run, latents, tmp_path, recipe):
    arguments = ["--data", latents[0], "--recipe", recipe]
    if recipe != "sit":
        arguments += ["--diffusion-steps", 25, "--schedule", "cosine"]
    done = run("train", *arguments, *"--steps 1 --batch-size 4 --out".split(), tmp_path / "run")
    assert done.exit_code == 0, done.output
    advice = "data: latents without flips, which the published recipe has: fastdit encode --flip\n"
    assert (advice in done.stderr) == (recipe != "seed")
    assert "data: latents without flips" in done.stderr


def test_latents_are_shown_through_a_vae(run, latents, tmp_path, monkeypatch):
    class Doubles(torch.nn.Module):
        """A stand-in for an autoencoder: pixels are the first three channels, doubled in size."""

        config = types.SimpleNamespace(latent_channels=4, scaling_factor=1.0)

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def decode(self, z):
            pixels = z[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)
            return types.SimpleNamespace(sample=pixels)

    monkeypatch.setattr(train, "load_vae", lambda source, device: Doubles())
    monkeypatch.setitem(SHOWINGS, "dit", replace(SHOWINGS["dit"], steps=5))
    out = tmp_path / "run"
    arguments = ["--data", latents[0], "--recipe", "dit", "--steps", 2, "--batch-size", 4]
    done = run("train", *arguments, "--vae", "any", "--diffusion-steps", 25, "--out", out)
    assert done.exit_code == 0, done.output
    with Image.open(out / "samples" / "step-00000002.png") as grid:
        assert grid.size == ((4 * 17 - 1) * 3,) * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--recipe", "sahrp"),
            "--recipe: expected one of seed, sharp, dit, sit, lightning, flow; got",
        ),
        (("--model", "DiT-S/3"), "--model: expected one of toy, DiT-S/2"),
        (("--data", "nowhere", "--image-size", 8), "nowhere: no such folder"),
        (("--data", "nowhere"), "nowhere: no such folder"),
        (("--image-size", 8), "--image-size: expected --data beside it, got none"),
        (("--no-flip",), "--flip: expected --data beside it, got none"),
        (("--compile", "yes"), "error: --compile: expected one of none, block, whole; got 'yes'"),
        (
            ("--precision", "fp16"),
            "error: --precision: expected one of float32, bfloat16; got 'fp16'",
        ),
        (("--resume", "last.pt"), "--resume: expected auto, no, or a checkpoint's file, got last"),
        (("--accumulate", 3), "error: --batch-size: expected a multiple of 3"),
        (("--label-dropout", 1.5), "error: --label-dropout: expected a share below 1, got 1.5"),
        (("--vae", "x"), "--vae: expected none, since the coloured shapes are pixels"),
        (
            ("--recipe", "dit", "--diffusion-steps", 75),
            "error: --diffusion-steps: expected a multiple of 50, since samples",
        ),
        (("--out", __file__), "error: --out: expected a folder that can be written, got"),
        (
            ("--diffusion-steps", 10, "--schedule", "linear-scaled"),
            "error: --diffusion-steps: schedule='line",
        ),
    ],
)
def test_bad_arguments_are_one_line(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = run("train", "--out", tmp_path / "run", *arguments)
    assert done.exit_code == 1 and message in done.stderr
    assert "Traceback" not in done.output and not (tmp_path / "run").exists()


def test_latents_without_a_vae_cannot_be_shown(run, latents, tmp_path):
    done = run("train", "--data", latents[0], "--sample-every", 5, "--out", tmp_path / "run")
    assert done.exit_code == 1 and "--sample-every: expected --vae" in done.stderr
    done = run("train", "--data", latents[0], "--per-class", 5, "--out", tmp_path / "run")
    assert done.exit_code == 1 and "--per-class: expected none beside --data" in done.stderr


def test_losses_stand_beside_the_published_ones_for_the_default_recipe(capsys):
    losses = torch.cat([torch.full((25,), 0.5 - i / 100) for i in range(30)])
    result = TrainResult(True, losses, 100.0, 1.0)
    print_losses(result, Recipe(seed=3), Shapes(seed=3))
    lines = capsys.readouterr().out.splitlines()
    assert "   1      25   0.5000   0.9147" in lines and "  30     750   0.2100   0.1228" in lines
    print_losses(result, Recipe(lr=1e-3), Shapes())
    assert "0.9147" not in capsys.readouterr().out
    print_losses(result, Recipe(), Shapes(100))
    assert "0.9147" not in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["sharp", "dit"])
def test_without_dropped_labels_samples_are_made_without_guidance(run, tmp_path, recipe):
    arguments = ["--recipe", recipe, "--label-dropout", 0, *QUICK, "--diffusion-steps", 100]
    done = run("train", *arguments, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "samples" / "step-00000004.png").exists()


def test_two_runs_do_not_share_a_folder(run, tmp_path):
    with RunFolder(tmp_path).claimed():
        done = run("train", *QUICK, "--out", tmp_path)
    message = f"error: --out: another run is going on in {tmp_path} (process {os.getpid()}); wait"
    assert done.exit_code == 1 and message in done.stderr
    assert run("train", *QUICK, "--out", tmp_path).exit_code == 0
    with RunFolder(tmp_path).claimed():  # a run that has written checkpoints and is going on
        done = run("train", *QUICK, "--out", tmp_path)
    assert done.exit_code == 1 and message in done.stderr
    done = run("train", *QUICK, "--out", tmp_path)
    assert done.exit_code == 1 and "already holds a run; continue it" in done.stderr


def test_batches_larger_than_the_set_have_a_loss(run, latents, tmp_path):
    brief = ["--steps", 3, "--batch-size", 24, "--out", tmp_path / "run"]
    done = run("train", "--data", latents[0], *brief)
    assert done.exit_code == 0 and "nan" not in done.stdout, done.output
    assert len(done.stdout.split("\n")) >= 4
