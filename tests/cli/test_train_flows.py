"""`fastdit train` with the recipes of flows, and with an encoder's features."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open

import fastdit
from fastdit import FlowMatching
from fastdit.checkpoints.native import header_of
from fastdit.train.recipe import RECIPES, SHOWINGS, Recipe
from fastdit.train.run_folder import RunFolder

BRIEF = "--recipe flow --steps 2 --per-class 1 --batch-size 8".split()


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Let samples be shown in two steps."""
    for name in ("flow", "sit", "lightning"):
        monkeypatch.setitem(SHOWINGS, name, replace(SHOWINGS[name], steps=2))


def recipe_of(out):
    return Recipe.from_saved(RunFolder(out).newest().header["recipe"])


def test_a_flow_is_trained_shown_and_kept_with_its_model(run, tmp_path):
    out = tmp_path / "run"
    done = run("train", *BRIEF, "--out", out)
    assert done.exit_code == 0, done.output
    assert recipe_of(out) == replace(RECIPES["flow"], steps=2, batch_size=8, warmup=1)
    assert (out / "samples" / "step-00000002.png").exists()
    assert "160 samples: colour accuracy" in done.stdout
    assert header_of(out / "model.safetensors")["diffusion"] == RECIPES["flow"].process().options
    done = run("train", "--resume", "auto", "--out", out, "--steps", 3, "--time-shift", 0.5)
    assert done.exit_code == 0, done.output
    assert "from step 2 on: steps 2 -> 3, time_shift 1.0 -> 0.5" in done.stderr
    assert recipe_of(out).time_shift == 0.5


def test_options_change_the_flow(run, tmp_path):
    out = tmp_path / "run"
    changes = "--path gvp --prediction velocity --clean-at 0 --time-scale 9 --noise-scale 2"
    changes += " --time-draw logit-normal --time-mean -0.8 --time-deviation 0.8 --time-shift 0.3"
    done = run(
        "train", *BRIEF, *changes.split(), *"--direction-loss 1 --beta2 0.9".split(), "--out", out
    )
    assert done.exit_code == 0, done.output
    assert recipe_of(out) == replace(
        RECIPES["flow"],
        steps=2,
        batch_size=8,
        warmup=1,
        path="gvp",
        clean_at=0,
        time_scale=9.0,
        noise_scale=2.0,
        time_draw="logit-normal",
        time_mean=-0.8,
        time_deviation=0.8,
        time_shift=0.3,
        direction_loss=1.0,
        beta2=0.9,
    )
    images = "--prediction sample --min-noise 0.05".split()
    done = run("train", *BRIEF, *images, "--out", tmp_path / "images")
    assert done.exit_code == 0, done.output
    assert recipe_of(tmp_path / "images").process().min_noise == 0.05


def test_latents_train_by_the_published_recipes_of_flows(run, latents, tmp_path, monkeypatch):
    small = replace(fastdit.PRESETS["DiT-S/4"], hidden=16, n_layers=1, n_heads=2)
    monkeypatch.setitem(fastdit.PRESETS, "DiT-S/4", small)
    for name in ("sit", "lightning"):
        out = tmp_path / name
        arguments = ["--data", latents[0], "--model", "DiT-S/4", "--recipe", name, "--lr", 1e-3]
        done = run("train", *arguments, *"--steps 2 --batch-size 4 --out".split(), out)
        assert done.exit_code == 0, done.output
        assert recipe_of(out).process() == fastdit.FlowMatching()


def test_a_preset_brings_the_flow_that_it_was_published_with(run, tmp_path, monkeypatch):
    small = dict(hidden=16, n_layers=1, n_heads=2, context_start=None)
    for name in ("SiT-S/8", "JiT-B/16"):
        monkeypatch.setitem(fastdit.PRESETS, name, replace(fastdit.PRESETS[name], **small))
    brief = "--steps 1 --per-class 1 --batch-size 8".split()
    out = tmp_path / "none"
    done = run("train", *brief, "--model", "SiT-S/8", "--out", out)
    assert done.exit_code == 1 and not out.exists()
    why = "expected one of sit, lightning, flow, since SiT-S/8 was published with a flow, got none"
    assert f"error: --recipe: {why}" in done.stderr
    sit, jit = FlowMatching(), FlowMatching(prediction="sample", min_noise=0.05)
    for name, options, flow in (
        ("SiT-S/8", "--recipe flow", sit),
        ("SiT-S/8", "--recipe sit --path gvp", replace(sit, path="gvp")),
        ("JiT-B/16", "--recipe sit", jit),
        ("JiT-B/16", "--recipe sit --min-noise 0.1", replace(jit, min_noise=0.1)),
        ("JiT-B/16", "--recipe sit --prediction velocity", sit),
    ):
        out = tmp_path / f"{name}{options}".replace("/", "")
        done = run("train", *brief, *options.split(), "--model", name, "--out", out)
        assert done.exit_code == 0, done.output
        assert recipe_of(out).process() == flow
        assert fastdit.load(out).diffusion == flow.options
        assert fastdit.load(out, weights="ema").diffusion == flow.options
    done = run("train", *brief, *"--recipe sharp --model SiT-S/8 --out".split(), tmp_path / "ddpm")
    assert done.exit_code == 0 and recipe_of(tmp_path / "ddpm").path is None, done.output


