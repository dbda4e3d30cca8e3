"""Guidance of a sampler: its null rows, its interval, and what it needs."""

from dataclasses import replace

import pytest

import fastdit
from fastdit import PRESETS, DiffusionScheduler, Guidance, Sampler, reference
from fastdit.testing import randomize, relative_error

STEPS = 12
PUBLISHED = replace(
    PRESETS["DiT-S/4"], img_size=16, hidden=32, n_layers=2, n_heads=2, num_classes=10
)


def make_model(cfg):
    model = fastdit.DiT.from_config(cfg)
    randomize(model)
    return model


def make_scheduler():
    return DiffusionScheduler(STEPS, schedule="cosine")


def test_null_rows_are_not_computed_outside_the_interval():
    model = make_model(PUBLISHED)
    rows = []
    denoise = model.denoise
    model.denoise = lambda tokens, m: rows.append(len(tokens)) or denoise(tokens, m)
    guidance = Guidance(2.0, interval=(3, 8))
    Sampler(model, make_scheduler(), guidance=guidance)([1, 2, 3])
    assert rows == [6 if 3 <= t < 8 else 3 for t in reversed(range(STEPS))]


def test_guidance_at_scale_one_is_no_guidance():
    model, scheduler = make_model(PUBLISHED), make_scheduler()
    guided = Sampler(model, scheduler, guidance=Guidance(1.0))([1, 2])
    assert relative_error(guided, Sampler(model, scheduler)([1, 2])) < 1e-5


def test_guidance_of_the_reference_model_gives_the_same_images():
    """The reference model is called as it is, with the null rows after the conditional ones."""
    plain = reference.DiT.from_config(PUBLISHED)
    randomize(plain)
    guidance = Guidance(3.0, interval=(3, 8), channels=3)
    by_call = Sampler(plain, make_scheduler(), guidance=guidance)([1, 2], seed=5)
    hoisted = Sampler(make_model(PUBLISHED), make_scheduler(), guidance=guidance)([1, 2], seed=5)
    assert relative_error(hoisted, by_call) < 1e-5


def test_guidance_needs_labels():
    sampler = Sampler(make_model(PUBLISHED), make_scheduler(), guidance=Guidance(2.0))
    with pytest.raises(ValueError, match="labels: guidance needs labels, got None"):
        sampler(None, seeds=[1])


def test_guidance_of_more_channels_than_the_model_has_is_an_error():
    with pytest.raises(ValueError, match="guidance.channels: expected at most the model's 4, got"):
        Sampler(make_model(PUBLISHED), make_scheduler(), guidance=Guidance(2.0, channels=5))
