"""Runs that go on with other steps, rates, batch sizes or data, and what stays refused."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

from fastdit import DiTConfig
from fastdit.checkpoints.native import read_tensors, write_tensors
from fastdit.diffusion import TerminalSNRWarning
from fastdit.train.changes import Numbering, describe
from fastdit.train.loading import BatchLoader, ShuffledOrder
from fastdit.train.recipe import Recipe
from fastdit.train.run_folder import RunFolder, read
from fastdit.train.runtime import Runtime
from fastdit.train.sources import Shapes
from fastdit.train.trainer import Trainer

CONFIG = DiTConfig(hidden=8, n_layers=1, n_heads=2)
NULL = replace(CONFIG, null_class=True)
RECIPE = Recipe(steps=4, batch_size=8, schedule="cosine")


def run(out=None, recipe=RECIPE, config=CONFIG, source=None):
    trainer = Trainer(config, recipe, source or Shapes(2), out)
    return trainer, trainer.run()


def resume(out, changes=None, **options):
    return Trainer.resume(RunFolder(out).newest(), out, changes=changes, **options)


def header(out):
    return RunFolder(out).newest().header


def same_weights(a, b):
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def numbers(trainer):
    """Record the numbers of the samples of every step that a trainer takes."""
    seen, load = [], trainer.loader.load

    def recorded(*arguments):
        batch, given = load(*arguments)
        seen.append(given.tolist())
        return batch, given

    trainer.loader.load = recorded
    return seen


def test_a_finished_run_goes_on_as_a_longer_one_at_a_constant_rate(tmp_path):
    """Nothing but the end of the rate's schedule tells a longer run from a shorter one."""
    flat = replace(RECIPE, lr_schedule="constant")
    whole, expected = run(recipe=replace(flat, steps=7))
    run(tmp_path, flat)
    longer = resume(tmp_path, {"steps": 7})
    assert longer.step == 4
    assert torch.equal(longer.run().losses, expected.losses)
    assert same_weights(longer, whole)
    assert header(tmp_path)["changes"] == [{"step": 4, "sample": 32, "steps": [4, 7]}]


def test_the_signal_at_the_end_is_warned_of_only_where_steps_are_taken(tmp_path):
    with pytest.warns(TerminalSNRWarning):
        run(tmp_path, replace(RECIPE, schedule="linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", TerminalSNRWarning)
        assert resume(tmp_path).run().finished
    with pytest.warns(TerminalSNRWarning):
        resume(tmp_path, {"steps": 5}).run()


def test_a_longer_cosine_is_that_of_the_new_total(tmp_path):
    run(tmp_path)
    longer = resume(tmp_path, {"steps": 8})
    longer.train_step()
    assert longer.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * RECIPE.lr)
    assert header(tmp_path)["step"] == 4


def test_a_change_is_saved_before_it_takes_effect_and_survives(tmp_path):
    """A run that is killed right after the change goes on with it without being told again."""
    run(tmp_path)
    changed = resume(tmp_path, {"steps": 6, "lr": 1e-4})
    changed.request_stop()
    assert not changed.run().finished
    entry = {"step": 4, "sample": 32, "steps": [4, 6], "lr": [5e-4, 1e-4]}
    assert header(tmp_path)["changes"] == [entry]
    plain = resume(tmp_path)
    assert plain.step == 4 and plain.recipe == replace(RECIPE, steps=6, lr=1e-4)
    plain.run()
    again = resume(tmp_path, {"steps": 8, "batch_size": 16})
    again.run()
    assert header(tmp_path)["changes"] == [
        entry,
        {"step": 6, "sample": 48, "steps": [6, 8], "batch_size": [8, 16]},
    ]
    assert describe(entry) == "from step 4 on: steps 4 -> 6, lr 0.0005 -> 0.0001"


