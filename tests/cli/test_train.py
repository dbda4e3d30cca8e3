"""`fastdit train`: what it starts, continues, shows and refuses."""

import json
import os
import signal
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fastdit
from fastdit import DiffusionScheduler
from fastdit.cli import train
from fastdit.cli.app import app
from fastdit.cli.train import print_losses
from fastdit.train import monitor
from fastdit.train.recipe import RECIPES, SHOWINGS, Recipe
from fastdit.train.run_folder import RunFolder
from fastdit.train.sources import Shapes
from fastdit.train.trainer import Trainer, TrainResult

BRIEF = "--steps 4 --per-class 2 --batch-size 16".split()
QUICK = [*BRIEF, *"--diffusion-steps 25 --schedule cosine".split()]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_train_then_resume_then_sample(tmp_path):
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
    assert "published" not in done.stdout  # another recipe's figures
    assert "160 samples: colour accuracy" in done.stdout and "images/s" in done.stdout
    assert f"wrote {out}/model.safetensors and {out}/samples/step-00000004.png" in done.stdout
    assert "warning: terminal SNR" in done.stderr
    assert "loss " in done.stderr and "img/s" in done.stderr and "MFU" in done.stderr
    with Image.open(out / "samples" / "step-00000004.png") as grid:
        assert grid.size == ((16 * 17 - 1) * 3, (4 * 17 - 1) * 3)  # one row a colour
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
    assert "--steps: the run was started with 4, got 3" in other.stderr

    sampled = run("sample", out / "model.safetensors", "--out", tmp_path / "s.png", "--count", 1)
    assert sampled.exit_code == 0, sampled.output
    assert "sampling" in sampled.stderr


def test_resume_auto_begins_where_there_is_nothing(tmp_path):
    done = run("train", *QUICK, "--resume", "auto", "--out", tmp_path / "run")
    assert done.exit_code == 0 and "resuming" not in done.stderr


def test_resume_auto_passes_over_a_torn_checkpoint(tmp_path):
    out = tmp_path / "run"
    assert run("train", *QUICK, "--save-every", 2, "--out", out).exit_code == 0
    final = (out / "model.safetensors").read_bytes()
    newest = out / "checkpoints" / "step-00000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1000])
    done = run("train", "--resume", "auto", "--out", out)
    assert done.exit_code == 0, done.output
    assert "warning: not resumed from: " in done.stderr and "truncated" in done.stderr
    assert "resuming at step 2 of 4" in done.stderr
    assert (out / "model.safetensors").read_bytes() == final
    for _, path in RunFolder(out).checkpoints():
        path.write_bytes(b"")
    done = run("train", "--resume", "auto", "--out", out)
    assert done.exit_code == 1 and "none of its 2 checkpoints is whole" in done.stderr


def test_resume_takes_a_file_unless_later_ones_would_be_lost(tmp_path):
    out = tmp_path / "run"
    assert run("train", *QUICK, "--save-every", 2, "--out", out).exit_code == 0
    early = out / "checkpoints" / "step-00000002.safetensors"
    done = run("train", "--resume", early, "--out", out)
    assert done.exit_code == 1 and "holds a later checkpoint, step-00000004" in done.stderr
    done = run("train", "--resume", early, "--out", tmp_path / "other")
    assert done.exit_code == 0 and "resuming at step 2 of 4" in done.stderr
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == (
        out / "model.safetensors"
    ).read_bytes()


def test_an_interrupt_saves_and_says_how_to_go_on(tmp_path, monkeypatch):
    out = tmp_path / "run"
    original = Trainer.train_step

    def interrupted(self):
        original(self)
        if self.step == 2:
            os.kill(os.getpid(), 2)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", interrupted)
        done = run("train", "--out", out, *QUICK)
    assert done.exit_code == 130, done.output
    assert (
        f"stopped at step 2 of 4, and saved; continue with fastdit train --resume auto --out {out}"
        in (done.stderr)
    )
    done = run("train", "--out", out, "--resume", "auto")
    assert done.exit_code == 0 and "resuming at step 2 of 4" in done.stderr


def test_sharp_trains_with_all_it_names(tmp_path):
    out = tmp_path / "run"
    done = run("train", "--recipe", "sharp", *QUICK, "--out", out)
    assert done.exit_code == 0, done.output
    header = RunFolder(out).newest().header
    assert Recipe.from_dict(header["recipe"]) == replace(
        RECIPES["sharp"], steps=4, batch_size=16, T=25, warmup=3
    )
    info = fastdit.checkpoints.native.inspect(out / "model.safetensors")
    assert info.config.null_class and info.diffusion["schedule"] == "cosine"


def test_options_change_the_recipe(tmp_path):
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


