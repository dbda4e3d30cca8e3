"""What a run writes to its folder, and how it resumes after a stop, a kill or a new release."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastdit
from fastdit import DiffusionScheduler, DiTConfig
from fastdit.checkpoints.native import read_tensors, write_tensors
from fastdit.checkpoints.runs import WEIGHTS_FILE
from fastdit.data.shapes import LABEL_NAMES
from fastdit.train.monitor import Monitor
from fastdit.train.recipe import Recipe
from fastdit.train.run_folder import RunFolder, read
from fastdit.train.runtime import Runtime
from fastdit.train.sources import Shapes
from fastdit.train.trainer import Trainer

SMALL = DiTConfig(hidden=16, n_layers=1, n_heads=1)
NULL = replace(SMALL, null_class=True)
BRIEF = Recipe(steps=6, batch_size=24)
FULL = Recipe(steps=6, batch_size=24, warmup=2, ema=0.9, label_dropout=0.3, schedule="cosine")


def trainer(out=None, recipe=BRIEF, config=SMALL, runtime=None, **options):
    return Trainer(config, recipe, Shapes(4, recipe.seed), out, runtime, **options)


def resume(out, **options):
    return Trainer.resume(RunFolder(out).newest(), out, **options)


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def state_of(trained):
    return {name: t.clone() for name, t in trained._tensors().items()}


def test_files_are_whole_and_load(tmp_path):
    ours = trainer(tmp_path, FULL, NULL, save_every=2)
    ours.run()
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {
        WEIGHTS_FILE,
        ".lock",
        "checkpoints/step-00000004.safetensors",
        "checkpoints/step-00000006.safetensors",
    }
    loaded = fastdit.load(tmp_path / WEIGHTS_FILE)
    assert same_tensors(loaded.state_dict(), ours.sampling_model().state_dict())
    info = fastdit.checkpoints.inspect(tmp_path / WEIGHTS_FILE)
    assert (
        info.labels == LABEL_NAMES
        and info.diffusion == DiffusionScheduler(200, schedule="cosine").options
    )
    newest = tmp_path / "checkpoints" / "step-00000006.safetensors"
    assert same_tensors(fastdit.load(newest).state_dict(), loaded.state_dict())
    raw = fastdit.load(tmp_path, weights="model")
    assert same_tensors(raw.state_dict(), ours.model.state_dict())
    assert fastdit.checkpoints.inspect(newest) == info


@pytest.mark.parametrize("recipe", [BRIEF, FULL], ids=["plain", "everything"])
@pytest.mark.parametrize("stop", [0, 1, 3, 6])
def test_resume_from_any_step_has_the_bits_of_one_run(tmp_path, stop, recipe):
    config = NULL if recipe is FULL else SMALL
    whole = trainer(recipe=recipe, config=config)
    losses = whole.run().losses
    first = trainer(tmp_path, recipe, config)
    for _ in range(stop):
        first.train_step()
    first.save()
    resumed = resume(tmp_path)
    assert resumed.step == stop
    result = resumed.run()
    assert same_tensors(state_of(resumed), state_of(whole))
    assert torch.equal(result.losses, losses)
    assert math.isnan(result.images_per_second) == (stop >= 5)


NURSERY = """
import os, random, signal, sys, threading, time
import torch._dynamo  # an optimizer imports it
from fastdit import DiTConfig
from fastdit.train.recipe import Recipe
from fastdit.train.run_folder import RunFolder
from fastdit.train.sources import Shapes
from fastdit.train import Trainer

class Doomed(Trainer):
    # Kills itself after `last` more steps, at a random moment of the next step or save.
    taken = 0

    def train_step(self):
        begin = time.monotonic()
        super().train_step()
        self.taken += 1
        if self.taken == last:
            left = random.uniform(0, 2) * (time.monotonic() - begin)
            threading.Timer(left, os.kill, (os.getpid(), signal.SIGKILL)).start()

def train(out):
    config = DiTConfig(hidden=16, n_layers=1, n_heads=1, null_class=True)
    recipe = Recipe(steps=100, batch_size=32, ema=0.9, label_dropout=0.1)
    saved = RunFolder(out).newest()
    if saved is None:
        trainer = Doomed(config, recipe, Shapes(16), out, save_every=1)
    else:
        trainer = Doomed.resume(saved, out, save_every=1)
    print(trainer.step, end=" ", flush=True)
    trainer.run()

for line in sys.stdin:
    out, last = line.split()[0], int(line.split()[1])
    child = os.fork()
    if child == 0:
        random.seed()
        train(out)
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
KILLS = 20


