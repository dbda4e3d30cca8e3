"""Files of release 0.1.0 load, and their models compute what they computed then."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, Guidance, Sampler
from fastdit.checkpoints import inspect
from fastdit.data import LABEL_NAMES
from fastdit.testing import relative_error

FOLDER = Path(__file__).parents[1] / "golden" / "release-0.1.0"
CONFIG = DiTConfig(patch_size=8, hidden=8, n_layers=2, n_heads=2, null_class=True)
DIFFUSION = {"T": 12, "schedule": "cosine", "prediction": "epsilon"}


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("model.safetensors", tuple(f"class {i}" for i in range(16))),
        ("run/model.safetensors", LABEL_NAMES),
    ],
    ids=["saved", "trained"],
)
def test_config_diffusion_and_labels_are_as_written(name, labels):
    info = inspect(FOLDER / name)
    assert info.config == CONFIG
    assert info.diffusion == DIFFUSION
    assert info.labels == tuple(labels)
    assert fastdit.load(FOLDER / name).cfg == CONFIG


@torch.no_grad()
def test_output_and_images_are_reproduced():
    expected = load_file(FOLDER / "expected.safetensors")
    model = fastdit.load(FOLDER / "model.safetensors")
    out = model(expected["x"], expected["t"], expected["y"])
    assert relative_error(out, expected["out"]) < 1e-5
    sampler = Sampler(
        model, DiffusionScheduler(**DIFFUSION), guidance=Guidance(2.0), execution="eager"
    )
    assert relative_error(sampler([1, 9], seed=5), expected["images"]) < 1e-5
