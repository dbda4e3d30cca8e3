"""Damaged files of every layout are a ValueError or a right load, and never run code."""

import argparse
import json
import pathlib
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import fastdit
from fastdit import DiTConfig
from fastdit.checkpoints.native import write_tensors
from fastdit.checkpoints.translation import to_diffusers, to_facebook
from fastdit.testing import randomize

TOY = DiTConfig(hidden=8, n_layers=1, n_heads=2, num_classes=3)
PUBLISHED = replace(
    fastdit.PRESETS["DiT-XL/2"], img_size=4, hidden=8, n_layers=1, n_heads=2, num_classes=3
)
ANSWERS = {"n_heads": 2, "null_class": True}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def made(cfg):
    model = fastdit.DiT.from_config(cfg)
    randomize(model)
    return model


def write_own(path):
    names = [f"class {i}" for i in range(3)]
    fastdit.save(made(TOY), path, fastdit.DiffusionScheduler(1000), names)


def write_run(path):
    state = made(TOY).state_dict()
    tensors = {f"{kind}.{n}": t.clone() for kind in ("model", "ema") for n, t in state.items()}
    header = {"step": 3, "config": TOY.to_dict(), "recipe": {"T": 50, "schedule": "cosine"}}
    write_tensors(path, tensors, header)


def write_training(path):
    """As published training code writes it, with objects beside the weights."""
    raw = {f"module.{n}": t for n, t in to_facebook(made(PUBLISHED).state_dict()).items()}
    beside = {"args": argparse.Namespace(num_classes=3), "path": pathlib.Path("/data")}
    torch.save({"model": raw, "ema": to_facebook(made(PUBLISHED).state_dict()), **beside}, path)


def write_legacy(path):
    state = to_facebook(made(PUBLISHED).state_dict())
    torch.save(state, path, _use_new_zipfile_serialization=False)


def write_safetensors(path):
    save_file(to_facebook(made(PUBLISHED).state_dict()), path)


LAYOUTS = {
    "own": (write_own, {}),
    "run": (write_run, {}),
    "bare": (lambda path: torch.save(made(TOY).state_dict(), path), {}),
    "whole module": (lambda path: torch.save(made(TOY), path), {}),
    "training": (write_training, ANSWERS),
    "legacy": (write_legacy, ANSWERS),
    "safetensors": (
        lambda path: save_file(to_facebook(made(PUBLISHED).state_dict()), path),
        ANSWERS,
    ),
}


def damaged(content, r):
    """Cut, flip, overwrite, delete or insert some bytes, most often near the start."""
    b = bytearray(content)
    kind, n = r.randrange(6), r.randrange(1, 64)
    at = r.randrange(min(len(b), r.choice([200, 3000, len(b)])))
    if kind == 0:
        return bytes(b[: r.randrange(len(b))])
    if kind == 1:
        for _ in range(n % 8 + 1):
            b[r.randrange(at, len(b))] ^= 1 << r.randrange(8)
    elif kind == 2:
        b[at : at + n] = r.randbytes(n)
    elif kind == 3:
        del b[at : at + n]
    elif kind == 4:
        other = r.randrange(len(b))
        b[at:at] = b[other : other + n]
    else:
        b[-1 - r.randrange(100)] ^= 1 << r.randrange(8)
    return bytes(b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_300_damaged_files_are_value_errors_or_right_loads(tmp_path, layout):
    write, answers = LAYOUTS[layout]
    path = tmp_path / "m"
    write(path)
    content, whole = path.read_bytes(), fastdit.load(path, **answers)
    loaded = 0
    for seed in range(300):
        path.write_bytes(damaged(content, random.Random(f"{layout} {seed}")))
        try:
            model = fastdit.load(path, **answers)
        except ValueError:
            continue
        loaded += 1
        # Only these layouts have checksums, of tensors or of records.
        if layout not in ("legacy", "safetensors"):
            pairs = zip(model.parameters(), whole.parameters(), strict=True)
            assert model.cfg == whole.cfg and all(torch.equal(a, b) for a, b in pairs), seed
    assert loaded < 200


def test_300_damaged_folders_of_diffusers(tmp_path):
    state = made(PUBLISHED).state_dict()
    positions = fastdit.DiT.from_config(PUBLISHED).state_dict()["pos_embed"]
    cfg = replace(PUBLISHED, ln_eps=1e-6, mlp_ln_eps=1e-5, t_freq_shift=1)
    config, tensors = to_diffusers(cfg, {**state, "pos_embed": positions})
    files = {"config.json": json.dumps(config).encode()}
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    name = "diffusion_pytorch_model.safetensors"
    files[name] = (tmp_path / name).read_bytes()
    for seed in range(300):
        r = random.Random(f"folder {seed}")
        chosen = r.choice(list(files))
        for file, content in files.items():
            (tmp_path / file).write_bytes(damaged(content, r) if file == chosen else content)
        try:
            fastdit.load(tmp_path)
        except ValueError:
            continue