def test_latents_train_any_preset(latents, tmp_path, monkeypatch):
    """A published model on the latents of `fastdit encode`, learned variance and all."""
    small = replace(fastdit.PRESETS["DiT-S/4"], hidden=32, n_layers=2, n_heads=2)
    monkeypatch.setitem(fastdit.PRESETS, "DiT-S/4", small)
    out = tmp_path / "run"
    arguments = ["--data", latents[0], "--model", "DiT-S/4", "--recipe", "dit", "--lr", 1e-3]
    brief = ["--steps", 30, "--batch-size", 8, "--diffusion-steps", 50]
    done = run("train", *arguments, *brief, "--log-every", 1, "--out", out)
    assert done.exit_code == 0, done.output
    info = fastdit.checkpoints.native.inspect(out / "model.safetensors")
    assert info.config.sample_shape == (4, 8, 8) and info.config.num_classes == 3
    assert info.config.learn_sigma and info.labels == ("cat", "dog", "eel")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert "samples" not in done.stdout and not (out / "samples").exists()
    resumed = run("train", "--resume", "auto", "--out", out)
    assert resumed.exit_code == 0 and "resuming at step 30 of 30" in resumed.stderr


def test_latents_are_shown_through_a_vae(latents, tmp_path, monkeypatch):
    class Doubles(torch.nn.Module):
        """Stands for an autoencoder: its pixels are the first three channels, doubled in size."""

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
        (("--recipe", "sahrp"), "--recipe: expected one of seed, sharp, dit; got 'sahrp'; did you"),
        (("--model", "DiT-S/3"), "--model: expected one of toy, DiT-S/2"),
        (("--data", "nowhere"), "nowhere: expected the shards of `fastdit encode`, found none"),
        (("--compile", "yes"), "compile: expected one of none, block, whole; got 'yes'"),
        (("--precision", "fp16"), "precision: expected one of float32, bfloat16; got 'fp16'"),
        (("--resume", "last.pt"), "--resume: expected auto, no, or a checkpoint's file, got last"),
        (("--accumulate", 3), "batch_size: expected a multiple of 3"),
        (("--label-dropout", 1.5), "label_dropout: expected a share below 1, got 1.5"),
        (("--vae", "x"), "--vae: the coloured shapes are pixels; expected none"),
        (("--diffusion-steps", 10, "--schedule", "linear-scaled"), "needs more than 20 steps"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = run("train", "--out", tmp_path / "run", *arguments)
    assert done.exit_code == 1 and message in done.stderr
    assert "Traceback" not in done.output and not (tmp_path / "run").exists()


def test_latents_without_a_vae_cannot_be_shown(latents, tmp_path):
    done = run("train", "--data", latents[0], "--sample-every", 5, "--out", tmp_path / "run")
    assert done.exit_code == 1 and "--sample-every: expected --vae" in done.stderr
    done = run("train", "--data", latents[0], "--per-class", 5, "--out", tmp_path / "run")
    assert done.exit_code == 1 and "--per-class: expected none beside --data" in done.stderr


def test_samples_that_the_solver_cannot_make_are_refused_before_training():
    with pytest.raises(ValueError, match="steps: no stride takes 50 of 60"):
        scheduler = DiffusionScheduler(60, schedule="cosine")
        monitor.shapes_sampler(fastdit.DiTConfig(), scheduler, SHOWINGS["dit"])


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


def test_tensorboard_gets_the_metrics_where_it_is_installed(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monkeypatch.setattr(monitor.importlib.util, "find_spec", lambda name: True)
    own = monitor.Monitor(RunFolder(tmp_path))
    own.begin(4, 10)
    own.log(5, {"loss": 0.5})
    own.end()
    assert written == [(str(tmp_path / "tensorboard"), 5), ("loss", 0.5, 5), "closed"]


def test_numpy_is_not_needed_to_read_what_a_run_measured(tmp_path):
    own = monitor.Monitor(RunFolder(tmp_path / "new" / "run"))
    own.begin(0, 1)
    own.log(1, {"loss": float(np.float32(0.25))})
    own.end()
    assert json.loads((tmp_path / "new" / "run" / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss": 0.25,
    }


@pytest.mark.parametrize("recipe", ["sharp", "dit"])
def test_without_dropped_labels_samples_are_made_without_guidance(tmp_path, recipe):
    arguments = ["--recipe", recipe, "--label-dropout", 0, *QUICK, "--diffusion-steps", 100]
    done = run("train", *arguments, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "samples" / "step-00000004.png").exists()


def test_a_finished_run_whose_samples_were_lost_makes_them_again(tmp_path):
    out = tmp_path / "run"
    assert run("train", *QUICK, "--out", out).exit_code == 0
    grid = out / "samples" / "step-00000004.png"
    before = grid.read_bytes()
    grid.unlink()
    assert run("train", "--resume", "auto", "--out", out).exit_code == 0
    assert grid.read_bytes() == before


def test_a_stop_before_the_first_step_saves_too(tmp_path):
    stopped = Trainer(fastdit.DiTConfig(), Recipe(steps=3), Shapes(8), tmp_path)
    stopped.request_stop()
    assert not stopped.run().finished
    assert RunFolder(tmp_path).newest().header["step"] == 0


def test_a_request_to_stop_that_comes_twice_at_once_is_one(tmp_path, monkeypatch):
    """By itself and through a launcher."""
    original = Trainer.train_step

    def interrupted(self):
        original(self)
        if self.step == 2:
            os.kill(os.getpid(), 2)
            os.kill(os.getpid(), 2)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    done = run("train", "--out", tmp_path / "run", *QUICK)
    assert done.exit_code == 130 and "stopped at step 2 of 4, and saved" in done.stderr


def test_a_later_request_does_what_it_always_did(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_SAME_REQUEST", -1.0)
    original = Trainer.train_step

    def interrupted(self):
        original(self)
        os.kill(os.getpid(), 2)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    done = run("train", "--out", tmp_path / "run", *QUICK)
    assert done.exit_code == 130 and "stopped at" not in done.stderr


def test_a_request_that_the_process_ignores_stays_ignored(tmp_path, monkeypatch):
    """As a shell lets its background commands ignore SIGINT."""
    original = Trainer.train_step

    def interrupted(self):
        original(self)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = run("train", "--out", tmp_path / "run", *QUICK)
        assert done.exit_code == 0 and "stopped at" not in done.stderr
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_file_is_not_resumed_into_another_run(tmp_path):
    for name in ("a", "b"):
        assert run("train", *QUICK, "--out", tmp_path / name).exit_code == 0
    last = tmp_path / "a" / "checkpoints" / "step-00000004.safetensors"
    done = run("train", "--resume", last, "--out", tmp_path / "b")
    assert done.exit_code == 1 and "already holds a run" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--per-class", 3), "--per-class: the run was started with 2, got 3"),
        (("--model", "DiT-S/2"), "--model: the run was started with another one, got DiT-S/2"),
        (("--seed", 3), "--seed: the run was started with 0, got 3"),
        (("--recipe", "sharp"), "--recipe: the run was started with seed, got sharp"),
        (("--diffusion-steps", 30), "--diffusion-steps: the run was started with 25, got 30"),
    ],
)
def test_a_refused_resume_leaves_the_folder_as_it_was(tmp_path, arguments, message):
    out = tmp_path / "run"
    assert run("train", *QUICK, "--save-every", 2, "--log-every", 1, "--out", out).exit_code == 0
    torn = out / "checkpoints" / "step-00000004.safetensors"
    torn.write_bytes(b"torn")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    done = run("train", "--resume", "auto", "--out", out, *arguments)
    assert done.exit_code == 1 and message in done.stderr
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    same = ("--per-class", 2, "--model", "toy", "--seed", 0, "--recipe", "seed")
    assert run("train", "--resume", "auto", "--out", out, *same).exit_code == 0


def test_two_runs_do_not_share_a_folder(tmp_path):
    with RunFolder(tmp_path).claimed():
        done = run("train", *QUICK, "--out", tmp_path)
    assert done.exit_code == 1 and f"another run is going on in {tmp_path}" in done.stderr
    assert run("train", *QUICK, "--out", tmp_path).exit_code == 0


def test_batches_larger_than_the_set_have_a_loss(latents, tmp_path):
    brief = ["--steps", 3, "--batch-size", 24, "--out", tmp_path / "run"]
    done = run("train", "--data", latents[0], *brief)
    assert done.exit_code == 0 and "nan" not in done.stdout, done.output
    assert len(done.stdout.split("\n")) >= 4


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 200_000, b'{"step": 1, "caf\xc3'])
def test_damaged_metrics_do_not_stop_a_resume(tmp_path, content):
    out = tmp_path / "run"
    assert run("train", *QUICK, "--out", out).exit_code == 0
    (out / "metrics.jsonl").write_bytes(content)
    assert run("train", "--resume", "auto", "--out", out).exit_code == 0


def test_a_checkpoint_that_is_a_folder_or_a_broken_link_is_passed_over(tmp_path):
    out = tmp_path / "run"
    assert run("train", *QUICK, "--save-every", 2, "--out", out).exit_code == 0
    (out / "checkpoints" / "step-00000006.safetensors").mkdir()
    (out / "checkpoints" / "step-00000007.safetensors").symlink_to("nowhere")
    done = run("train", "--resume", "auto", "--out", out)
    assert done.exit_code == 0 and done.stderr.count("not resumed from") == 2


def test_a_model_without_classes_is_trained_and_shown(tmp_path):
    config = fastdit.DiTConfig(hidden=16, n_layers=1, n_heads=1, use_class_cond=False)
    recipe = Recipe(steps=2, batch_size=8, T=25, schedule="cosine")
    trainer = Trainer(config, recipe, Shapes(1), tmp_path)
    sample = monitor.shapes_sampler(config, trainer.scheduler, SHOWINGS["sharp"], per_class=4)
    shows = monitor.Monitor(trainer.folder, sample=sample)
    trainer.run(shows)
    assert shows.grid.exists() and shows.shown.measured == {}
    assert fastdit.checkpoints.native.inspect(tmp_path / "model.safetensors").labels is None
