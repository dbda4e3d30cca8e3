"""Checkpoints of facebookresearch/DiT are recognised, translated exactly and sampled alike."""

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, Guidance, Sampler
from fastdit.checkpoints.inference import Told
from fastdit.checkpoints.projects import PROJECTS
from fastdit.checkpoints.translation import from_facebook, to_facebook, to_project
from fastdit.model import sincos_pos_embed
from fastdit.testing import randomize, relative_error

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "facebook_dit_tiny.safetensors")


STATE = {n.removeprefix("model/"): t for n, t in GOLDEN.items() if n.startswith("model/")}


CFG = replace(
    fastdit.PRESETS["DiT-XL/2"], img_size=8, hidden=144, n_layers=2, n_heads=2, num_classes=10
)


def published():
    return fastdit.load(STATE, n_heads=2, null_class=True)


def test_the_config_is_inferred_from_shapes():
    assert published().cfg == CFG


@pytest.mark.parametrize("name", [n for n in fastdit.PRESETS if n != "toy"])
def test_every_preset_is_recognised_with_its_heads(name):
    cfg = fastdit.PRESETS[name]
    with torch.device("meta"):
        model = fastdit.DiT.from_config(cfg)
    project = next(p for p in PROJECTS if p.endswith(f"/{name.partition('-')[0]}"))
    told, _ = from_facebook(to_project(project, cfg, model.state_dict()), Told())
    assert told == cfg


def test_heads_that_shapes_do_not_tell_are_asked_for():
    with pytest.raises(ValueError, match="state dict: n_heads: shapes do not tell it.*2 layers"):
        fastdit.load(STATE)


def test_a_forward_is_the_published_one():
    with torch.no_grad():
        out = published()(GOLDEN["forward/x"], GOLDEN["forward/t"], GOLDEN["forward/y"])
    assert relative_error(out, GOLDEN["forward/out"]) < 1e-5


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("execution", ["eager", "compile"])
def test_a_guided_loop_is_the_published_one(solver, execution):
    """Ten steps with learned variance, guidance scale 4 on three channels and recorded noise."""
    sampler = Sampler(
        published(),
        DiffusionScheduler(1000),
        solver,
        10,
        guidance=Guidance(4.0, channels=3),
        execution=execution,
    )
    assert sampler.table.timesteps[::-1] == GOLDEN[f"{solver}/timestep_map"].tolist()
    half = len(GOLDEN["cfg/y"]) // 2  # the published loop draws other noise for the null rows
    images = sampler(
        GOLDEN["cfg/y"][:half],
        x_T=GOLDEN[f"{solver}/x_T"][:half],
        noise=GOLDEN[f"{solver}/noise"][:, :half],
    )
    assert relative_error(images, GOLDEN[f"{solver}/x_0"][:half]) < 1e-5


def test_a_round_trip_keeps_every_bit(tmp_path):
    model = published()
    fastdit.save(model, tmp_path / "m.pt", layout="facebookresearch/DiT")
    back = torch.load(tmp_path / "m.pt", weights_only=True)
    assert back.keys() == STATE.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in STATE.items())


def as_bare(path):
    torch.save(STATE, path)


def as_training(path):
    """As the published training code does: weights twice, optimizer state and command line."""
    noise = {name: torch.zeros_like(t) for name, t in STATE.items()}
    args = argparse.Namespace(model="DiT-XL/2", lr=1e-4)
    torch.save({"model": noise, "ema": STATE, "opt": {"state": {}}, "args": args}, path)


def as_wrapped(path):
    torch.save({"model": {f"module.{name}": t for name, t in STATE.items()}}, path)


def as_legacy(path):
    torch.save(STATE, path, _use_new_zipfile_serialization=False)


def as_safetensors(path):
    save_file(STATE, path)