def test_a_run_killed_at_twenty_random_moments_always_resumes(tmp_path):
    """SIGKILL cannot be caught. Every step is saved, so that half of the kills hit a save.

    After each kill the newest whole checkpoint is no older than the one before. The finished run
    has the bits of one that was never killed. Each run is a process of its own, forked from one
    that has imported everything and has computed nothing.
    """
    command = [sys.executable, "-W", "ignore", "-c", NURSERY]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # threads wait long on a busy machine
    with subprocess.Popen(command, env=environment, **pipes) as nursery:

        def run(out, last):
            nursery.stdin.write(f"{out} {last}\n")
            step, code = nursery.stdout.readline().split()
            return int(code), int(step)

        assert run(tmp_path / "whole", -1) == (0, 0)
        folder, at = RunFolder(tmp_path / "killed"), 0
        for kill in range(KILLS):
            code, step = run(folder.path, 1 + kill % 2)
            assert code == -signal.SIGKILL
            assert step >= at, "no progress is lost"
            saved = folder.newest()
            assert saved is not None or kill == 0, "there is always a good checkpoint"
            at = saved.header["step"] if saved is not None else 0
        code, step = run(folder.path, -1)
    assert code == 0
    assert 0 < step < 100, "killed in the middle"
    for name in (WEIGHTS_FILE, "checkpoints/step-00000100.safetensors"):
        ours, theirs = (load_file(tmp_path / run / name) for run in ("killed", "whole"))
        assert same_tensors(ours, theirs), name


KILL_IN_A_SAVE = """
import os, signal, sys
from fastdit.data import files
from fastdit.train.run_folder import RunFolder
from fastdit.train import Trainer
out, kill_before, call = sys.argv[1], sys.argv[2], int(sys.argv[3])
trainer = Trainer.resume(RunFolder(out).newest(), out, keep=1)
trainer.train_step()
module = os if kill_before in ("replace", "unlink") else files
original, calls = getattr(module, kill_before), 0
def counted(*arguments, **named):
    global calls
    calls += 1
    if calls == call:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **named)
setattr(module, kill_before, counted)
trainer.save()
"""


@pytest.mark.parametrize(
    ("kill_before", "call", "step"),
    [("_sync", 1, 1), ("replace", 1, 1), ("_sync", 3, 2), ("replace", 2, 2), ("_sync", 4, 2)],
    ids=["aside", "unnamed", "weights-aside", "weights-unnamed", "weights-named"],
)
def test_a_kill_inside_a_save_leaves_whole_files(tmp_path, kill_before, call, step):
    """The kills hit each moment at which a temporary file exists, or only one file is new."""
    whole = trainer()
    whole.run()
    first = trainer(tmp_path)
    first.train_step()
    first.save()
    command = [sys.executable, "-W", "ignore", "-c", KILL_IN_A_SAVE, str(tmp_path), kill_before]
    done = subprocess.run([*command, str(call)])
    assert done.returncode == -signal.SIGKILL
    fastdit.load(tmp_path / WEIGHTS_FILE)
    resumed = resume(tmp_path)
    assert resumed.step == step
    resumed.run()
    assert same_tensors(state_of(resumed), state_of(whole))
    assert not [p for p in tmp_path.rglob("*") if ".tmp" in p.name], "temporary files are removed"


def test_a_stopped_run_saves_and_resumes_to_the_same_bits(tmp_path):
    whole = trainer(recipe=FULL, config=NULL)
    whole.run()
    first = trainer(tmp_path, FULL, NULL)

    class Stops(Monitor):
        def advance(self):
            super().advance()
            if first.step == 2:
                first.request_stop()

    result = first.run(Stops())
    assert not result.finished and first.step == 2
    resumed = resume(tmp_path)
    assert resumed.step == 2 and resumed.run().finished
    assert same_tensors(state_of(resumed), state_of(whole))


def test_a_stop_where_a_checkpoint_was_just_written_writes_no_second_one(tmp_path):
    ours = trainer(tmp_path, save_every=2)
    written = []
    write = ours.folder.write
    ours.folder.write = lambda step, *rest: (written.append(step), write(step, *rest))

    class Stops(Monitor):
        def advance(self):
            super().advance()
            if ours.step == 2:
                ours.request_stop()

    ours.run(Stops())
    assert written == [0, 2]