def test_other_data_are_described_by_what_tells_them_from_the_former_ones():
    sets = [{"kind": "latents", "folder": "/data", "digest": 16 * d} for d in "ab"]
    before, after = (f"latents (folder /data, digest {8 * d})" for d in "ab")
    said = describe({"step": 3, "sample": 24, "data": sets})
    assert said == f"from step 3 on: data {before} -> {after}"
    assert describe({"step": 3, "sample": 24, "data": [{"kind": "own"}, {"mine": 1}]}) == (
        "from step 3 on: data own -> a set (mine 1)"
    )


def test_options_that_do_not_differ_are_no_change(tmp_path):
    run(tmp_path)
    before = RunFolder(tmp_path).checkpoints()[-1][1].read_bytes()
    same = resume(tmp_path, {"steps": 4, "lr": 5e-4, "T": 200}, source=Shapes(2), new_data=True)
    assert same.run().finished and same.changes == []
    assert RunFolder(tmp_path).checkpoints()[-1][1].read_bytes() == before


def test_samples_stay_numbered_without_gap_or_repetition_where_the_batch_changes(tmp_path):
    run(tmp_path)  # samples 0 to 31
    changed = resume(tmp_path, {"steps": 6, "batch_size": 12})
    seen = numbers(changed)
    changed.run()
    changed = resume(tmp_path, {"steps": 8, "batch_size": 4})
    seen += numbers(changed)
    taken = numbers(changed)
    changed.run()
    assert [n for step in (*seen, *taken) for n in step] == list(range(32, 64))
    plain = resume(tmp_path)
    assert plain.numbering == Numbering(4, 6, 56) and plain.numbering.first(8) == 64


