"""Recipes: their values, their learning rates and decays, and the values they refuse."""

import math
from dataclasses import asdict, fields, replace

import pytest

from fastdit import DiffusionScheduler
from fastdit.flow import FlowMatching
from fastdit.train.flows import FlowTraining
from fastdit.train.recipe import FLOW_RECIPES, RECIPES, SHOWINGS, Recipe


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
    process = recipe.process()
    assert isinstance(process, FlowMatching) == (name in FLOW_RECIPES)
    timesteps = showing.solver.table(process, showing.steps).timesteps
    assert len(timesteps) == (showing.steps or recipe.T)
    assert showing.guidance is None or recipe.label_dropout > 0, "guidance needs a trained null"


def test_the_flows_recipes_are_the_published_ones():
    """SiT's and LightningDiT's own settings; the toy has the budget of "sharp"."""
    sit = dict(lr=1e-4, batch_size=256, steps=400_000, ema=0.9999, label_dropout=0.1, clip=None)
    sit |= dict(lr_schedule="constant", weight_decay=0, beta2=0.999, time_draw="uniform")
    assert sit.items() <= asdict(RECIPES["sit"]).items()
    own = dict(lr=2e-4, batch_size=1024, steps=80_000, beta2=0.95, ema=0.9999, label_dropout=0.1)
    own |= dict(lr_schedule="constant", weight_decay=0, clip=None, direction_loss=1.0)
    own |= dict(time_draw="logit-normal", time_mean=0, time_deviation=1, time_shift=1)
    assert own.items() <= asdict(RECIPES["lightning"]).items()
    for name in ("sit", "lightning"):
        assert RECIPES[name].process() == FlowMatching("linear", "velocity", 1, 1.0)
    budget = [(r.steps, r.batch_size) for r in (RECIPES["flow"], RECIPES["sharp"])]
    assert budget[0] == budget[1]
    assert SHOWINGS["flow"].steps == 25


def test_a_recipe_says_what_it_trains_and_how():
    recipe = replace(
        RECIPES["flow"], path="gvp", prediction="sample", clean_at=0, time_scale=9, noise_scale=2.0
    )
    assert recipe.process() == FlowMatching("gvp", "sample", 0, 9.0, 2.0)
    drawn = replace(recipe, time_draw="logit-normal", time_mean=-1, time_shift=3.0)
    assert drawn.flow_training() == FlowTraining("logit-normal", -1, 1.0, 3.0, 0.0)
    scheduler = Recipe(T=30, schedule="cosine").process()
    assert isinstance(scheduler, DiffusionScheduler)
    assert scheduler.options == {"T": 30, "schedule": "cosine", "prediction": "epsilon"}


def test_recipes_of_earlier_releases_are_read_with_the_values_of_their_time():
    """Release 0.1.0 had the fields up to name, all of which its files hold."""
    names = [field.name for field in fields(Recipe)]
    then = names[: names.index("name") + 1]
    header = {name: value for name, value in asdict(RECIPES["sharp"]).items() if name in then}
    assert Recipe.from_saved(header) == RECIPES["sharp"]
    assert Recipe.from_saved(asdict(RECIPES["flow"])) == RECIPES["flow"]
    with pytest.raises(ValueError, match="expected every option, lr missing"):
        Recipe.from_saved({name: value for name, value in header.items() if name != "lr"})
    with pytest.raises(ValueError, match="Recipe: expected a dict of options, got 3"):
        Recipe.from_saved(3)


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


FLOW = {"path": "linear", "prediction": "velocity", "name": "flow"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected an integer from 1 to 2,147,483,647, got 0"),
        ({"steps": 2.5}, "steps: expected an integer from 1 to 2,147,483,647, got 2.5"),
        ({"batch_size": 10**400}, "batch_size: expected an integer from 1"),
        ({"batch_size": True}, "batch_size: expected an integer from 1"),
        ({"lr": True}, "lr: expected a positive number, got True"),
        ({"lr": "x"}, "lr: expected a positive number, got 'x'"),
        ({"lr": 10**400}, "lr: expected a positive number, got 1000"),
        (FLOW | {"time_mean": 10**400}, "time_mean: expected a number, got 1000"),
        ({"lr": 0.0}, "lr: expected a positive number, got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay: expected at least 0, got -1.0"),
        ({"clip": float("nan")}, "clip: expected a positive number, or None, got nan"),
        ({"ema": 1.0}, "ema: expected a number between 0 and 1, or None, got 1.0"),
        ({"label_dropout": 1}, "label_dropout: expected a share below 1, got 1"),
        ({"lr_schedule": "cosin"}, "got 'cosin'; did you mean 'cosine'?"),
        ({"schedule": "linaer"}, "got 'linaer'; did you mean 'linear'?"),
        ({"schedule": ["a"]}, "schedule: expected one of linear, linear-scaled, cosine; got ['a']"),
        ({"name": "sharpest"}, "name: expected one of seed, sharp, dit, sit, lightning, flow; got"),
        ({"warmup": 750}, "warmup: expected fewer than steps=750, got 750"),
        ({"warmup": -1}, "warmup: expected an integer from 0"),
        ({"seed": -1}, "seed: expected an integer from 0 to 9,223,372,036,854,775,807, got -1"),
        ({"steps": 2**30, "batch_size": 8}, "steps: expected at most 2^32 samples in all"),
        ({"epochs": 3}, "expected one of steps"),
        ({"beta2": 1}, "beta2: expected a number between 0 and 1, got 1"),
        (
            {"path": "linear"},
            "path: expected None, since 'seed' trains a diffusion, got 'linear'; ",
        ),
        ({"name": "flow"}, "path: expected one, since 'flow' trains a flow, got None"),
        (FLOW | {"path": "liner"}, "path: expected one of linear, gvp, vp; got 'liner'; did you"),
        (
            FLOW | {"T": 100},
            "T: expected the default 200, since 'flow' trains a flow, whose time is continuous",
        ),
        (FLOW | {"schedule": "cosine"}, "schedule: expected the default 'linear', since 'flow'"),
        ({"time_shift": 2.0}, "time_shift: expected the default 1.0, since 'seed' trains a"),
        (
            {"prediction": "sample"},
            "prediction: expected the default 'epsilon', since 'seed' train",
        ),
        (FLOW | {"prediction": "noise"}, "prediction: expected one of velocity, epsilon, sample,"),
        (FLOW | {"clean_at": 2}, "clean_at: expected the model's time at the data, 1 or 0, got 2"),
        (FLOW | {"min_noise": 0.1}, "min_noise: expected None unless path is 'linear' and predic"),
        (FLOW | {"time_draw": "normal"}, "time_draw: expected one of uniform, logit-normal; got"),
        (FLOW | {"time_mean": math.inf}, "time_mean: expected a number, got inf"),
        (FLOW | {"time_deviation": 0}, "time_deviation: expected a positive number, got 0"),
        (FLOW | {"time_shift": True}, "time_shift: expected a positive number, got True"),
        (FLOW | {"direction_loss": -1.0}, "direction_loss: expected at least 0, got -1.0"),
        (
            FLOW | {"direction_loss": 1.0, "prediction": "epsilon"},
            "direction_loss: expected 0 unless prediction='velocity', got 1.0",
        ),
        ({"align_weight": -1}, "align_weight: expected at least 0, got -1"),
        ({"align_depth": 0}, "align_depth: expected an integer from 1"),
        ({"align_width": 0.5}, "align_width: expected an integer from 1"),
    ],
)
def test_bad_recipes_are_value_errors(options, message):
    with pytest.raises(ValueError) as error:
        Recipe.from_dict(options)
    assert message in str(error.value)
