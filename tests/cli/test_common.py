"""What the commands share: errors in the command line's words, and what an interrupt says."""

import pytest
import typer
from typer.testing import CliRunner

from fastdit.cli.common import plain_errors
from fastdit.data.shards import write_shards
from fastdit.train.trainer import Trainer


def call(error, **settings):
    """Call a command with two options that ends in an error."""
    app = typer.Typer()

    @app.command()
    def command(context: typer.Context, batch_size: int = 1, T: int = typer.Option(1, "--steps-T")):
        with plain_errors(context, **settings):
            raise error

    return CliRunner().invoke(app, [])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("batch_size: expected 1, got 2"), "--batch-size: expected 1, got 2"),
        (ValueError("T: expected 1"), "--steps-T: expected 1"),
        (ValueError("scale: expected 1"), "--guidance-scale: expected 1"),
        (ValueError("seed: expected 1"), "seed: expected 1"),  # the command has no such option
        (ValueError("batch_size is odd"), "batch_size is odd"),
        (FileExistsError("batch_size: it is there"), "--batch-size: it is there"),
        (FloatingPointError("T: expected finite numbers"), "T: expected finite numbers"),
    ],
)
def test_errors_name_the_commands_flags(error, message):
    done = call(error, flags={"scale": "--guidance-scale"})
    assert done.exit_code == 1 and done.stderr == f"error: {message}\n"


def test_a_name_can_be_kept_as_it_is():
    assert call(ValueError("T: no"), flags={"T": None}).stderr == "error: T: no\n"


def test_too_little_memory_is_one_line():
    done = call(MemoryError(), less_memory="a smaller --batch-size needs less")
    said = "error: there is too little memory; a smaller --batch-size needs less\n"
    assert done.exit_code == 1 and done.stderr == said


def test_only_the_first_of_torchruns_processes_speaks_of_an_interrupt(monkeypatch):
    done = call(KeyboardInterrupt(), kept=lambda: "two files are kept")
    assert done.exit_code == 130 and done.stderr == "interrupted; two files are kept\n"
    monkeypatch.setenv("RANK", "1")
    done = call(KeyboardInterrupt())
    assert done.exit_code == 130 and done.stderr == ""


def test_an_interrupted_training_names_its_last_checkpoint(run, tmp_path, monkeypatch):
    def interrupt(self, *given, **options):
        raise KeyboardInterrupt

    brief = "--steps 4 --per-class 2 --batch-size 4 --diffusion-steps 25 --schedule cosine".split()
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "__init__", interrupt)
        done = run("train", *brief, "--out", tmp_path / "run")
    assert done.exit_code == 130 and done.stderr == "interrupted; no checkpoint was written\n"
    monkeypatch.setattr(Trainer, "train_step", interrupt)
    done = run("train", *brief, "--out", tmp_path / "run")
    kept = tmp_path / "run" / "checkpoints" / "step-00000000.safetensors"
    go_on = f"continue with fastdit train --resume auto --out {tmp_path / 'run'}"
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == f"interrupted; {kept} is kept; {go_on}"


def test_an_interrupted_encoding_counts_its_shards(run, tmp_path, monkeypatch):
    def interrupt(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdit.cli.models.load_vae", interrupt)
    out = tmp_path / "latents"
    arguments = ("encode", tmp_path, "--vae", "any", "--out", out)
    done = run(*arguments)
    assert done.exit_code == 130 and done.stderr == "interrupted; no batch was finished\n"
    write_shards(out, lambda first: [[first]] * 2, {"num": 4, "batch_size": 2})
    done = run(*arguments)
    assert f"interrupted; 2 finished batches are kept in {out}; the same command" in done.stderr


def test_a_conversion_names_its_flags(run, checkpoint, tmp_path):
    done = run("convert", checkpoint, tmp_path / "out", "--layout", "pt")
    assert done.exit_code == 1 and done.stderr.startswith("error: --layout: expected one of")
    done = run("convert", checkpoint, tmp_path / "out", "--n-heads", 3)
    assert done.exit_code == 1 and done.stderr.startswith("error: --n-heads: ")
