"""`fastdit train`: how a run is stopped, and how it is resumed."""

import json
import os
import shlex
import signal

import pytest

import fastdit
from fastdit.cli import train
from fastdit.train.recipe import Recipe
from fastdit.train.run_folder import RunFolder
from fastdit.train.sources import Shapes
from fastdit.train.trainer import Trainer

QUICK = "--steps 4 --per-class 2 --batch-size 16 --diffusion-steps 25 --schedule cosine".split()


def test_resume_auto_starts_a_run_where_there_is_none(run, tmp_path):
    done = run("train", *QUICK, "--resume", "auto", "--out", tmp_path / "run")
    assert done.exit_code == 0 and "resuming" not in done.stderr


def test_resume_auto_skips_a_truncated_checkpoint(run, tmp_path):
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


TINY = "--steps 2 --per-class 1 --batch-size 8 --diffusion-steps 100 --schedule cosine".split()


@pytest.fixture
def tiny(monkeypatch):
    """Make the toy a tiny model."""
    small = fastdit.DiTConfig(hidden=8, n_layers=1, n_heads=2)
    monkeypatch.setitem(fastdit.PRESETS, "toy", small)


def test_a_finished_run_goes_on_with_other_options(run, tiny, tmp_path):
    out = tmp_path / "run"
    assert run("train", *TINY, "--out", out).exit_code == 0
    longer = ("--steps", 5, "--lr", 0.001, "--batch-size", 4, "--clip", 0)
    done = run("train", "--resume", "auto", "--out", out, *longer)
    assert done.exit_code == 0, done.output
    assert "resuming at step 2 of 5" in done.stderr
    said = "from step 2 on: steps 2 -> 5, batch_size 8 -> 4, lr 0.0005 -> 0.001, clip 1.0 -> None"
    assert said in done.stderr
    assert "   2       5   " in done.stdout, "samples 16 to 27 of 16 images"
    again = run("train", "--resume", "auto", "--out", out, *longer)
    assert again.exit_code == 0 and "resuming at step 5 of 5" in again.stderr
    assert len(RunFolder(out).newest().header["changes"]) == 1


def test_a_run_whose_data_have_moved_or_grown_says_what_to_name(run, latents, tmp_path):
    out, folder = tmp_path / "run", latents[0]
    brief = ["--steps", 1, "--batch-size", 2, "--out", out]
    assert run("train", "--data", folder, *brief).exit_code == 0
    moved = folder.rename(tmp_path / "moved")
    again = ("train", "--resume", "auto", "--out", out)
    done = run(*again)
    assert done.exit_code == 1 and f"data: {folder} is gone; name the folder where" in done.stderr
    assert run(*again, "--data", moved).exit_code == 0
    plan = json.loads((moved / "plan.json").read_text())
    (moved / "plan.json").write_text(json.dumps(plan | {"labels": [0, *plan["labels"][:-1]]}))
    done = run(*again, "--data", moved, "--steps", 2)
    assert done.exit_code == 1 and "name them (--data) and say so (--new-data)" in done.stderr
    done = run(*again, "--data", moved, "--new-data", "--steps", 2)
    assert done.exit_code == 0, done.output


def test_what_is_no_checkpoint_of_a_run_says_where_they_are(run, tiny, tmp_path):
    out = tmp_path / "run"
    assert run("train", *TINY, "--out", out).exit_code == 0
    done = run("train", "--resume", out / "model.safetensors", "--out", tmp_path / "other")
    assert done.exit_code == 1
    assert "a run's checkpoints are in its folder's checkpoints/" in done.stderr
    done = run("train", "--resume", out, "--out", tmp_path / "other")
    assert done.exit_code == 1
    assert f"a run's folder is continued by --resume auto --out {out}" in done.stderr


def test_a_run_goes_on_with_more_data_if_that_is_said(run, tiny, latents, tmp_path):
    out = tmp_path / "run"
    assert run("train", *TINY, "--out", out).exit_code == 0
    more = ("--resume", "auto", "--out", out, "--steps", 4, "--per-class", 2)
    refused = run("train", *more)
    assert refused.exit_code == 1
    assert "--per-class: the run was started with 1, got 2; --new-data goes on" in refused.stderr
    done = run("train", *more, "--new-data")
    assert done.exit_code == 0 and not done.stderr.count("{"), done.output
    change = "steps 2 -> 4, data shapes (per_class 1, seed 0) -> shapes (per_class 2, seed 0)"
    assert f"from step 2 on: {change}\n" in done.stderr
    assert f"changes          from step 2 on: {change}\n" in run("info", out).stdout
    assert "   1       4   " in done.stdout, "of the new images"
    again = run("train", *more, "--new-data")
    assert again.exit_code == 0 and "resuming at step 4 of 4" in again.stderr
    others = ("--resume", "auto", "--out", out, "--steps", 6, "--data", latents[0])
    refused = run("train", *others)
    assert refused.exit_code == 1 and "(--data) and say so (--new-data)" in refused.stderr
    refused = run("train", *others, "--new-data")
    assert refused.exit_code == 1 and "expected 16 classes as before, got 3" in refused.stderr
    for arguments in (("--resume", "auto"), ("--per-class", 2)):
        refused = run("train", "--new-data", *arguments, "--out", out)
        assert "--new-data: expected --resume, and --data or --per-class" in refused.stderr


