"""`fastdit convert` and `fastdit info`: what they keep, and what they print."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastdit
from fastdit import DiffusionScheduler, Sampler
from fastdit.testing import randomize

GOLDEN = Path(__file__).parents[1] / "golden"


def test_a_published_checkpoint_is_converted_sampled_and_converted_back(run, tmp_path):
    preset = replace(fastdit.PRESETS["DiT-S/8"], hidden=32, n_layers=1, n_heads=2, num_classes=5)
    model = fastdit.DiT.from_config(preset)
    randomize(model)
    theirs, own = tmp_path / "theirs.pt", tmp_path / "own.safetensors"
    fastdit.save(model, theirs, layout="facebookresearch/DiT")
    done = run("convert", theirs, own, "--n-heads", 2, "--diffusion", "ddpm")
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
    torch.save(dict(first), theirs)  # without the config that fastdit writes beside the tensors
    done = run("convert", theirs, own)
    assert done.exit_code == 1 and "n_heads: shapes do not tell it" in done.stderr
    done = run("convert", theirs, own, "--n-heads", 2, "--null-class", "--diffusion", "T=50")
    assert done.exit_code == 0 and not done.stderr, done.output
    done = run("info", own)
    assert "diffusion        T 50, schedule linear, prediction epsilon\n" in done.stdout
    assert "every tensor fits its checksum" in done.stdout


def test_info_says_what_is_assumed_and_convert_keeps_saying_it(run, tmp_path):
    """A diffusion that was assumed once does not turn into one that is known."""
    torch.save(fastdit.DiT(hidden=16, n_layers=1).state_dict(), tmp_path / "bare.pt")
    assert run("convert", tmp_path / "bare.pt", tmp_path / "own.safetensors").exit_code == 0
    for name in ("bare.pt", "own.safetensors"):
        printed = run("info", tmp_path / name).stdout
        assert "n_heads          4  (assumed)" in printed, printed
        assert "prediction epsilon  (assumed)" in printed, printed
        assert "hidden           16\n" in printed, printed
    printed = run("info", tmp_path / "bare.pt", "--n-heads", 8, "--diffusion", "T=200").stdout
    assert "n_heads          8\n" in printed and "prediction epsilon\n" in printed, printed


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--diffusion", "T"), "--diffusion: expected flow, ddpm, or name=value"),
        (("--diffusion", "steps=3"), "--diffusion: expected one of T, schedule, prediction"),
        (("--diffusion", "clean_at=x"), "--diffusion: expected clean_at to be a number, got 'x'"),
        (("--diffusion", "path=straight"), "--diffusion: path: expected one of linear, gvp, vp"),
        (("--diffusion", "T=x"), "--diffusion: expected T to be a number of steps"),
        (("--img-size", "4x4x4"), "--img-size: expected a size such as 32 or 16x64"),
        (("--weights", "ema"), "weights: "),
    ],
)
def test_bad_answers_are_one_line(run, checkpoint, option, message):
    done = run("info", checkpoint, *option)
    assert done.exit_code == 1 and message in done.stderr and done.stderr.count("\n") == 1


def test_info_names_every_convention_of_a_flow(run, tmp_path):
    """A preset's, a layout's, and one that only the name of a file tells."""
    of_jit = (
        "path linear, prediction sample, clean_at 1, time_scale 1.0, noise_scale 2.0, min_noise"
    )
    assert f"diffusion        {of_jit} 0.05\n" in run("info", "JiT-B/32").stdout
    golden = load_file(GOLDEN / "repa.safetensors")
    state = {n.removeprefix("model/"): t for n, t in golden.items() if n.startswith("model/")}
    torch.save(state, tmp_path / "repa.pt")
    printed = run("info", tmp_path / "repa.pt").stdout
    for part in ("prediction velocity, clean_at 0, time_scale 1.0,", "qk_norm          layer\n"):
        assert part in printed, printed
    state = {n: t for n, t in state.items() if "_norm" not in n and "projectors" not in n}
    torch.save(state, tmp_path / "SiT-tiny.pt")
    command = ("info", tmp_path / "SiT-tiny.pt", "--n-heads", 2)
    printed = run(*command).stdout
    assert "clean_at 1, time_scale 1.0, noise_scale 1.0, min_noise None  (told by the f" in printed
    printed = run(*command, "--diffusion", "path=gvp,clean_at=0,time_scale=1e3").stdout
    assert "path gvp, prediction velocity, clean_at 0, time_scale 1000.0, noise_scale" in printed
    assert "min_noise None\n" in printed


def test_convert_keeps_the_header(run, checkpoint, tmp_path):
    assert run("convert", checkpoint, tmp_path / "again.safetensors").exit_code == 0
    assert (tmp_path / "again.safetensors").read_bytes() == checkpoint.read_bytes()


def test_info_describes_a_preset_or_a_checkpoint(run, checkpoint):
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


TEXT = dict(hidden=24, n_layers=1, n_heads=2, text_width=20, img_size=8)


def test_a_text_to_image_model_is_converted_and_described(run, tmp_path):
    model = fastdit.PixArt(**TEXT, text_tokens=120)
    randomize(model)
    own, theirs = tmp_path / "own.safetensors", tmp_path / "theirs"
    fastdit.save(model, own, DiffusionScheduler(1000))
    done = run("convert", own, theirs, "--layout", "diffusers")
    assert done.exit_code == 0, done.output
    assert "width 24 with 2 heads, prompts of up to 120 tokens, images of 4 x 8 x 8" in done.stdout
    done = run("convert", theirs, tmp_path / "back.safetensors")
    assert done.exit_code == 0 and "assumed: text_tokens 300" in done.stderr, done.output
    done = run("info", tmp_path / "back.safetensors")
    assert "text_tokens      300  (assumed)\n" in done.stdout
    done = run("info", tmp_path / "back.safetensors", "--text-tokens", 120)
    assert "text_tokens      120\n" in done.stdout
    assert "every tensor fits its checksum" in done.stdout
    back = fastdit.load(tmp_path / "back.safetensors").state_dict()
    assert all(map(torch.equal, back.values(), model.state_dict().values()))
    done = run("convert", own, theirs, "--layout", "willisma/SiT")
    assert done.exit_code == 1
    assert "error: --layout: expected fastdit or diffusers for a PixArt" in done.stderr
    done = run("info", own, "--null-class")
    assert done.exit_code == 1 and "error: --null-class: expected None" in done.stderr
    done = run("train", "--from", own)
    assert done.exit_code == 1 and "expected a DiT, which takes labels, got a PixArt" in done.stderr


def test_info_of_a_text_to_image_preset_separates_what_is_done_once(run):
    done = run("info", "SD3-medium")
    assert done.exit_code == 0, done.output
    assert "diffusion        path linear, prediction velocity, clean_at 0" in done.stdout
    assert "parameters       2,084,951,104\n" in done.stdout
    for part in (
        "in every step, with the longest prompt",
        "for each step, ahead of",
        "once, ahead",
    ):
        assert f"GFLOP per image {part}" in done.stdout
    assert "\n\n--execution auto is 'graph' on CUDA, 'eager' on a CPU\n\nleast" in done.stdout
    assert run("info", "PixArt-alpha-XL/2-51").exit_code == 1
