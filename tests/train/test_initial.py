"""Runs that start from a trained model's weights."""

from dataclasses import replace

import pytest
import torch

import fastdit
from fastdit import DiTConfig
from fastdit.testing import randomize
from fastdit.train.recipe import Recipe
from fastdit.train.run_folder import RunFolder
from fastdit.train.sources import Shapes
from fastdit.train.trainer import Trainer

CONFIG = DiTConfig(hidden=8, n_layers=1, n_heads=2)
RECIPE = Recipe(steps=2, batch_size=8, schedule="cosine", ema=0.9)


def trained(dtype=torch.float32, config=CONFIG):
    model = fastdit.DiT.from_config(config)
    randomize(model)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, pos_embed="sincos")], ids=["", "fixed"])
def test_weights_and_average_start_from_the_model_in_float32(dtype, config):
    initial = trained(dtype, config)
    torch.set_default_dtype(torch.bfloat16)
    try:
        ours = Trainer(config, RECIPE, Shapes(1), initial=initial)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, t in ours.model.state_dict().items():
        assert t.dtype == torch.float32 and torch.equal(t, initial.state_dict()[name].float())
    assert all(
        torch.equal(t, initial.get_parameter(n).float()) for n, t in ours.ema.averages.items()
    )
    assert ours.model.pos_embed.requires_grad == (config is CONFIG)
    before = {n: p.clone() for n, p in initial.named_parameters()}
    assert ours.run().finished
    assert all(torch.equal(p, before[n]) for n, p in initial.named_parameters()), (
        "a copy is trained"
    )


def test_the_origin_is_recorded_and_survives_a_resume_without_the_model(tmp_path):
    initial = trained()
    ours = Trainer(CONFIG, RECIPE, Shapes(1), tmp_path, initial=initial)
    ours.origin["path"] = "somewhere"
    ours.train_step()
    ours.save()
    resumed = Trainer.resume(RunFolder(tmp_path).newest(), tmp_path)
    resumed.run()
    origin = RunFolder(tmp_path).newest().header["origin"]
    assert origin == {"digest": ours.origin["digest"], "path": "somewhere"}
    models = initial, trained(torch.bfloat16)
    same, other = (Trainer(CONFIG, RECIPE, Shapes(1), initial=model) for model in models)
    assert same.origin["digest"] == origin["digest"] != other.origin["digest"]
    assert Trainer(CONFIG, RECIPE, Shapes(1)).origin is None


@pytest.mark.parametrize(
    ("initial", "message"),
    [
        (torch.nn.Linear(2, 2), "initial: expected a fastdit.DiT, got Linear"),
        (trained(config=replace(CONFIG, hidden=16)), "initial: expected a model of DiTConfig"),
    ],
    ids=["other", "config"],
)
def test_another_model_is_refused(initial, message):
    with pytest.raises(ValueError, match=message):
        Trainer(CONFIG, RECIPE, Shapes(1), initial=initial)