def test_a_flow_is_sampled_and_tuned_as_what_it_is(run, tmp_path):
    out = tmp_path / "run"
    assert run("train", *BRIEF, "--path", "gvp", "--out", out).exit_code == 0
    done = run("sample", out, *"--labels 3 --count 1 --steps 2 --out".split(), tmp_path / "s.png")
    assert done.exit_code == 0, done.output
    brief = [*"--steps 1 --per-class 1 --batch-size 8 --from".split(), out, "--out"]
    done = run("train", *brief, tmp_path / "other")
    assert done.exit_code == 1
    why = "was trained on a flow, and 'seed' trains a diffusion"
    assert (
        f"error: --recipe: expected one of sit, lightning, flow, since {out} {why}" in done.stderr
    )
    done = run("train", *brief, tmp_path / "tuned", "--recipe", "sit")
    assert done.exit_code == 0, done.output
    assert recipe_of(tmp_path / "tuned").process() == recipe_of(out).process()
    silent = tmp_path / "silent.safetensors"
    fastdit.save(fastdit.DiT(hidden=8, n_layers=1, n_heads=2, null_class=True), silent)
    brief[-2] = silent
    done = run("train", *brief, tmp_path / "told", "--recipe", "sit")
    expected = "does not tell its flow; pass --path, --prediction and --clean-at"
    assert done.exit_code == 1 and expected in done.stderr
    told = "--recipe sit --path gvp --prediction velocity --clean-at 0".split()
    done = run("train", *brief, tmp_path / "told", *told)
    assert done.exit_code == 0, done.output
    assert recipe_of(tmp_path / "told").process() == FlowMatching("gvp", clean_at=0)
    diffusion = fastdit.DiffusionScheduler(50, schedule="cosine")
    fastdit.save(fastdit.load(silent), silent, diffusion)
    done = run("train", *brief, tmp_path / "ddpm", "--recipe", "flow")
    assert (
        done.exit_code == 1 and "error: --recipe: expected one of seed, sharp, dit" in done.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "sharp", "--path", "gvp"), "--path: expected None, since 'sharp' trains a "),
        (
            ("--recipe", "flow", "--path", "lin"),
            "--path: expected one of linear, gvp, vp; got",
        ),
        (
            ("--recipe", "flow", "--diffusion-steps", 50),
            "--diffusion-steps: expected the default 200, since 'flow' trains a flow",
        ),
        (
            ("--recipe", "flow", "--clean-at", 3),
            "--clean-at: expected the model's time at",
        ),
        (("--time-draw", "uniform", "--time-shift", 2), "--time-shift: expected the default 1.0,"),
        (("--align-weight", 1), "--features: expected those of the images, since align_weight=1"),
        (("--features", "f.pt"), "--features: expected a .npy or .safetensors file of one array"),
    ],
)
def test_bad_arguments_are_one_line(run, tmp_path, arguments, message):
    done = run("train", "--out", tmp_path / "run", *arguments)
    assert done.exit_code == 1 and f"error: {message}" in done.stderr, done.stderr
    assert "Traceback" not in done.output and not (tmp_path / "run").exists()


def test_features_of_a_file_align_the_model(run, tmp_path):
    features, out = tmp_path / "f.npy", tmp_path / "run"
    np.save(features, np.random.default_rng(0).standard_normal((16, 16, 5)).astype(np.float16))
    align = ["--features", features, *"--align-depth 2 --align-width 8".split()]
    done = run("train", *BRIEF, *align, "--out", out)
    assert done.exit_code == 0, done.output
    recipe = recipe_of(out)
    assert (recipe.align_weight, recipe.align_depth, recipe.align_width) == (0.5, 2, 8)
    with safe_open(out / "model.safetensors", "np") as file:
        assert not any("projector" in name for name in file.keys())
    moved = features.rename(tmp_path / "moved.npy")
    done = run("train", "--resume", "auto", "--out", out, "--steps", 3)
    assert done.exit_code == 1 and "error: --features: expected a .npy or" in done.stderr
    done = run("train", "--resume", "auto", "--out", out, "--steps", 3, "--features", moved)
    assert done.exit_code == 0, done.output
    done = run("train", *BRIEF, "--features", moved, "--align-width", 8, "--out", tmp_path / "deep")
    expected = "error: --align-depth: expected at most the model's 4 blocks, got 8"
    assert done.exit_code == 1 and expected in done.stderr
