"""Guidance within an interval: timesteps of a diffusion, or times of a flow."""

import math

import numpy as np
import pytest
import torch

from fastdit import DiffusionScheduler, DiT, FlowMatching, Guidance, Sampler


@pytest.mark.parametrize(
    ("process", "interval", "message"),
    [
        (
            FlowMatching(),
            (0, 800),
            "guidance.interval: expected times from 0 to 1, since the model's process is a Flow",
        ),
        (
            DiffusionScheduler(50),
            (0.1, 0.9),
            "guidance.interval: expected integers, since the model's process is a DiffusionSche",
        ),
    ],
)
def test_an_interval_must_be_of_the_kind_of_the_process(process, interval, message):
    model = DiT(hidden=8, n_layers=1, n_heads=1, null_class=True)
    with pytest.raises(ValueError) as error:
        Sampler(model, process, guidance=Guidance(2.0, interval=interval))
    assert message in str(error.value)


def test_an_interval_of_times_contains_both_ends():
    guidance = Guidance(2.0, interval=(0.125, 1))
    assert guidance.interval == (0.125, 1.0)
    assert [guidance.active(t) for t in (0.124, 0.125, 0.5, 1.0)] == [False, True, True, True]
    assert Guidance(2.0, interval=(0, 1)).active(1.0) and not Guidance(2.0, (0, 1)).active(1)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ((0, 1), (0, 1)),
        ((0.0, 1.0), (0.0, 1.0)),
        ((0.125, 1), (0.125, 1.0)),
        ((np.float32(0.25), torch.tensor(0.5)), (0.25, 0.5)),
        ((np.int64(3), torch.tensor(8)), (3, 8)),
    ],
)
def test_an_interval_keeps_integers_and_fractions_apart(given, kept):
    interval = Guidance(2.0, interval=given).interval
    assert interval == kept and [type(t) for t in interval] == [type(t) for t in kept]


@pytest.mark.parametrize(
    "interval", [(0.0, 800.0), (0.7, 0.2), (-0.1, 0.5), (0.5,), (0.1, 0.2, 0.3), (math.nan, 1)]
)
def test_a_bad_interval_of_times_is_an_error(interval):
    with pytest.raises(ValueError, match="interval: expected times 0 <= low < high <= 1 of a Flow"):
        Guidance(2.0, interval=interval)
