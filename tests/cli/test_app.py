"""The command line: what it writes, what it prints, and errors that are one line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, Sampler
from fastdit.cli.app import app, parse_labels
from fastdit.data.images import to_pixels, write_grid
from fastdit.data.shapes import LABEL_NAMES
from fastdit.solvers import DPMSolverPP
from fastdit.testing import randomize

SMALL = DiTConfig(hidden=16, n_layers=1, n_heads=1)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def checkpoint(tmp_path):
    model = fastdit.DiT.from_config(SMALL)
    randomize(model)
    path = tmp_path / "m.safetensors"
    fastdit.save(model, path, DiffusionScheduler(5, schedule="cosine"), LABEL_NAMES)
    return path


def test_sample_writes_what_the_sampler_makes(checkpoint, tmp_path):
    done = run(
        "sample",
        checkpoint,
        *("--labels", "Red Circle, 5,yellow cross", "--count", 2, "--seed", 9),
        *("--batch-size", 4, "--out", tmp_path / "s.npz"),
    )
    assert done.exit_code == 0, done.output
    sampler = Sampler(fastdit.load(checkpoint), DiffusionScheduler(5, schedule="cosine"))
    expected = to_pixels(sampler([0, 0, 5, 5, 15, 15], seed=9))
    with np.load(tmp_path / "s.npz") as archive:
        assert archive.files == ["arr_0"]
        pixels = archive["arr_0"]
    assert pixels.dtype == np.uint8 and pixels.shape == (6, 16, 16, 3)
    # The two batches round differently from one batch of six; a pixel may fall to its neighbour.
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 1


def test_pixels_are_scaled_as_published():
    values = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 0.996, 1.0, 2.0])
    pixels = to_pixels(values.view(1, 1, 2, 4))
    assert pixels.shape == (1, 2, 4, 1)
    assert pixels.flatten().tolist() == [0, 0, 0, 128, 191, 254, 255, 255]


def test_grid_places_images_row_by_row(tmp_path):
    pixels = np.zeros((5, 2, 3, 3), dtype=np.uint8)
    pixels[:] = (np.arange(5) * 40)[:, None, None, None]
    write_grid(tmp_path / "g.png", pixels, columns=3, zoom=2)
    with Image.open(tmp_path / "g.png") as image:
        assert image.size == ((3 * 4 - 1) * 2, (2 * 3 - 1) * 2)
        for i in range(5):
            row, column = divmod(i, 3)
            assert image.getpixel((column * 8, row * 6)) == (i * 40,) * 3


def test_sample_without_a_checkpoint_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("sample")
    assert done.exit_code == 1
    assert "no such checkpoint; make one with `fastdit train`" in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--labels", "red circel"), "got 'red circel'; did you mean 'red circle'?"),
        (("--labels", "16"), "--labels: expected a number in [0, 16) or a name, got '16'"),
        (("--labels", "-1"), "--labels: expected a number in [0, 16) or a name, got '-1'"),
        (("--out", "s.jpg"), "--out: expected a name that ends in .png or .npz, got s.jpg"),
        (("--seed", "-3"), "seed: expected an integer in [0, 2^63), got -3"),
        (("--device", "tpu9000"), "--device: expected one that is here, got tpu9000"),
        (("--device", "meta"), "--device: expected one that computes, got meta"),
        (("--device", "cuda:99"), "--device: expected one that is here, got cuda:99"),
    ],
)
def test_bad_arguments_are_one_line(checkpoint, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("sample", checkpoint, *arguments)
    assert done.exit_code == 1
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_an_unconditional_model_is_sampled_without_labels(tmp_path):
    model = fastdit.DiT(use_class_cond=False, hidden=16, n_layers=1, n_heads=1)
    randomize(model)
    fastdit.save(model, tmp_path / "m", DiffusionScheduler(5, schedule="cosine"))
    out = tmp_path / "s.npz"
    done = run("sample", tmp_path / "m", "--count", 3, "--batch-size", 2, "--out", out)
    assert done.exit_code == 0, done.output
    with np.load(out) as archive:
        pixels = archive["arr_0"]
    assert pixels.shape == (3, 16, 16, 3) and len({p.tobytes() for p in pixels}) == 3
    done = run("sample", tmp_path / "m", "--labels", "0")
    assert done.exit_code == 1 and "--labels: expected none" in done.stderr


def test_latents_are_refused_as_png_before_sampling(tmp_path):
    model = fastdit.DiT(in_channels=4, hidden=16, n_layers=1, n_heads=1)
    fastdit.save(model, tmp_path / "m", DiffusionScheduler(5, schedule="cosine"))
    done = run("sample", tmp_path / "m", "--out", tmp_path / "s.png")
    assert done.exit_code == 1 and "a PNG shows 1 or 3 channels" in done.stderr
    assert "sampling" not in done.stderr


def test_a_checkpoint_without_schedule_says_so(tmp_path):
    fastdit.save(fastdit.DiT.from_config(SMALL), tmp_path / "m.safetensors")
    done = run("sample", tmp_path / "m.safetensors")
    assert done.exit_code == 1 and "fastdit.save(model, path, scheduler=...)" in done.stderr


def test_labels_without_names_are_numbers():
    assert parse_labels("3, 0", None, SMALL) == [3, 0]
    assert parse_labels(None, None, SMALL) == list(range(16))
    with pytest.raises(ValueError, match=r"expected a number in \[0, 16\), got 'cat'"):
        parse_labels("cat", None, SMALL)


def test_the_installed_command_answers():
    command = [Path(sys.executable).with_name("fastdit"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "train" in done.stdout and "sample" in done.stdout


def test_sample_takes_solver_guidance_dtype_and_execution(tmp_path):
    model = fastdit.DiT(hidden=16, n_layers=1, n_heads=1, null_class=True)
    randomize(model)
    scheduler = DiffusionScheduler(8, schedule="cosine")
    path, out = tmp_path / "m.safetensors", tmp_path / "s.npz"
    fastdit.save(model, path, scheduler)
    done = run(
        *("sample", path, "--labels", "3, 5", "--count", 1, "--seed", 4, "--out", out),
        *("--solver", "dpm++", "--steps", 5, "--clip", 0.9, "--execution", "eager"),
        *("--guidance-scale", 2.5, "--guidance-channels", 2, "--dtype", "bfloat16"),
    )
    assert done.exit_code == 0, done.output
    guidance, solver = fastdit.Guidance(2.5, channels=2), DPMSolverPP(clip=0.9)
    sampler = Sampler(model, scheduler, solver, 5, guidance=guidance, dtype=torch.bfloat16)
    images = sampler([3, 5], seed=4)
    assert images.abs().max() < 0.91  # clipped; its pixels are not all black or white
    with np.load(out) as file:
        assert np.array_equal(file["arr_0"], to_pixels(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--guidance-scale", 2), "error: guidance: expected None, since the model is no DiT with"),
        (("--guidance-channels", 2), "error: --guidance-channels: expected --guidance-scale besi"),
        (("--solver", "dimm"), "error: --solver: expected one of ddpm, ddim, dpm++, heun; got"),
        (("--steps", 6), "error: steps: expected an integer from 1 to T = 5, got 6"),
        (("--clip", 0), "error: clip: expected a positive number, or None, got 0.0"),
        (("--dtype", "bf16"), "error: --dtype: expected one of float32, bfloat16, float16; got"),
        (("--execution", "grahp"), "did you mean 'graph'?"),
        (("--execution", "graph", "--device", "cpu"), "error: execution: 'graph' needs a model on"),
    ],
)
def test_sample_options_that_cannot_be_are_one_line(checkpoint, arguments, message):
    done = run("sample", checkpoint, *arguments)
    assert done.exit_code == 1 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_convert_makes_a_published_checkpoint_one_that_samples_and_back(tmp_path):
    preset = replace(fastdit.PRESETS["DiT-S/8"], hidden=32, n_layers=1, n_heads=2, num_classes=5)
    model = fastdit.DiT.from_config(preset)
    randomize(model)
    theirs, own = tmp_path / "theirs.pt", tmp_path / "own.safetensors"
    fastdit.save(model, theirs, layout="facebookresearch/DiT")
    done = run("convert", theirs, own, "--n-heads", 2)
    assert done.exit_code == 0, done.output
    assert "1 layers of width 32 with 2 heads, 5 classes, images of 4 x 32 x 32" in done.stdout
    assert all(
        map(torch.equal, fastdit.load(own).state_dict().values(), model.state_dict().values())
    )

    out = tmp_path / "s.npz"
    chosen = ("--labels", "3", "--count", 1, "--solver", "ddim", "--steps", 4, "--out", out)
    done = run("sample", own, *chosen, "--guidance-scale", 4, "--guidance-channels", 3)
    assert done.exit_code == 0, done.output
    with np.load(out) as file:
        assert file.files == ["latents"]
        latents = file["latents"]
    assert latents.shape == (1, 4, 32, 32) and latents.dtype == np.float32
    guidance = fastdit.Guidance(4.0, channels=3)
    sampler = Sampler(model, DiffusionScheduler(1000), "ddim", 4, guidance=guidance)
    assert np.array_equal(latents, sampler([3]).numpy())

    done = run("convert", own, tmp_path / "back.pt", "--layout", "facebookresearch/DiT")
    assert done.exit_code == 0, done.output
    pair = (torch.load(path, weights_only=True) for path in (theirs, tmp_path / "back.pt"))
    first, second = pair
    assert first.keys() == second.keys() and all(map(torch.equal, first.values(), second.values()))
    done = run("convert", theirs, own)
    assert done.exit_code == 1 and "n_heads: shapes do not tell it" in done.stderr


def test_convert_keeps_what_a_checkpoint_says(checkpoint, tmp_path):
    assert run("convert", checkpoint, tmp_path / "again.safetensors").exit_code == 0
    assert (tmp_path / "again.safetensors").read_bytes() == checkpoint.read_bytes()


def test_info_says_what_a_preset_or_a_checkpoint_is(checkpoint):
    done = run("info", "DiT-XL/2")
    assert done.exit_code == 0, done.output
    for part in (
        "675,129,632",
        "236.79 GFLOP",
        "1,288 MiB",
        "hidden           1152",
        "790 TFLOP/s",
    ):
        assert part in done.stdout, part
    done = run("info", checkpoint)
    assert done.exit_code == 0 and "schedule cosine" in done.stdout
    done = run("info", "DiT-XL/3")
    assert done.exit_code == 1 and "did you mean 'DiT-XL/" in done.stderr


def test_labels_have_several_names_as_imagenets_do():
    names = ("tench, Tinca tinca", "goldfish", "drake", "drake, mallard")
    cfg = DiTConfig(num_classes=4)
    assert parse_labels("tinca TINCA, goldfish,mallard, drake, 3", names, cfg) == [0, 1, 3, 2, 3]
    with pytest.raises(ValueError, match="--labels: .*did you mean 'goldfish'"):
        parse_labels("goldfsh", names, cfg)


def test_a_pipelines_folder_is_sampled_by_name(tmp_path):
    preset = replace(fastdit.PRESETS["DiT-S/8"], hidden=32, n_layers=1, n_heads=2, num_classes=3)
    model = fastdit.DiT.from_config(replace(preset, mlp_ln_eps=1e-5, t_freq_shift=1))
    randomize(model)
    fastdit.save(model, tmp_path / "transformer", layout="diffusers")
    names = {"0": "tench, Tinca tinca", "1": "goldfish", "2": "golden retriever"}
    (tmp_path / "model_index.json").write_text(json.dumps({"id2label": names}))
    out = tmp_path / "s.npz"
    chosen = ("--labels", "golden retriever", "--count", 1, "--solver", "ddim", "--steps", 4)
    done = run("sample", tmp_path, *chosen, "--out", out)
    assert done.exit_code == 0, done.output
    expected = Sampler(model, DiffusionScheduler(1000), "ddim", 4)([2])
    with np.load(out) as file:
        assert np.array_equal(file["latents"], expected.numpy())


def test_processes_without_a_number_of_images_are_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run("sample", checkpoint, "--out", tmp_path / "s.npz")
    assert done.exit_code == 1 and "--num-images: processes share images only where" in done.stderr
    (tmp_path / "d.npz").mkdir()
    done = run("sample", checkpoint, "--out", tmp_path / "d.npz")
    assert done.exit_code == 1 and "--out: expected a file's name" in done.stderr