def test_the_command_that_a_diverged_run_prints_goes_on(run, tiny, tmp_path):
    out = tmp_path / "a run"
    done = run("train", *TINY, "--lr", 1e30, "--clip", 0, "--lr-schedule", "constant", "--out", out)
    assert done.exit_code == 1 and "error: loss is " in done.stderr
    printed = done.stderr.partition("with a lower rate: fastdit ")[2].partition(" (")[0]
    command = shlex.split(printed)
    assert command[-2:] == ["--lr", "5e+29"]
    done = run(*command[:-1], 1e-4)
    assert done.exit_code == 0, done.output
    assert "from step 0 on: lr 1e+30 -> 0.0001" in done.stderr


def test_resume_takes_a_file_unless_later_ones_would_be_lost(run, tmp_path):
    out = tmp_path / "run"
    assert run("train", *QUICK, "--save-every", 2, "--out", out).exit_code == 0
    early = out / "checkpoints" / "step-00000002.safetensors"
    done = run("train", "--resume", early, "--out", out)
    assert done.exit_code == 1 and "holds a later checkpoint, step-00000004" in done.stderr
    first = run("train", *QUICK, "--save-every", 2, "--keep", 9, "--out", tmp_path / "first")
    assert first.exit_code == 0
    start = tmp_path / "first" / "checkpoints" / "step-00000000.safetensors"
    done = run("train", "--resume", start, "--out", tmp_path / "first")
    assert "step-00000002.safetensors, step-00000004.safetensors; move them away" in done.stderr
    done = run("train", "--resume", early, "--out", tmp_path / "other")
    assert done.exit_code == 0 and "resuming at step 2 of 4" in done.stderr
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == (
        out / "model.safetensors"
    ).read_bytes()


def test_an_interrupt_saves_and_says_how_to_continue(run, tmp_path, monkeypatch):
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


def test_a_finished_run_whose_samples_were_lost_makes_them_again(run, tmp_path):
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


def test_a_signal_that_arrives_twice_at_once_counts_once(run, tmp_path, monkeypatch):
    """Once directly and once through a launcher."""
    original = Trainer.train_step

    def interrupted(self):
        original(self)
        if self.step == 2:
            os.kill(os.getpid(), 2)
            os.kill(os.getpid(), 2)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    done = run("train", "--out", tmp_path / "run", *QUICK)
    assert done.exit_code == 130 and "stopped at step 2 of 4, and saved" in done.stderr


def test_a_later_signal_acts_as_before_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_SAME_REQUEST", -1.0)
    original = Trainer.train_step

    def interrupted(self):
        original(self)
        os.kill(os.getpid(), 2)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    done = run("train", "--out", tmp_path / "run", *QUICK)
    assert done.exit_code == 130 and "stopped at" not in done.stderr


def test_an_ignored_signal_stays_ignored(run, tmp_path, monkeypatch):
    """A shell makes its background commands ignore SIGINT."""
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


def test_a_file_is_not_resumed_into_another_run(run, tmp_path):
    for name in ("a", "b"):
        assert run("train", *QUICK, "--out", tmp_path / name).exit_code == 0
    last = tmp_path / "a" / "checkpoints" / "step-00000004.safetensors"
    done = run("train", "--resume", last, "--out", tmp_path / "b")
    assert done.exit_code == 1 and "already holds a run" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--per-class", 3), "--per-class: the run was started with 2, got 3; --new-data"),
        (("--model", "DiT-S/2"), "--model: the run was started with another one, got DiT-S/2"),
        (("--seed", 3), "--seed: the run was started with 0, got 3"),
        (("--recipe", "sharp"), "--recipe: the run was started with seed, got sharp"),
        (("--diffusion-steps", 30), "--diffusion-steps: the run was started with 25, got 30"),
    ],
)
def test_a_refused_resume_leaves_the_folder_as_it_was(run, tmp_path, arguments, message):
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


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 200_000, b'{"step": 1, "caf\xc3'])
def test_damaged_metrics_do_not_stop_a_resume(run, tmp_path, content):
    out = tmp_path / "run"
    assert run("train", *QUICK, "--out", out).exit_code == 0
    (out / "metrics.jsonl").write_bytes(content)
    assert run("train", "--resume", "auto", "--out", out).exit_code == 0


def test_a_checkpoint_that_is_a_folder_or_a_broken_link_is_skipped(run, tmp_path):
    out = tmp_path / "run"
    assert run("train", *QUICK, "--save-every", 2, "--out", out).exit_code == 0
    (out / "checkpoints" / "step-00000006.safetensors").mkdir()
    (out / "checkpoints" / "step-00000007.safetensors").symlink_to("nowhere")
    done = run("train", "--resume", "auto", "--out", out)
    assert done.exit_code == 0 and done.stderr.count("not resumed from") == 2
