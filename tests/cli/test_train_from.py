"""`fastdit train --from`: fine-tuning a checkpoint."""

from dataclasses import replace

import pytest
import torch

import fastdit
from fastdit import DiffusionScheduler, DiTConfig
from fastdit.data.shapes import LABEL_NAMES
from fastdit.testing import randomize
from fastdit.train.run_folder import RunFolder

BRIEF = "--steps 2 --per-class 1 --batch-size 8 --ema 0.9".split()
CONFIG = DiTConfig(hidden=8, n_layers=1, n_heads=2)


def saved(path, config=CONFIG, scheduler=None, dtype=torch.float32):
    model = fastdit.DiT.from_config(config)
    randomize(model)
    names = LABEL_NAMES if config.use_class_cond and config.num_classes == 16 else None
    fastdit.save(model.to(dtype), path, scheduler, names)
    return path


def first(out):
    """Return the first checkpoint of a run."""
    return RunFolder(out).checkpoints()[0][1]


@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(CONFIG, null_class=True), replace(CONFIG, use_class_cond=False)],
    ids=["classes", "null", "none"],
)
def test_a_run_starts_from_the_weights_and_the_diffusion_of_a_checkpoint(run, tmp_path, config):
    scheduler = DiffusionScheduler(60, schedule="cosine")
    path = saved(tmp_path / "m.safetensors", config, scheduler, torch.bfloat16)
    out = tmp_path / "run"
    done = run("train", "--from", path, *BRIEF, "--lr", 1e-30, "--out", out)
    assert done.exit_code == 0, done.output
    header = RunFolder(out).newest().header
    assert header["config"] == config.to_dict()
    assert (header["recipe"]["T"], header["recipe"]["schedule"]) == (60, "cosine")
    assert header["origin"]["path"] == str(path)
    assert f"fine-tuned from  {path}\n" in run("info", out).stdout
    expected, tuned = fastdit.load(path), fastdit.load(out / "model.safetensors")
    for name, t in tuned.state_dict().items():
        torch.testing.assert_close(t, expected.state_dict()[name].float(), msg=name)
    path.unlink()
    again = run("train", "--resume", "auto", "--from", path, "--out", out, "--steps", 3)
    assert again.exit_code == 0 and "resuming at step 2 of 3" in again.stderr, again.output
    other = run("train", "--resume", "auto", "--from", tmp_path / "n", "--out", out)
    assert other.exit_code == 1 and f"--from: the run was started from {path}, got" in other.stderr


def test_the_model_is_fitted_to_the_data(run, latents, tmp_path):
    """Sixteen classes become three, three channels four, and 16 x 16 pixels 8 x 8 cells."""
    path = saved(tmp_path / "m.safetensors", scheduler=DiffusionScheduler(100, schedule="cosine"))
    brief = ["--steps", 1, "--batch-size", 2, "--lr", 1e-30, "--out", tmp_path / "run"]
    done = run("train", "--from", path, "--data", latents[0], *brief)
    assert done.exit_code == 0, done.output
    assert "warning: " in done.stderr and "3 class rows" in done.stderr
    before, tuned = fastdit.load(path), fastdit.load(tmp_path / "run")
    assert tuned.cfg == replace(CONFIG, num_classes=3, img_size=8, in_channels=4)
    kept = "blocks.0.attn.qkv.weight"
    torch.testing.assert_close(tuned.get_parameter(kept), before.get_parameter(kept))


def test_options_override_the_diffusion_of_the_checkpoint(run, tmp_path):
    path = saved(tmp_path / "m.safetensors", scheduler=DiffusionScheduler(60, schedule="cosine"))
    done = run("train", "--from", path, *BRIEF, "--diffusion-steps", 90, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    recipe = RunFolder(tmp_path / "run").newest().header["recipe"]
    assert (recipe["T"], recipe["schedule"]) == (90, "cosine")


def test_what_does_not_fit_is_one_line(run, tmp_path):
    silent, cosine = tmp_path / "silent", DiffusionScheduler(60, schedule="cosine")
    saved(silent)
    known = saved(tmp_path / "known", scheduler=cosine)
    v = saved(tmp_path / "v", scheduler=DiffusionScheduler(60, "cpu", "cosine", "v_prediction"))
    for arguments, message in (
        ((silent,), "does not tell its diffusion; pass --diffusion-steps and --schedule"),
        ((silent, "--schedule", "cosine"), "its diffusion; pass --diffusion-steps\n"),
        ((known, "--model", "toy"), "--model: expected none beside --from"),
        ((known, "--label-dropout", 0.1), "--label-dropout: expected 0, got 0.1, but"),
        ((v,), "predicts 'v_prediction'; fastdit train trains diffusions that predict the noise"),
        ((tmp_path / "nowhere",), "nowhere: no such file"),
    ):
        done = run("train", *BRIEF, "--out", tmp_path / "run", "--from", *arguments)
        assert done.exit_code == 1 and message in done.stderr, done.output
        assert not (tmp_path / "run").exists()
    both = ("--diffusion-steps", 100, "--schedule", "cosine")
    done = run("train", *BRIEF, "--out", tmp_path / "run", "--from", silent, *both)
    assert done.exit_code == 0, done.output


def test_a_run_that_was_started_from_nothing_has_no_other_origin(run, tmp_path):
    out = tmp_path / "run"
    path = saved(tmp_path / "m", scheduler=DiffusionScheduler(60, schedule="cosine"))
    assert run("train", "--from", path, *BRIEF, "--out", out).exit_code == 0
    fresh = run("train", *"--steps 1 --per-class 1 --batch-size 2".split(), "--out", tmp_path / "o")
    assert fresh.exit_code == 0
    done = run("train", "--resume", "auto", "--from", path, "--out", tmp_path / "o")
    assert "--from: the run was started from no checkpoint, got" in done.stderr
