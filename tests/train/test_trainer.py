"""What a run computes: its steps, losses and averages, however they are computed."""

import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from fastdit import DiffusionScheduler, DiTConfig, reference
from fastdit.train.monitor import Monitor
from fastdit.train.recipe import Recipe
from fastdit.train.run_folder import RunFolder
from fastdit.train.runtime import Runtime
from fastdit.train.sources import Shapes
from fastdit.train.trainer import Trainer

SMALL = DiTConfig(hidden=16, n_layers=1, n_heads=1)
NULL = replace(SMALL, null_class=True)
BRIEF = Recipe(steps=6, batch_size=24)
FULL = Recipe(steps=6, batch_size=24, warmup=2, ema=0.9, label_dropout=0.3, schedule="cosine")


def trainer(out=None, recipe=BRIEF, config=SMALL, runtime=None, **options):
    return Trainer(config, recipe, Shapes(4, recipe.seed), out, runtime, **options)


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_steps_equal_a_plain_loop():
    """Twelve steps on the same batches give the weights of a textbook PyTorch loop."""
    recipe = Recipe(steps=12, batch_size=64)
    ours = Trainer(SMALL, recipe, Shapes(16))
    plain = reference.DiT.from_config(SMALL)
    plain.load_state_dict(ours.model.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=recipe.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    losses = []
    for _ in range(12):
        samples, numbers = ours.loader.load(ours.step)
        batch = ours.objective.draw(samples, numbers)
        loss = F.mse_loss(plain(batch.x_t, batch.t, batch.labels), batch.eps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        ours.train_step()
    assert ours.history[0].tolist() == pytest.approx(losses, rel=1e-4)
    for (name, a), b in zip(plain.named_parameters(), ours.model.named_parameters(), strict=True):
        torch.testing.assert_close(b[1], a, rtol=1e-2, atol=2e-5, msg=name)


def test_the_average_is_the_weights_moving_average():
    ours = trainer(recipe=FULL, config=NULL)
    expected = {n: p.detach().double() for n, p in ours.model.named_parameters()}
    for step in range(6):
        ours.train_step()
        decay = min(0.9, (1 + step) / (10 + step))
        for n, p in ours.model.named_parameters():
            expected[n] = decay * expected[n] + (1 - decay) * p.detach().double()
    averaged = ours.sampling_model()
    for n, p in averaged.named_parameters():
        torch.testing.assert_close(p.double(), expected[n], rtol=1e-5, atol=1e-7)
    assert not any(
        torch.equal(p, q)
        for p, q in zip(averaged.parameters(), ours.model.parameters(), strict=True)
    )


def test_without_an_average_the_weights_themselves_are_shown():
    ours = trainer()
    shown = ours.sampling_model()
    assert same_tensors(shown.state_dict(), ours.model.state_dict())
    ours.train_step()
    assert not same_tensors(shown.state_dict(), ours.model.state_dict()), "a copy"


def test_a_run_enables_gradients_itself():
    with torch.no_grad():
        assert trainer().run().finished


def test_loss_falls_and_every_step_is_reported():
    recipe = Recipe(steps=48, batch_size=32, lr=2e-3)
    result = Trainer(DiTConfig(), recipe, Shapes(24)).run()
    quarters = result.losses.view(4, 12).mean(1).tolist()
    assert result.finished and quarters == sorted(quarters, reverse=True)
    assert quarters[-1] < 0.7 * quarters[0]
    assert result.images_per_second > 0 and result.first_step_seconds > 0


def test_a_run_is_a_function_of_its_seed_and_leaves_the_global_one_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        runs.append(trainer(recipe=replace(BRIEF, seed=seed)))
        runs[-1].run()
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (run.model.state_dict() for run in runs)
    assert same_tensors(first, again)
    assert not same_tensors(first, other)


@pytest.mark.parametrize("parts", [2, 8])
def test_micro_batches_add_up_to_the_batch(parts):
    whole, split = trainer(recipe=FULL, config=NULL), None
    split = trainer(recipe=FULL, config=NULL, runtime=Runtime(accumulate=parts))
    assert torch.allclose(split.run().losses, whole.run().losses, rtol=1e-5)
    for a, b in zip(split.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [dict(checkpointing=True), dict(compile="block"), dict(compile="whole")],
    ids=["checkpointing", "block", "whole"],
)
def test_compilation_and_checkpointing_keep_the_loss(how):
    torch._dynamo.reset()
    counters.clear()
    config = replace(NULL, n_layers=3)
    plain = trainer(recipe=FULL, config=config)
    other = trainer(recipe=FULL, config=config, runtime=Runtime(**how))
    assert torch.allclose(other.run().losses, plain.run().losses, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == ("compile" in how), "one block for all"
    assert not counters["graph_break"]


def test_autocast_trains_float32_weights_in_bfloat16_products():
    plain, mixed = trainer(), trainer(runtime=Runtime(precision="bfloat16"))
    dtypes = []
    mixed.model.blocks[0].attn.qkv.register_forward_hook(lambda *a: dtypes.append(a[2].dtype))
    losses = mixed.run().losses
    assert set(dtypes) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())
    assert 0 < (losses - plain.run().losses).abs().max() < 0.02


def test_the_first_steps_time_excludes_the_first_save(tmp_path):
    ours = trainer(tmp_path)
    write = ours.folder.write
    ours.folder.write = lambda *all: (time.sleep(1), write(*all))
    assert ours.run().first_step_seconds < 0.8


def test_a_blocked_pipe_is_not_taken_for_another_run(tmp_path):
    ours = trainer(tmp_path)

    class Blocks(Monitor):
        def advance(self):
            raise BlockingIOError("the terminal is slow")

    with pytest.raises(BlockingIOError, match="the terminal is slow"):
        ours.run(Blocks())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_reach_a_run(dtype):
    expected = trainer(recipe=FULL, config=NULL).run().losses
    torch.set_default_dtype(dtype)
    try:
        ours = trainer(recipe=FULL, config=NULL)
        actual = ours.run().losses
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(p.dtype == torch.float32 for p in ours.model.parameters())
    assert actual.tolist() == pytest.approx(expected.tolist(), rel=0.05)


def test_a_loss_that_is_not_finite_names_the_samples_and_the_last_good_checkpoint(tmp_path):
    ours = trainer(tmp_path)
    ours.train_step()
    ours.save()
    path = RunFolder(tmp_path).checkpoints()[-1][1]
    before = path.read_bytes()
    ours.train_step()
    with torch.no_grad():
        ours.model.final_linear.bias[0] = float("nan")
    with pytest.raises(FloatingPointError) as error:
        ours.run()
    message = str(error.value)
    assert "loss is nan, gradient norm nan at step 3 of 6" in message
    assert "on samples 48 to 71 of seed 0" in message
    assert f"the last good checkpoint is {path}" in message
    assert path.read_bytes() == before
    assert [at for at, _ in RunFolder(tmp_path).checkpoints()] == [1]


def test_a_gradient_that_is_not_finite_stops_before_a_save(tmp_path):
    """The loss is finite, but the gradient is not, and the step has spoiled the weights."""
    ours = trainer(tmp_path, save_every=1)
    ours.model.pos_embed.register_hook(lambda g: g * float("inf"))
    with pytest.raises(FloatingPointError, match="gradient norm (inf|nan) at step 1 of 6"):
        ours.run()
    assert [at for at, _ in RunFolder(tmp_path).checkpoints()] == [0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trainer(config=DiTConfig(img_size=32)), "config: the data are 3 x 16 x 16"),
        (lambda: trainer(recipe=FULL), "label_dropout: needs a model with null_class=True"),
        (
            lambda: trainer(
                recipe=replace(BRIEF, T=1, schedule="cosine"),
                config=replace(SMALL, learn_sigma=True),
            ),
            "T: a learned variance needs 2 or more, got 1",
        ),
        (lambda: trainer(save_every=0), "save_every: expected at least 1, got 0"),
        (lambda: trainer("x", keep=0), "keep: expected at least 1, got 0"),
        (
            lambda: trainer(runtime=Runtime(accumulate=5)),
            "expected a multiple of 5 (1 processes",
        ),
        (lambda: Runtime(accumulate=0), "accumulate: expected at least 1, got 0"),
        (lambda: Runtime(precision="float16"), "precision: expected one of float32, bfloat16"),
        (lambda: Runtime(compile="all"), "compile: expected one of none, block, whole"),
        (lambda: Runtime(strategy="dp"), "strategy: expected one of ddp, fsdp"),
        (lambda: Monitor(log_every=0), "log_every: expected"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_the_scheduler_trains_any_noise_predictor():
    """DiffusionScheduler needs nothing of DiT: a convolution learns in fifty plain steps."""
    torch.manual_seed(0)
    scheduler = DiffusionScheduler(T=200)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(16, 3, 3, padding=1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    images = Shapes(8).images
    losses = []
    for _ in range(50):
        t, eps = torch.randint(200, (len(images),)), torch.randn_like(images)
        loss = F.mse_loss(model(scheduler.q_sample(images, t, eps)), eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