@pytest.mark.parametrize("write", [as_bare, as_training, as_wrapped, as_legacy, as_safetensors])
def test_files_of_every_kind_are_read(tmp_path, write):
    write(tmp_path / "checkpoint")
    model = fastdit.load(tmp_path / "checkpoint", n_heads=2, null_class=True)
    assert all(map(torch.equal, model.state_dict().values(), published().state_dict().values()))
    os.truncate(tmp_path / "checkpoint", 0)  # the model must not map the file
    assert model.pos_embed.isfinite().all() and not model.pos_embed.requires_grad


def test_a_live_module_is_read_and_keeps_its_weights():
    class Foreign(nn.Module):
        num_heads = 2

        def state_dict(self):
            return STATE

    model = fastdit.load(Foreign(), null_class=True)
    assert model.cfg == CFG
    own = fastdit.load(model)
    with torch.no_grad():
        own.final_linear.bias.add_(1)
    assert not torch.equal(own.final_linear.bias, model.final_linear.bias)
    with pytest.raises(ValueError, match="n_heads: DiT says 2, got 3"):
        fastdit.load(model, n_heads=3)


@pytest.mark.parametrize("keep", [1, 100, 0.5, 0.99], ids="keep-{}".format)
@pytest.mark.parametrize("write", [as_bare, as_training, as_legacy])
def test_truncated_pickles_are_one_clear_error(tmp_path, write, keep):
    path = tmp_path / "m.pt"
    write(path)
    size = path.stat().st_size
    os.truncate(path, keep if keep >= 1 else int(keep * size))
    with pytest.raises(ValueError, match="truncated"):
        fastdit.load(path, n_heads=2)


def without(*names):
    return {name: t for name, t in STATE.items() if name not in names}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without("pos_embed"), "tensors that tell the config are missing: pos_embed"),
        (without("blocks.1.attn.qkv.bias"), "missing blocks.1.attn.qkv.bias"),
        (STATE | {"x_embedder.proj.weight": torch.zeros(3)}, "have unexpected dimensions"),
        (STATE | {"blocks.0.attn.qkv.bias": torch.zeros(3)}, r"expected shape \[432\], got \[3\]"),
        (STATE | {"final_layer.linear.weight": torch.zeros(())}, "have unexpected dimensions"),
        (STATE | {"blocks.0.adaLN_modulation.1.weight": torch.zeros(())}, r"got \[\]"),
        (STATE | {"blocks.0.adaLN_modulation.1.bias": torch.zeros(1)}, r"got \[1\]"),
        (
            STATE | {"blocks.0.mlp.0.weight": torch.zeros(3)},
            "two tensors have the name blocks.0.mlp",
        ),
        (STATE | {"pos_embed": STATE["pos_embed"].to("meta")}, "pos_embed is a meta tensor"),
        (STATE | {"pos_embed": STATE["pos_embed"].to_sparse()}, "sparse"),
        (STATE | {"pos_embed": STATE["pos_embed"].to(torch.float8_e4m3fn)}, "float8_e4m3fn"),
        ({"encoder.weight": torch.zeros(3)}, "are not of a known layout"),
        ({}, "are not of a known layout"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tensors, message):
    with pytest.raises(ValueError, match=f"state dict: .*{message}"):
        fastdit.load(tensors, n_heads=2, null_class=True)


def test_a_layout_refuses_a_model_that_it_cannot_hold(tmp_path):
    model = fastdit.DiT.from_config(DiTConfig())
    with pytest.raises(ValueError, match="'facebookresearch/DiT' can store such a DiT only as"):
        fastdit.save(model, tmp_path / "m.pt", layout="facebookresearch/DiT")
    own = fastdit.DiT.from_config(replace(CFG, gelu="erf"))
    randomize(own)
    with pytest.raises(ValueError, match="can store such a DiT only as"):
        fastdit.save(own, tmp_path / "m.pt", layout="facebookresearch/DiT")
    with pytest.raises(ValueError, match="stores neither scheduler nor labels"):
        fastdit.save(
            published(), tmp_path / "m.pt", DiffusionScheduler(), layout="facebookresearch/DiT"
        )
    with pytest.raises(ValueError, match="layout: expected one of fastdit, facebookresearch/DiT"):
        fastdit.save(own, tmp_path / "m.pt", layout="facebook")
    assert not list(tmp_path.iterdir())


