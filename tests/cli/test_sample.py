"""`fastdit sample`: what it writes, and errors that are one line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, Sampler
from fastdit.data.images import to_pixels
from fastdit.solvers import DPMSolverPP
from fastdit.testing import randomize

SMALL = DiTConfig(hidden=16, n_layers=1, n_heads=1)


def test_sample_writes_what_the_sampler_makes(run, checkpoint, tmp_path):
    done = run(
        "sample",
        checkpoint,
        "--labels",
        "Red Circle, 5,yellow cross",
        *"--count 2 --seed 9 --batch-size 4 --out".split(),
        tmp_path / "s.npz",
    )
    assert done.exit_code == 0, done.output
    sampler = Sampler(fastdit.load(checkpoint), DiffusionScheduler(5, schedule="cosine"))
    expected = to_pixels(sampler([0, 0, 5, 5, 15, 15], seed=9))
    with np.load(tmp_path / "s.npz") as archive:
        assert archive.files == ["arr_0"]
        pixels = archive["arr_0"]
    assert pixels.dtype == np.uint8 and pixels.shape == (6, 16, 16, 3)
    # Two batches round differently from one batch of six, so a pixel may differ by one.
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 1


def test_sample_without_a_checkpoint_says_how_to_make_one(run, tmp_path, monkeypatch):
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
        (("--seed", "-3"), "error: --seed: expected an integer in [0, 2^63), got -3"),
        (("--device", "tpu9000"), "--device: expected one that is here, got tpu9000"),
        (("--device", "meta"), "--device: expected one that computes, got meta"),
        (("--device", "cuda:99"), "--device: expected one that is here, got cuda:99"),
    ],
)
def test_bad_arguments_are_one_line(run, checkpoint, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("sample", checkpoint, *arguments)
    assert done.exit_code == 1
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_an_unconditional_model_is_sampled_without_labels(run, tmp_path):
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


def test_latents_are_refused_as_png_before_sampling(run, tmp_path):
    model = fastdit.DiT(in_channels=4, hidden=16, n_layers=1, n_heads=1)
    fastdit.save(model, tmp_path / "m", DiffusionScheduler(5, schedule="cosine"))
    done = run("sample", tmp_path / "m", "--out", tmp_path / "s.png")
    assert done.exit_code == 1 and "a PNG shows 1 or 3 channels" in done.stderr
    assert "sampling" not in done.stderr


def test_a_checkpoint_without_schedule_says_so(run, tmp_path):
    fastdit.save(fastdit.DiT.from_config(SMALL), tmp_path / "m.safetensors")
    done = run("sample", tmp_path / "m.safetensors")
    assert done.exit_code == 1 and "options such as --diffusion T=1000" in done.stderr
    assert "--diffusion flow for a SiT, --diffusion ddpm for a DiT" in done.stderr
    printed = run("info", tmp_path / "m.safetensors").stdout
    assert "diffusion        not told" in printed, printed


def test_sample_takes_solver_guidance_dtype_and_execution(run, tmp_path):
    model = fastdit.DiT(hidden=16, n_layers=1, n_heads=1, null_class=True)
    randomize(model)
    scheduler = DiffusionScheduler(8, schedule="cosine")
    path, out = tmp_path / "m.safetensors", tmp_path / "s.npz"
    fastdit.save(model, path, scheduler)
    done = run(
        "sample",
        path,
        *"--labels 3,5 --count 1 --seed 4 --solver dpm++ --steps 5 --clip 0.9".split(),
        *"--guidance-scale 2.5 --guidance-channels 2 --dtype bfloat16 --execution eager".split(),
        "--out",
        out,
    )
    assert done.exit_code == 0, done.output
    guidance, solver = fastdit.Guidance(2.5, channels=2), DPMSolverPP(clip=0.9)
    options = dict(guidance=guidance, dtype=torch.bfloat16, execution="eager")
    sampler = Sampler(model, scheduler, solver, 5, **options)
    images = sampler([3, 5], seed=4)
    assert images.abs().max() < 0.91  # clipped, so pixels are not all black or white
    with np.load(out) as file:
        assert np.array_equal(file["arr_0"], to_pixels(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--guidance-scale", 2), "error: --guidance-scale: expected none, since the model is not"),
        (("--guidance-channels", 2), "error: --guidance-channels: expected --guidance-scale besi"),
        (("--solver", "dimm"), "error: --solver: expected one of ddpm, ddim, dpm++, heun, euler, "),
        (("--steps", 6), "error: --steps: expected an integer from 1 to T = 5, got 6"),
        (("--clip", 0), "error: --clip: expected a positive number, or None, got 0.0"),
        (("--dtype", "bf16"), "error: --dtype: expected one of float32, bfloat16, float16; got"),
        (("--execution", "grahp"), "did you mean 'graph'?"),
        (("--execution", "graph", "--device", "cpu"), "error: --execution: 'graph' needs a mode"),
    ],
)
def test_bad_sampling_options_are_one_line(run, checkpoint, arguments, message):
    done = run("sample", checkpoint, *arguments)
    assert done.exit_code == 1 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_pipelines_folder_is_sampled_by_name(run, tmp_path):
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


def test_processes_without_a_number_of_images_are_refused(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run("sample", checkpoint, "--out", tmp_path / "s.npz")
    assert done.exit_code == 1 and "--num-images: expected with several processes" in done.stderr
    (tmp_path / "d.npz").mkdir()
    done = run("sample", checkpoint, "--out", tmp_path / "d.npz")
    assert done.exit_code == 1 and "--out: expected a file's name" in done.stderr


def test_a_run_and_each_of_its_checkpoints_are_sampled(run, tmp_path):
    """The folder stands for its newest weights; raw and averaged ones are chosen by name."""
    small = ("--steps", 4, "--batch-size", 4, "--per-class", 2, "--ema", 0.5, "--save-every", 2)
    done = run("train", "--out", tmp_path / "run", *small)
    assert done.exit_code == 0, done.output
    files = {}
    for name, source, options in (
        ("folder", "run", ()),
        ("model", "run", ("--weights", "model")),
        ("newest", "run/checkpoints/step-00000004.safetensors", ()),
        ("older", "run/checkpoints/step-00000002.safetensors", ()),
    ):
        out = tmp_path / f"{name}.npz"
        chosen = ("--labels", "red circle", "--count", 1, "--solver", "ddim", "--steps", 2)
        done = run("sample", tmp_path / source, *chosen, "--out", out, *options)
        assert done.exit_code == 0, done.output
        with np.load(out) as file:
            files[name] = file["arr_0"].tobytes()
    assert files["folder"] == files["newest"]
    assert len(set(files.values())) == 3
    printed = run("info", tmp_path / "run").stdout
    assert "red circle, red square" in printed and "every tensor fits" in printed


def test_a_diffusion_that_is_told_replaces_what_is_stored(run, checkpoint, tmp_path):
    one = ("--labels", 3, "--count", 1, "--steps", 3)
    outs = [tmp_path / "stored.npz", tmp_path / "told.npz"]
    for out, options in zip(outs, ((), ("--diffusion", "schedule=linear")), strict=True):
        done = run("sample", checkpoint, *one, "--out", out, *options)
        assert done.exit_code == 0, done.output
    first, second = (np.load(out)["arr_0"] for out in outs)
    assert not np.array_equal(first, second)
