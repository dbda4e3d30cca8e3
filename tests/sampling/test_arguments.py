"""What is no label, seed, state or solver is a ValueError that names the argument."""

import numpy as np
import pytest
import torch

import fastdit
from fastdit import DiffusionScheduler, DiT, Sampler

SIZE = 4
META = {"device": "meta"}


def make_sampler(**options):
    model = DiT(img_size=SIZE, hidden=8, n_layers=1, n_heads=2)
    return Sampler(model, DiffusionScheduler(4), steps=1, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("labels", torch.tensor([1, 2]).to_sparse()),
        ("labels", torch.zeros(2, dtype=torch.int64, **META)),
        ("seeds", torch.tensor(3)),
        ("seeds", np.array(3)),
        ("seeds", torch.zeros(1, dtype=torch.int64, **META)),
        ("x_T", 3),
        ("x_T", True),
        ("x_T", torch.tensor(1.0)),
        ("x_T", torch.zeros(1, 3, SIZE, SIZE, **META)),
        ("x_T", torch.zeros(1, 3, SIZE, SIZE).to_sparse()),
    ],
)
def test_arguments_of_a_call(name, value):
    sampler = make_sampler()
    if name == "labels":
        with pytest.raises(ValueError, match="labels: expected a non-empty list of integers"):
            sampler(value)
        return
    for labels in ([1], None):
        with pytest.raises(ValueError, match=f"({name}|labels): expected"):
            sampler(labels, **{name: value})


@pytest.mark.parametrize("value", [True, 5, torch.tensor(3), {1, 2}])
def test_a_shape_that_is_no_sequence(value):
    with pytest.raises(ValueError, match="sample_shape: expected three positive integers, got"):
        make_sampler(sample_shape=value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((None, DiffusionScheduler(4)), "model: expected a Module, got NoneType"),
        ((torch.sin, DiffusionScheduler(4)), "model: expected a Module, got builtin"),
        (
            (DiT(n_layers=1), 50),
            "scheduler: expected a DiffusionScheduler or a FlowMatching, got int",
        ),
        ((DiT(n_layers=1), DiffusionScheduler(4), ["ddim"]), "solver: expected one of"),
    ],
)
def test_arguments_of_a_sampler(args, message):
    with pytest.raises(ValueError, match=message):
        fastdit.Sampler(*args)