LOAD_XL = """
import re, sys, fastdit
def resident(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
fastdit.load(fastdit.DiT())  # imports what loading needs
open("/proc/self/clear_refs", "w").write("5")  # resets the recorded peak
before = resident("VmRSS")
model = fastdit.load(sys.argv[1], n_heads=16)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux")
    or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 8 * 2**30,
    reason="reads Linux's account of a process, and needs 8 GB",
)
@pytest.mark.parametrize(
    "layout", ["fastdit", "facebookresearch/DiT", "diffusers", "wrapped", "legacy"]
)
def test_loading_xl_takes_little_more_memory_than_its_file(tmp_path, layout):
    """A quarter of its blocks in bfloat16 saves disk and time, since only the ratio matters.

    "wrapped" is an entry of a training checkpoint, with the prefixes of two wrappers.
    """
    cfg = replace(fastdit.PRESETS["DiT-XL/2"], n_layers=7)
    if layout == "diffusers":
        cfg = replace(cfg, t_freq_shift=1, mlp_ln_eps=1e-5)
    with torch.device("meta"):
        model = fastdit.DiT.from_config(cfg).bfloat16()
    model = model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    with torch.no_grad():
        model.pos_embed.copy_(sincos_pos_embed(cfg.hidden, cfg.grid))
    path, of_model = tmp_path / "xl", 2 * sum(p.numel() for p in model.parameters())
    if layout in fastdit.checkpoints.SAVED_LAYOUTS:
        fastdit.save(model, path, layout=layout)
    else:
        state = to_facebook(model.state_dict())
        if layout == "wrapped":
            state = {"ema": {f"_orig_mod.module.{name}": t for name, t in state.items()}}
        torch.save(state, path, _use_new_zipfile_serialization=layout != "legacy")
        del state
    size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    assert size >= of_model > 2 * 165_000_000
    del model
    done = subprocess.run(
        [sys.executable, "-c", LOAD_XL, str(path)], capture_output=True, text=True, check=True
    )
    assert of_model < int(done.stdout) < of_model + 1.35 * size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_a_round_trip_keeps_16_bit_weights(tmp_path, dtype):
    model = published().to(dtype)
    fastdit.save(model, tmp_path / "m", layout="facebookresearch/DiT")
    again = fastdit.load(tmp_path / "m", n_heads=2)
    assert again.cfg == model.cfg and again.pos_embed.dtype == dtype
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_loaded_weights_are_contiguous_and_share_no_memory(tmp_path):
    """Views of one storage and tensors with unusual strides become ordinary parameters."""
    state, flat = dict(STATE), torch.zeros(10_000)
    bias = STATE["final_layer.linear.bias"]
    state["final_layer.linear.bias"] = flat[: len(bias)]
    state["blocks.0.attn.proj.bias"] = flat[:144]
    state["pos_embed"] = STATE["pos_embed"][:, :1].expand_as(STATE["pos_embed"])
    torch.save(state, tmp_path / "m.pt")
    model = fastdit.load(tmp_path / "m.pt", n_heads=2, null_class=True)
    with torch.no_grad():
        model.final_linear.bias.fill_(7)
    assert (model.blocks[0].attn.proj.bias == 0).all() and model.pos_embed.is_contiguous()
    fastdit.save(model, tmp_path / "own.safetensors")


@pytest.mark.parametrize("n_heads", [0, -1, 2.0, "2"])
def test_a_bad_number_of_heads_is_an_error(n_heads):
    with pytest.raises(ValueError, match="n_heads: expected a positive integer, got"):
        fastdit.load(STATE, n_heads=n_heads)
