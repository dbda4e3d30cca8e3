"""Fixtures that the tests of the commands share."""

import pytest
from typer.testing import CliRunner

import fastdit
from fastdit import DiffusionScheduler, DiTConfig
from fastdit.cli.app import app
from fastdit.data.shapes import LABEL_NAMES
from fastdit.testing import randomize


@pytest.fixture
def run():
    """Call the command line in this process."""

    def call(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return call


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny conditional model with its diffusion and its class names."""
    model = fastdit.DiT.from_config(DiTConfig(hidden=16, n_layers=1, n_heads=1))
    randomize(model)
    path = tmp_path / "m.safetensors"
    fastdit.save(model, path, DiffusionScheduler(5, schedule="cosine"), LABEL_NAMES)
    return path
