"""Other projects' files on the command line: what is asked, said to be assumed, and sampled."""

import argparse
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastdit
from fastdit import DiffusionScheduler, FlowMatching
from fastdit.checkpoints.translation import to_facebook
from fastdit.testing import randomize

PUBLISHED = replace(
    fastdit.PRESETS["DiT-XL/2"], img_size=4, hidden=16, n_layers=1, n_heads=2, num_classes=10
)
OF_DIFFUSERS = replace(PUBLISHED, mlp_ln_eps=1e-5, t_freq_shift=1)
BRIEF = ("--labels", 1, "--count", 1, "--steps", 2)


def made(cfg):
    """Return a model with random weights and its own positions."""
    model = fastdit.DiT.from_config(cfg)
    positions = model.pos_embed.detach().clone()
    randomize(model)
    with torch.no_grad():
        model.pos_embed.copy_(positions)
    return model


def latents_of(path):
    with np.load(path) as file:
        return file["latents"]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_bare_toy_is_sampled_and_what_is_assumed_is_said(run, tmp_path, prefix):
    state = fastdit.DiT().state_dict()
    torch.save({prefix + name: t for name, t in state.items()}, tmp_path / "toy.pt")
    for options, said in (((), "n_heads 4, diffusion ("), (("--n-heads", 8), "img_size 16, diff")):
        done = run("sample", tmp_path / "toy.pt", *BRIEF, *options, "--out", tmp_path / "s.png")
        assert done.exit_code == 0, done.output
        assert said in done.stderr and "is assumed:" in done.stderr, done.stderr
        assert done.stderr.count("warning:") == 1 and "SiT" not in done.stderr
    known = ("--n-heads", 4, "--diffusion", "T=200")
    done = run("sample", tmp_path / "toy.pt", *BRIEF, *known, "--out", tmp_path / "s.png")
    assert "gelu erf" in done.stderr and "diffusion=" not in done.stderr


def test_a_repa_checkpoint_is_sampled_by_its_flow_or_a_told_diffusion(run, tmp_path):
    """It is a SiT's, with projectors beside the averaged weights."""
    raw, averaged = made(PUBLISHED), made(PUBLISHED)
    content = {
        "model": to_facebook(raw.state_dict()),
        "ema": to_facebook(averaged.state_dict()) | {"projectors.0.0.weight": torch.ones(2, 2)},
        "opt": {"state": {}},
        "args": argparse.Namespace(model="SiT-XL/2", encoder_depth=8, num_classes=10),
        "steps": 3,
    }
    torch.save(content, tmp_path / "repa.pt")
    command = ("sample", tmp_path / "repa.pt", *BRIEF, "--n-heads", 2, "--out", tmp_path / "s.npz")
    printed = run("info", tmp_path / "repa.pt", "--n-heads", 2).stdout
    assert "path linear, prediction velocity, clean_at 0, " in printed, printed
    for weights, model in (("ema", averaged), ("model", raw)):
        for options, process in (
            ((), FlowMatching(clean_at=0)),
            (("--diffusion", "T=50,schedule=cosine"), DiffusionScheduler(50, schedule="cosine")),
        ):
            done = run(*command, *options, "--weights", weights)
            assert done.exit_code == 0, done.output
            assert ("left out" in done.stderr) == (weights == "ema")
            sampler = fastdit.Sampler(model, process, steps=2)
            assert np.array_equal(latents_of(tmp_path / "s.npz"), sampler([1]).numpy())