def test_resuming_after_a_change_has_the_bits_of_the_changed_run(tmp_path):
    ours = Trainer(NULL, replace(RECIPE, ema=0.9), Shapes(2), tmp_path)
    ours.train_step()
    ours.save()
    changes = {"steps": 6, "batch_size": 6, "lr": 1e-3, "label_dropout": 0.5, "weight_decay": 0.1}
    changes |= {"clip": None, "ema": 0.5, "warmup": 2, "lr_schedule": "constant"}
    whole = resume(tmp_path, changes)
    whole.train_step()
    whole.train_step()
    whole.save()
    whole.run()
    for path in [path for at, path in RunFolder(tmp_path).checkpoints() if at == 6]:
        path.unlink()
    resumed = resume(tmp_path)
    assert resumed.step == 3
    assert torch.equal(resumed.run().losses, whole.history[0])
    ours, theirs = (t._tensors() for t in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_new_data_begin_with_a_whole_pass_in_a_new_order(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="data: the run was started on .*; to go on with other"):
        resume(tmp_path, {"steps": 12}, source=Shapes(3))
    changed = resume(tmp_path, {"steps": 12}, source=Shapes(3), new_data=True)
    rows = []
    take = changed.source.take
    changed.source.take = lambda asked: (rows.extend(asked.tolist()), take(asked))[1]
    changed.run()
    assert sorted(rows[:48]) == list(range(48)), "48 images, each once"
    assert rows[:48] != ShuffledOrder(48, 0).rows(0, 48).tolist()
    (change,) = header(tmp_path)["changes"]
    assert [identity["per_class"] for identity in change["data"]] == [2, 3]
    assert len(resume(tmp_path).source) == 48, "later it is opened from there"
    assert resume(tmp_path).numbering == Numbering(8, 4, 32, 32)


@pytest.mark.parametrize("size", [5, 12])
def test_a_loader_numbers_and_orders_samples_as_told(size):
    recipe, source = Recipe(steps=9, batch_size=4), Shapes(1)
    numbering = Numbering(4, 6, 100, 60)
    loader = BatchLoader(source, recipe, Runtime(), numbering=numbering)
    images, given = loader.load(8)
    rows = ShuffledOrder(16, 0, 60).rows(108, 4)
    assert given.tolist() == [108, 109, 110, 111]
    assert torch.equal(images.labels, source.labels[rows])


def test_an_average_may_begin_later(tmp_path):
    run(tmp_path)
    changed = resume(tmp_path, {"steps": 6, "ema": 0.25})
    at_the_change = {n: p.detach().clone() for n, p in changed.model.named_parameters()}
    assert all(torch.equal(changed.ema.averages[n], p) for n, p in at_the_change.items())
    changed.train_step()
    for name, p in changed.model.named_parameters():
        expected = 0.25 * at_the_change[name] + 0.75 * p.detach()
        torch.testing.assert_close(changed.ema.averages[name], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"T": 100}, "T: the run was started with 200, got 100; its weights have learned"),
        ({"schedule": "linear"}, "schedule: the run was started with cosine, got linear; its wei"),
        ({"seed": 1}, "seed: the run was started with 0, got 1; the order of its images"),
        ({"name": "dit"}, "name: the run was started with seed, got dit; change single options"),
        ({"label_dropout": 0.1}, "label_dropout: expected 0, got 0.1; the run's model has no null"),
        ({"steps": 4}, None),
        ({"steps": 3}, "steps: expected more than the 4 that the run has taken, got 3"),
        ({"lr": 1.0}, "steps: expected more than the 4 that the run has taken, got 4"),
        ({"steps": 9, "warmup": 9}, "warmup: expected fewer than steps=9, got 9"),
        ({"steps": 2**31 - 1, "batch_size": 2}, "expected at most 2^32 samples in all, got 4,294"),
        ({"step": 5}, "changes: expected one of steps, batch_size"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_with_the_reason(tmp_path, changes, message):
    run(tmp_path)
    if message is None:
        assert resume(tmp_path, changes).changes == []
        return
    with pytest.raises(ValueError) as error:
        resume(tmp_path, changes)
    assert message in str(error.value)


def test_an_average_is_not_thrown_away(tmp_path):
    run(tmp_path, replace(RECIPE, ema=0.9))
    with pytest.raises(ValueError, match="ema: expected a decay, .*; the run's averaged weights"):
        resume(tmp_path, {"steps": 9, "ema": None})


def test_new_data_have_the_same_classes(tmp_path):
    run(tmp_path)
    other = Shapes(3)
    other.label_names = ("red ball", *other.label_names[1:])
    with pytest.raises(ValueError, match="expected class 0 to be 'red circle' as before, got 'red"):
        resume(tmp_path, {"steps": 9}, source=other, new_data=True)
    other.label_names = other.label_names[:-1]
    with pytest.raises(ValueError, match="expected 16 classes as before, got 15"):
        resume(tmp_path, {"steps": 9}, source=other, new_data=True)


@pytest.mark.parametrize(
    "changes",
    [
        3,
        [3],
        [{"step": 1}],
        [{"step": 1, "sample": -1}],
        [{"step": 9, "sample": 1}],
        [{"step": 1, "sample": 1, "lr": 3}],
    ],
    ids=str,
)
def test_a_tampered_list_of_changes_is_one_clear_error(tmp_path, changes):
    run(tmp_path)
    path = RunFolder(tmp_path).checkpoints()[-1][1]
    tensors, saved = read_tensors(path)
    tensors = {name: t.clone() for name, t in tensors.items()}
    write_tensors(path, tensors, saved | {"changes": changes})
    with pytest.raises(ValueError, match="expected a list of changes with step and sample"):
        resume(tmp_path)


def test_after_a_loss_that_is_not_finite_the_advice_works(tmp_path):
    ours = Trainer(CONFIG, replace(RECIPE, lr=1e30, clip=None), Shapes(2), tmp_path)
    with pytest.raises(FloatingPointError) as error:
        ours.run()
    path = RunFolder(tmp_path).checkpoints()[-1][1]
    assert f"fastdit train --resume {path} --out {tmp_path} --lr 5e+29 (" in str(error.value)
    assert "changes={'lr': 5e+29}" in str(error.value)
    changed = Trainer.resume(read(path), tmp_path, changes={"lr": 1e-4})
    assert changed.run().finished
    assert json.loads(json.dumps(header(tmp_path)["changes"])) == [
        {"step": 0, "sample": 0, "lr": [1e30, 1e-4]}
    ]
