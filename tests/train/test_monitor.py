"""What a run logs and shows."""

import json
import sys
import types

import numpy as np
import pytest

import fastdit
from fastdit import DiffusionScheduler
from fastdit.train import monitor, samples
from fastdit.train.recipe import SHOWINGS, Recipe
from fastdit.train.run_folder import RunFolder
from fastdit.train.sources import Shapes
from fastdit.train.trainer import Trainer


def test_samples_that_the_solver_cannot_make_are_refused_before_training():
    with pytest.raises(ValueError, match="steps: no stride takes 50 of 60"):
        scheduler = DiffusionScheduler(60, schedule="cosine")
        samples.shapes_sampler(fastdit.DiTConfig(), scheduler, SHOWINGS["dit"])


def test_tensorboard_gets_the_metrics_where_it_is_installed(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monkeypatch.setattr(monitor.importlib.util, "find_spec", lambda name: True)
    own = monitor.Monitor(RunFolder(tmp_path))
    own.begin(4, 10)
    own.log(5, {"loss": 0.5})
    own.end()
    assert written == [(str(tmp_path / "tensorboard"), 5), ("loss", 0.5, 5), "closed"]


def test_metrics_are_plain_json(tmp_path):
    own = monitor.Monitor(RunFolder(tmp_path / "new" / "run"))
    own.begin(0, 1)
    own.log(1, {"loss": float(np.float32(0.25))})
    own.end()
    assert json.loads((tmp_path / "new" / "run" / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss": 0.25,
    }


def test_a_model_without_classes_is_trained_and_shown(tmp_path):
    config = fastdit.DiTConfig(hidden=16, n_layers=1, n_heads=1, use_class_cond=False)
    recipe = Recipe(steps=2, batch_size=8, T=25, schedule="cosine")
    trainer = Trainer(config, recipe, Shapes(1), tmp_path)
    sample = samples.shapes_sampler(config, trainer.scheduler, SHOWINGS["sharp"], per_class=4)
    shows = monitor.Monitor(trainer.folder, sample=sample)
    trainer.run(shows)
    assert shows.grid.exists() and shows.shown.measured == {}
    assert fastdit.checkpoints.inspect(tmp_path / "model.safetensors").labels is None