def test_a_file_that_may_be_a_sits_or_a_dits_is_sampled_as_it_is_told(run, tmp_path):
    model = made(PUBLISHED)
    torch.save(to_facebook(model.state_dict()), tmp_path / "xl.pt")
    command = ("sample", tmp_path / "xl.pt", *BRIEF, "--n-heads", 2, "--out", tmp_path / "s.npz")
    done = run(*command)
    assert done.exit_code == 1 and "(--null-class or --no-null-class" in done.stderr
    done = run(*command, "--null-class")
    assert done.exit_code == 1 and done.stderr.count("\n") == 1, done.output
    assert "--diffusion flow for a SiT, --diffusion ddpm for a DiT" in done.stderr
    for told, process in (("flow", FlowMatching()), ("ddpm", DiffusionScheduler(1000))):
        done = run(*command, "--null-class", "--diffusion", told)
        assert done.exit_code == 0 and not done.stderr.count("warning"), done.output
        expected = fastdit.Sampler(model, process, steps=2)([1])
        assert np.array_equal(latents_of(tmp_path / "s.npz"), expected.numpy())


def test_fine_tuning_says_which_command_takes_the_answer(run, tmp_path):
    """What the file leaves open is answered once, by converting it."""
    cfg = replace(fastdit.PRESETS["DiT-S/8"], img_size=8, hidden=16, n_layers=1, n_heads=2)
    source, own = tmp_path / "m.pt", tmp_path / "own.safetensors"
    torch.save(to_facebook(made(replace(cfg, num_classes=7)).state_dict()), source)
    train = ("train", "--steps", 1, "--per-class", 1, "--batch-size", 2, "--out", tmp_path / "run")
    done = run(*train, "--from", source)
    assert done.exit_code == 1 and "(--n-heads, also of fastdit convert)" in done.stderr
    told = ("--n-heads", 2, "--null-class", "--diffusion", "T=25,schedule=cosine")
    assert run("convert", source, own, *told).exit_code == 0
    done = run(*train, "--from", own)
    assert done.exit_code == 0 and "made anew for other data: the 16 class rows" in done.stderr


@pytest.mark.parametrize(
    "cfg, layout",
    [
        (PUBLISHED, "fastdit"),
        (PUBLISHED, "facebookresearch/DiT"),
        (replace(PUBLISHED, img_size=(4, 8)), "fastdit"),
        (replace(PUBLISHED, img_size=(4, 8)), "facebookresearch/DiT"),
        (OF_DIFFUSERS, "diffusers"),
        (replace(OF_DIFFUSERS, embedders="block", n_layers=2), "diffusers"),
        (replace(OF_DIFFUSERS, embedders="block", img_size=(4, 8)), "fastdit"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.embedders}-{value.img_size}",
)
def test_converting_there_and_back_keeps_every_bit(run, tmp_path, cfg, layout):
    model = made(cfg)
    fastdit.save(model, tmp_path / "m.safetensors", DiffusionScheduler(50))
    there, back = tmp_path / "there.pt", tmp_path / "back.safetensors"
    for arguments in ((tmp_path / "m.safetensors", there, "--layout", layout), (there, back)):
        done = run("convert", *arguments)
        assert done.exit_code == 0, done.output
    loaded = fastdit.load(back, diffusion={})
    assert loaded.cfg == cfg
    for name, t in model.state_dict().items():
        assert torch.equal(t, loaded.state_dict()[name]), name


@pytest.mark.parametrize(
    "cfg, layout, message",
    [
        (replace(OF_DIFFUSERS, img_size=(4, 8)), "diffusers", "square images only, got img_size"),
        (replace(OF_DIFFUSERS, embedders="block"), "facebookresearch/DiT", "no embedders='block'"),
        (
            replace(PUBLISHED, use_class_cond=False, null_class=False),
            "facebookresearch/DiT",
            "has class conditioning, got none",
        ),
    ],
    ids=["diffusers-oblong", "facebook-block", "facebook-unconditional"],
)
def test_what_a_layout_cannot_hold_is_one_line(run, tmp_path, cfg, layout, message):
    fastdit.save(made(cfg), tmp_path / "m.safetensors", DiffusionScheduler(50))
    done = run("convert", tmp_path / "m.safetensors", tmp_path / "out", "--layout", layout)
    assert done.exit_code == 1 and done.stderr.startswith("error: --layout: "), done.output
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
