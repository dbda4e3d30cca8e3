"""Training: the recipe's step, its losses, and a resume that leaves no trace."""

import math
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, reference
from fastdit.checkpoint import read_tensors, write_tensors
from fastdit.data import LABEL_NAMES, coloured_shapes
from fastdit.train import RESUME_FILE, WEIGHTS_FILE, Recipe, Trainer

SMALL = DiTConfig(hidden=16, n_layers=1, n_heads=1)
BRIEF = Recipe(epochs=2, batch_size=24, per_class=4)  # 3 steps an epoch, the last one short


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_steps_equal_a_plain_loop():
    """The trainer against textbook PyTorch on the same batches: weights after an epoch."""
    recipe = Recipe(epochs=3, batch_size=64, per_class=16)
    trainer = Trainer(SMALL, recipe)
    plain = reference.DiT.from_config(SMALL)
    plain.load_state_dict(trainer.model.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=recipe.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    losses = []
    for _ in range(12):
        _, x_t, t, y, eps = trainer.batch()
        loss = F.mse_loss(plain(x_t, t, y), eps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        trainer.train_step()
    assert trainer.losses.tolist() == pytest.approx(losses, rel=1e-4)
    for (name, a), b in zip(
        plain.named_parameters(), trainer.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(b[1], a, rtol=1e-2, atol=2e-5, msg=name)


def test_an_epoch_shows_every_image_once_and_fresh_noise():
    trainer = Trainer(SMALL, BRIEF)
    batches = []
    for trainer.step in range(6):
        batches.append(trainer.batch())
    for epoch in (batches[:3], batches[3:]):
        assert [len(y) for *_, y, _ in epoch] == [24, 24, 16]
        labels = torch.cat([y for *_, y, _ in epoch])
        assert torch.equal(labels.bincount(), torch.full((16,), 4))
    first, second = (torch.cat([y for *_, y, _ in e]) for e in (batches[:3], batches[3:]))
    assert not torch.equal(first, second)
    steps, noise = (torch.cat([b[i] for b in batches]) for i in (2, 4))
    assert steps.min() >= 0 and steps.max() < 200 and len(steps.unique()) > 50
    assert len(noise.flatten(1).unique(dim=0)) == len(noise)


def test_batches_are_noised_training_images():
    trainer = Trainer(SMALL, BRIEF)
    _, x_t, t, y, eps = trainer.batch()
    alpha_bar = trainer.scheduler.tables["alpha_bars"][t].float().view(-1, 1, 1, 1)
    x0 = (x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    images, labels = coloured_shapes(4, seed=0)
    distance = torch.cdist(
        x0.flatten(1), images.flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
    )
    assert distance.min(1).values.max() < 1e-3
    assert torch.equal(labels[distance.argmin(1)], y)


def test_loss_falls_and_is_reported_by_epoch():
    result = Trainer(DiTConfig(), Recipe(epochs=4, batch_size=32, per_class=24, lr=2e-3)).run()
    assert len(result.epoch_losses) == 4
    assert result.epoch_losses == sorted(result.epoch_losses, reverse=True)
    assert result.epoch_losses[-1] < 0.7 * result.epoch_losses[0]
    assert result.images_per_second > 0 and result.first_step_seconds > 0


def test_a_run_is_a_function_of_its_seed_and_leaves_the_global_one_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    runs = [Trainer(SMALL, Recipe(epochs=1, per_class=8, seed=s)).run() for s in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (r.model.state_dict() for r in runs)
    assert same_tensors(first, again)
    assert not same_tensors(first, other)


def test_files_are_whole_and_load(tmp_path):
    result = Trainer(SMALL, BRIEF, tmp_path).run()
    assert {p.name for p in tmp_path.iterdir()} == {WEIGHTS_FILE, RESUME_FILE}
    loaded = fastdit.load(tmp_path / WEIGHTS_FILE)
    assert same_tensors(loaded.state_dict(), result.model.state_dict())
    info = fastdit.checkpoint.inspect(tmp_path / WEIGHTS_FILE)
    assert info.labels == LABEL_NAMES and info.diffusion == DiffusionScheduler().options


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 6])
def test_resume_from_any_step_has_the_bits_of_one_run(tmp_path, stop):
    whole = Trainer(SMALL, BRIEF).run()
    first = Trainer(SMALL, BRIEF, tmp_path)
    for _ in range(stop):
        first.train_step()
    first.save()
    resumed = Trainer.resume(tmp_path)
    assert resumed.step == stop
    result = resumed.run()
    assert same_tensors(result.model.state_dict(), whole.model.state_dict())
    assert result.epoch_losses == whole.epoch_losses
    assert math.isnan(result.images_per_second) == (stop >= 5)


TRAIN = """
import sys
from fastdit import DiTConfig
from fastdit.train import RESUME_FILE, Recipe, Trainer
out = sys.argv[1]
config, recipe = DiTConfig(hidden=16, n_layers=1, n_heads=1), Recipe(epochs=30, per_class=16)
import os
exists = os.path.exists(os.path.join(out, RESUME_FILE))
make = Trainer.resume if exists else lambda out, **o: Trainer(config, recipe, out, **o)
trainer = make(out, save_every=3)
print("started", trainer.step, flush=True)
trainer.run()
"""


def test_a_run_killed_at_random_moments_resumes_bit_for_bit(tmp_path):
    """SIGKILL, which nothing can catch, at moments drawn anew each time the test runs."""

    def start(out):
        command = [sys.executable, "-W", "ignore", "-c", TRAIN, str(out)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with process.stdout:
            return process, int(process.stdout.readline().split()[1])

    whole, step = start(tmp_path / "whole")
    begin = time.monotonic()
    assert (step, whole.wait()) == (0, 0)
    run_seconds = time.monotonic() - begin

    killed_at = []
    for _ in range(3):
        process, step = start(tmp_path / "killed")
        killed_at.append(step)
        time.sleep(random.uniform(0.1, 0.4) * run_seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process, step = start(tmp_path / "killed")
    assert process.wait() == 0
    assert step > 0, f"no kill left progress to resume: {killed_at}"
    for name in (WEIGHTS_FILE, RESUME_FILE):
        ours, theirs = (load_file(tmp_path / run / name) for run in ("killed", "whole"))
        assert same_tensors(ours, theirs), f"{name}: killed at steps after {killed_at}"


KILL_IN_A_SAVE = """
import os, signal, sys
from fastdit import DiTConfig, files
from fastdit.train import Recipe, Trainer
out, kill_before, call = sys.argv[1], sys.argv[2], int(sys.argv[3])
trainer = Trainer.resume(out)
trainer.train_step()
module = os if kill_before == "replace" else files
original, calls = getattr(module, kill_before), 0
def counted(*arguments):
    global calls
    calls += 1
    if calls == call:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(module, kill_before, counted)
trainer.save()
"""


@pytest.mark.parametrize(
    ("kill_before", "call"),
    [("_sync", 1), ("replace", 1), ("_sync", 3), ("replace", 2), ("_sync", 4)],
    ids=["resume-aside", "resume-unnamed", "weights-aside", "weights-unnamed", "weights-named"],
)
def test_a_kill_inside_a_save_leaves_both_files_whole(tmp_path, kill_before, call):
    """At each place where one of the two files is aside, or one is new and the other old."""
    whole = Trainer(SMALL, BRIEF).run()
    first = Trainer(SMALL, BRIEF, tmp_path)
    first.train_step()
    first.save()
    command = [sys.executable, "-W", "ignore", "-c", KILL_IN_A_SAVE, str(tmp_path), kill_before]
    done = subprocess.run([*command, str(call)])
    assert done.returncode == -signal.SIGKILL
    fastdit.load(tmp_path / WEIGHTS_FILE)
    resumed = Trainer.resume(tmp_path)
    assert resumed.step == (1 if call == 1 else 2)
    assert same_tensors(resumed.run().model.state_dict(), whole.model.state_dict())
    assert {p.name for p in tmp_path.iterdir()} == {WEIGHTS_FILE, RESUME_FILE}


def test_a_changed_environment_is_said_aloud(tmp_path):
    Trainer(SMALL, BRIEF, tmp_path).save()
    with pytest.warns(UserWarning, match="compile: the run was saved under False, and goes on und"):
        Trainer.resume(tmp_path, compile=True)


@pytest.mark.parametrize(
    ("file", "remedy"), [(WEIGHTS_FILE, "name another"), (RESUME_FILE, "continue .*--resume")]
)
def test_a_new_run_overwrites_nothing(tmp_path, file, remedy):
    (tmp_path / file).write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=f"out: .* already holds {file}; {remedy}"):
        Trainer(SMALL, BRIEF, tmp_path)
    assert (tmp_path / file).read_bytes() == b"precious"


def test_compiled_steps_equal_eager_ones():
    torch._dynamo.reset()
    recipe = Recipe(epochs=1, batch_size=16, per_class=4)
    eager, compiled = (Trainer(SMALL, recipe, compile=c).run() for c in (False, True))
    assert compiled.epoch_losses == pytest.approx(eager.epoch_losses, rel=1e-5)
    assert compiled.first_step_seconds > eager.first_step_seconds


def test_resume_refuses_what_it_did_not_write(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        Trainer.resume(tmp_path)
    trainer = Trainer(SMALL, BRIEF, tmp_path)
    trainer.save()
    path = tmp_path / RESUME_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        Trainer.resume(tmp_path)
    (tmp_path / WEIGHTS_FILE).rename(path)
    with pytest.raises(ValueError, match="expected a resume file of fastdit train"):
        Trainer.resume(tmp_path)


def edit_header(path, **changes):
    tensors, header = read_tensors(path)
    write_tensors(path, tensors, header | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 7}, "expected a step in [0, 6], got 7"),
        ({"step": -1}, "expected a step in [0, 6], got -1"),
        ({"step": "3"}, "expected a step in [0, 6], got '3'"),
        ({"step": True}, "expected a step in [0, 6], got True"),
        ({"step": 5}, "the optimizer took {3} steps, the header says 5"),
        ({"recipe": {"epochs": 2}}, "Recipe: expected every option, batch_size, lr"),
        ({"recipe": None}, "Recipe: expected a dict of options, got None"),
        ({"config": {}}, "DiTConfig: expected every option, img_size"),
    ],
)
def test_a_tampered_resume_file_is_one_clear_error(tmp_path, changes, message):
    trainer = Trainer(SMALL, BRIEF, tmp_path)
    for _ in range(3):
        trainer.train_step()
    trainer.save()
    edit_header(tmp_path / RESUME_FILE, **changes)
    with pytest.raises(ValueError) as error:
        Trainer.resume(tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_reach_a_run(dtype):
    expected = Trainer(SMALL, BRIEF).run()
    torch.set_default_dtype(dtype)
    try:
        actual = Trainer(SMALL, BRIEF).run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(p.dtype == torch.float32 for p in actual.model.parameters())
    assert actual.epoch_losses == pytest.approx(expected.epoch_losses, rel=0.05)


def test_a_loss_that_is_not_finite_stops_before_a_save(tmp_path):
    trainer = Trainer(SMALL, BRIEF, tmp_path)
    trainer.save()
    before = (tmp_path / RESUME_FILE).read_bytes()
    trainer.step = 1
    with torch.no_grad():
        trainer.model.final_linear.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="loss is nan, gradient norm nan at step 2 of 6"):
        trainer.run()
    assert (tmp_path / RESUME_FILE).read_bytes() == before


def test_a_gradient_that_is_not_finite_stops_before_a_save(tmp_path):
    """A finite loss with an infinite gradient: the weights of this very step are lost."""
    trainer = Trainer(SMALL, BRIEF, tmp_path, save_every=1)
    trainer.save()
    before = (tmp_path / RESUME_FILE).read_bytes()
    trainer.step = 1
    trainer.model.pos_embed.register_hook(lambda g: g * float("inf"))
    with pytest.raises(FloatingPointError, match="gradient norm (inf|nan) at step 2 of 6"):
        trainer.run()
    assert (tmp_path / RESUME_FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DiTConfig(img_size=32), "expected in_channels=3, img_size=16, got in_channels=3, img_siz"),
        (DiTConfig(num_classes=10), "expected use_class_cond=True, num_classes=16, got"),
    ],
)
def test_models_that_do_not_fit_the_data_are_an_error(config, message):
    with pytest.raises(ValueError) as error:
        Trainer(config, BRIEF)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected a positive integer below 2^31, got 0"),
        ({"epochs": 2.5}, "epochs: expected a positive integer below 2^31, got 2.5"),
        ({"batch_size": 10**400}, "batch_size: expected a positive integer below 2^31"),
        ({"lr": True}, "lr: expected a positive number, got True"),
        ({"lr": "x"}, "lr: expected a positive number, got 'x'"),
        ({"weight_decay": -1.0}, "weight_decay: expected at least 0, got -1.0"),
        ({"lr": 0.0}, "lr: expected a positive number, got 0.0"),
        ({"clip": float("nan")}, "clip: expected a positive number, got nan"),
        ({"seed": -1}, "seed: expected an integer in [0, 2^63), got -1"),
        ({"epoch": 3}, "expected one of epochs"),
    ],
)
def test_bad_recipes_are_value_errors(options, message):
    with pytest.raises(ValueError) as error:
        Recipe.from_dict(options)
    assert message in str(error.value)


def test_the_scheduler_trains_any_noise_predictor():
    """Fifty plain steps with a convolution: DiffusionScheduler needs nothing of DiT."""
    torch.manual_seed(0)
    scheduler = DiffusionScheduler(T=200)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(16, 3, 3, padding=1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    images = coloured_shapes(8).images
    losses = []
    for _ in range(50):
        t, eps = torch.randint(200, (len(images),)), torch.randn_like(images)
        loss = F.mse_loss(model(scheduler.q_sample(images, t, eps)), eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