def test_a_changed_environment_is_warned_of(tmp_path):
    trainer(tmp_path).save()
    with pytest.warns(UserWarning, match="checkpointing: the run was saved under False, and goes"):
        resume(tmp_path, runtime=Runtime(checkpointing=True))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (WEIGHTS_FILE, "model.safetensors already exists; name another"),
        ("checkpoints/step-00000003.safetensors", "already holds a run; continue it .--resume au"),
    ],
)
def test_a_new_run_overwrites_nothing(tmp_path, file, message):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=message):
        trainer(tmp_path)
    assert (tmp_path / file).read_bytes() == b"precious"


def edit_header(path, **changes):
    tensors, header = read_tensors(path)
    tensors = {name: t.clone() for name, t in tensors.items()}
    write_tensors(path, tensors, header | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 7}, "expected a step in [0, 6], got 7"),
        ({"step": -1}, "expected a step in [0, 6], got -1"),
        ({"step": "3"}, "expected a step in [0, 6], got '3'"),
        ({"step": True}, "expected a step in [0, 6], got True"),
        ({"step": 5}, "the optimizer took {3} steps, the header says 5"),
        ({"recipe": {"steps": 2}}, "Recipe: expected every option, batch_size, lr"),
        ({"recipe": None}, "Recipe: expected a dict of options, got None"),
        ({"config": {}}, "DiTConfig: expected every option, img_size"),
        ({"data": {"kind": "movies"}}, "data: expected the identity of shapes, latents or images"),
        ({"data": None}, "data: expected the identity of shapes, latents or images, got None"),
        ({"data": {"kind": "shapes", "colour": 1}}, "data: expected the identity of shapes, lat"),
    ],
)
def test_a_tampered_checkpoint_is_one_clear_error(tmp_path, changes, message):
    ours = trainer(tmp_path)
    for _ in range(3):
        ours.train_step()
    ours.save()
    edit_header(RunFolder(tmp_path).checkpoints()[-1][1], **changes)
    with pytest.raises(ValueError) as error:
        resume(tmp_path)
    assert message in str(error.value)


def test_metrics_have_one_line_per_measurement_and_drop_those_after_the_checkpoint(tmp_path):
    """A run resumed at step 4 records steps 5 and 6 once, although it had measured them before."""
    first = trainer(tmp_path, save_every=4)
    first.run(Monitor(first.folder, log_every=1))
    (tmp_path / "checkpoints" / "step-00000006.safetensors").unlink()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # cut short by a kill
    before = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().split("\n")[:6]]
    again = resume(tmp_path)
    again.run(Monitor(again.folder, log_every=1))
    after = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in after] == [1, 2, 3, 4, 5, 6]
    assert after[:4] == before[:4]
    assert [line["loss"] for line in after] == [line["loss"] for line in before]
    assert {"loss", "grad_norm", "lr", "images_per_second", "mfu"} <= after[1].keys()


RELEASE = Path(__file__).parent.parent / "golden" / "release-0.1.0"


def edit_config(path, remove=(), **changes):
    config = read_tensors(path)[1]["config"] | changes
    edit_header(path, config={n: v for n, v in config.items() if n not in remove})


@pytest.fixture
def released(tmp_path):
    """Return a copy of a run that release 0.1.0 stopped at step 4 of 8."""
    return Path(shutil.copytree(RELEASE / "run", tmp_path / "run"))


def finish(folder):
    with warnings.catch_warnings():  # of changes in the environment
        warnings.filterwarnings("ignore", ".*the run was saved under")
        return resume(folder).run()


def test_a_run_of_an_earlier_release_is_finished_with_its_losses(released):
    result = finish(released)
    expected = load_file(RELEASE / "expected.safetensors")["losses"]
    assert result.finished
    assert result.losses.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_run_from_before_a_config_field_is_finished_with_its_losses(released):
    edit_config(RunFolder(released).checkpoints()[-1][1], ("mlp_ln_eps", "t_freq_shift"))
    result = finish(released)
    expected = load_file(RELEASE / "expected.safetensors")["losses"]
    assert result.losses.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("remove", "changes", "message"),
    [
        (("mlp_ln_eps", "gelu"), {}, "DiTConfig: expected every option, gelu missing"),
        ((), {"rotary": True}, "DiTConfig option: expected one of img_size"),
    ],
    ids=["missing", "unknown"],
)
def test_a_config_of_other_fields_is_refused(released, remove, changes, message):
    edit_config(RunFolder(released).checkpoints()[-1][1], remove, **changes)
    with pytest.raises(ValueError, match=message):
        resume(released)


def test_another_projects_checkpoint_is_named_as_such(tmp_path):
    torch.save({"model": {}, "opt": {}}, tmp_path / "0100000.pt")
    with pytest.raises(ValueError, match="got a file of PyTorch.s; a new run starts from"):
        read(tmp_path / "0100000.pt")
