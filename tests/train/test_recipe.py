"""Recipes: their values, their learning rates and decays, and the values they refuse."""

import math
from dataclasses import asdict, replace

import pytest

from fastdit import DiffusionScheduler
from fastdit.train.recipe import RECIPES, SHOWINGS, Recipe


def test_the_default_is_the_toys_published_recipe():
    assert RECIPES["seed"] == Recipe()
    published = dict(batch_size=128, lr=5e-4, weight_decay=0, clip=1.0, T=200, schedule="linear")
    assert published.items() <= asdict(Recipe()).items()
    assert Recipe().steps * Recipe().batch_size == 30 * 3200
    assert Recipe().ema is None and Recipe().label_dropout == 0 and Recipe().warmup == 0


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_its_name_and_a_way_to_show_it(name):
    recipe, showing = RECIPES[name], SHOWINGS[name]
    assert recipe.name == name
    scheduler = DiffusionScheduler(recipe.T, schedule=recipe.schedule)
    assert showing.solver.spacing(recipe.T, showing.steps or recipe.T)[0] == 0
    assert scheduler.T == recipe.T
    assert showing.guidance is None or recipe.label_dropout > 0, "guidance needs a trained null"


def test_the_rate_rises_then_follows_its_schedule():
    recipe = Recipe(steps=100, lr=0.5, warmup=10)
    rates = [recipe.lr_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    assert rates[10] == 0.5 and rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.25) and 0 < rates[99] < 2e-4
    flat = replace(recipe, lr_schedule="constant")
    assert [flat.lr_at(step) for step in (4, 10, 99)] == [0.25, 0.5, 0.5]


def test_without_warm_up_the_rate_is_the_published_cosine():
    recipe = Recipe()
    assert [recipe.lr_at(k) for k in range(750)] == pytest.approx(
        [0.5 * 5e-4 * (1 + math.cos(math.pi * k / 750)) for k in range(750)]
    )


def test_the_averages_decay_rises_to_its_value():
    recipe = Recipe(ema=0.99)
    decays = [recipe.ema_at(step) for step in range(2000)]
    assert decays[0] == 0.1 and decays == sorted(decays)
    assert decays[100] == 101 / 110 and decays[1999] == 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected an integer from 1 to 2,147,483,647, got 0"),
        ({"steps": 2.5}, "steps: expected an integer from 1 to 2,147,483,647, got 2.5"),
        ({"batch_size": 10**400}, "batch_size: expected an integer from 1"),
        ({"batch_size": True}, "batch_size: expected an integer from 1"),
        ({"lr": True}, "lr: expected a positive number, got True"),
        ({"lr": "x"}, "lr: expected a positive number, got 'x'"),
        ({"lr": 0.0}, "lr: expected a positive number, got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay: expected at least 0, got -1.0"),
        ({"clip": float("nan")}, "clip: expected a positive number, or None, got nan"),
        ({"ema": 1.0}, "ema: expected a number between 0 and 1, or None, got 1.0"),
        ({"label_dropout": 1}, "label_dropout: expected a share below 1, got 1"),
        ({"lr_schedule": "cosin"}, "got 'cosin'; did you mean 'cosine'?"),
        ({"schedule": "linaer"}, "got 'linaer'; did you mean 'linear'?"),
        ({"schedule": ["a"]}, "schedule: expected one of linear, linear-scaled, cosine; got ['a']"),
        ({"name": "sharpest"}, "name: expected one of seed, sharp, dit; got 'sharpest'"),
        ({"warmup": 750}, "warmup: expected fewer than steps=750, got 750"),
        ({"warmup": -1}, "warmup: expected an integer from 0"),
        ({"seed": -1}, "seed: expected an integer from 0 to 9,223,372,036,854,775,807, got -1"),
        ({"steps": 2**30, "batch_size": 8}, "steps: expected at most 2^32 samples in all"),
        ({"epochs": 3}, "expected one of steps"),
    ],
)
def test_bad_recipes_are_value_errors(options, message):
    with pytest.raises(ValueError) as error:
        Recipe.from_dict(options)
    assert message in str(error.value)
