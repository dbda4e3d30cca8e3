"""The trajectory execution: when "auto" takes it, what it caches, and that images stay equal."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, Guidance, Sampler, functional, reference
from fastdit.ops.trajectory import DiTWeights
from fastdit.sampling import trajectory
from fastdit.sampling.executions import describe_automatic
from fastdit.sampling.loop import Plan
from fastdit.sampling.predictors import DiTPredictor
from fastdit.sampling.trajectory import TrajectoryLoop
from fastdit.solvers import StepTable
from fastdit.testing import randomize, relative_error

GUIDED = DiTConfig(
    img_size=20,
    in_channels=4,
    hidden=48,
    n_layers=2,
    n_heads=3,
    null_class=True,
    modulation_act="silu",
    gelu="tanh",
    ln_eps=1e-6,
    mlp_ln_eps=1e-4,
    learn_sigma=True,
)

# Two by three patches, and an MLP 21 wide.
NEWER = DiTConfig(
    img_size=(4, 6),
    patch_size=2,
    in_channels=4,
    hidden=8,
    n_layers=2,
    n_heads=2,
    null_class=True,
    norm="rms",
    modulation_shift=False,
    qk_norm="layer",
    rope=True,
    mlp="swiglu",
)


def make_model(cfg=None):
    model = fastdit.DiT.from_config(cfg or DiTConfig())
    randomize(model)
    return model.requires_grad_(False)


def test_200_steps_equal_the_reference_loop():
    batch = 3
    model, scheduler = make_model(), DiffusionScheduler(200, schedule="cosine")
    plain = reference.DiT.from_config(model.cfg)
    plain.load_state_dict(model.state_dict())
    z = torch.randn(201, batch, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(batch) % 16
    images = Sampler(model, scheduler, execution="trajectory")(labels, x_T=z[0], noise=z[1:])
    loop = reference.sample(plain, scheduler, z[0], labels, z[1:])
    exact = reference.sample(plain.double(), scheduler, z[0].double(), labels, z[1:].double())
    assert relative_error(images, loop) < 1e-5
    assert relative_error(images, exact) < 1e-5


@pytest.mark.parametrize("act", ["none", "silu"])
@pytest.mark.parametrize("qk_norm", ["layer", "rms"])
def test_the_options_of_newer_blocks_equal_the_reference_loop(act, qk_norm):
    cfg = replace(NEWER, modulation_act=act, qk_norm=qk_norm, learn_sigma=True)
    model, scheduler = make_model(cfg), DiffusionScheduler(5, schedule="cosine")
    plain = reference.DiT.from_config(cfg).double()
    plain.load_state_dict(model.state_dict())
    z = torch.randn(6, 2, *cfg.sample_shape, generator=torch.Generator().manual_seed(2))
    labels, guidance = torch.arange(2), Guidance(2.0, channels=3)
    sampler = Sampler(model, scheduler, execution="trajectory", guidance=guidance)
    given = z[0].double(), labels, z[1:].double()
    exact = reference.sample(plain, scheduler, *given, guidance=guidance)
    assert relative_error(sampler(labels, x_T=z[0], noise=z[1:]), exact) < 1e-5


def test_a_changed_rotary_table_is_used():
    model, scheduler = make_model(NEWER), DiffusionScheduler(3)
    for name, p in model.named_parameters():  # so that attention is a large part of the output
        if "norm" in name:
            p.fill_(1.0)
        elif "attn.proj" in name:
            p.mul_(10.0)
    images = {}
    for name in ("before", "after"):
        images[name] = Sampler(model, scheduler, execution="trajectory")([1, 2])
        eager = Sampler(model, scheduler, execution="eager")([1, 2])
        assert relative_error(images[name], eager) < 1e-5
        model.rope = model.rope.roll(1, dims=1)
    assert relative_error(images["after"], images["before"]) > 1e-4


@pytest.mark.parametrize(
    ("option", "phrase"),
    [
        (dict(context_tokens=2), "takes no context tokens"),
        (dict(patch_bottleneck=3), "takes no bottleneck of patches"),
    ],
)
def test_other_tokens_are_sampled_eagerly(option, phrase):
    model, scheduler = make_model(replace(NEWER, **option)), DiffusionScheduler(3)
    assert Sampler(make_model(NEWER), scheduler).execution_for() == "trajectory"
    assert Sampler(model, scheduler).execution_for() == "eager"
    assert "'eager' on a CPU" in describe_automatic(model.cfg)
    assert "on a CPU 'trajectory' in float32" in describe_automatic(NEWER)
    with pytest.raises(ValueError, match=f"'trajectory' {phrase}"):
        Sampler(model, scheduler, execution="trajectory")


@pytest.mark.parametrize(
    "cfg", [DiTConfig(), replace(GUIDED, hidden=96), NEWER], ids=["split", "silu", "newer"]
)
def test_an_image_has_the_same_bits_in_any_batch_of_a_sampler(cfg):
    """Other labels, another number of threads and another bound of the tables change no bit."""
    before = torch.get_num_threads()
    model, scheduler = make_model(cfg), DiffusionScheduler(7, schedule="cosine")
    row = cfg.modulation_width * 4
    images = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for labels in ([3], [3, 0], [3, 0, 5], [3, *range(10)]):
                for table_bytes in (2**30, 40 * row):
                    sampler = Sampler(
                        model, scheduler, execution="trajectory", table_bytes=table_bytes
                    )
                    images.append(sampler(labels, seeds=range(5, 5 + len(labels)))[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(image, images[0]) for image in images)


def test_a_loop_in_parts_has_the_bits_of_the_whole(monkeypatch):
    """A loop is cut by the tables' memory, by the work of one call and by a guidance interval."""
    scheduler, calls = DiffusionScheduler(12, schedule="cosine"), []
    real = functional.trajectory

    def counted(*args, **options):
        calls.append((options["first"], len(args[4]), options["guidance"] is not None))
        return real(*args, **options)

    monkeypatch.setattr(functional, "trajectory", counted)
    sampler = Sampler(make_model(), scheduler, execution="trajectory")
    whole = sampler([3, 0, 5], seed=1)
    assert calls == [(0, 12, False)]
    row = (6 * 4 + 2) * 64 * 4
    small = Sampler(sampler.model, scheduler, execution="trajectory", table_bytes=6 * row)
    assert torch.equal(small([3, 0, 5], seed=1), whole) and len(calls) > 3
    calls.clear()
    monkeypatch.setattr(trajectory, "_CALL_FLOP", 5 * 3 * 6.8e6)
    assert torch.equal(sampler([3, 0, 5], seed=1, progress=True), whole)
    assert [count for _, count, _ in calls] == [5, 5, 2]
    calls.clear()
    monkeypatch.undo()
    monkeypatch.setattr(functional, "trajectory", counted)
    guided = dict(guidance=Guidance(2.0, interval=(3, 8)))
    model = make_model(GUIDED)
    images = Sampler(model, scheduler, execution="trajectory", **guided)([1, 2])
    assert calls == [(0, 4, False), (4, 5, True), (9, 3, False)]
    assert (
        relative_error(images, Sampler(model, scheduler, execution="eager", **guided)([1, 2]))
        < 1e-5
    )


def test_on_cuda_only_guidance_cuts_a_loop():
    """Calls are asynchronous on CUDA, so 200 steps of a thousand images are one call."""
    model = make_model(GUIDED).requires_grad_(False)
    predictor = DiTPredictor(model, torch.float32, copies=False)

    def run_length(k, device, guidance=None):
        table = StepTable(list(range(200))[::-1], torch.empty(200, 10))
        plan = Plan(table, guidance, 2**30, GUIDED.sample_shape)
        run = TrajectoryLoop(predictor, torch.device(device), torch.float32, plan)
        return run._run_length(k, rows=2000)

    part = Guidance(2.0, interval=(50, 100))
    assert run_length(0, "cpu") < 50
    assert run_length(0, "cuda") == 200
    assert run_length(0, "cuda", part) == 100
    assert run_length(100, "cuda", part) == 50


def test_given_noise_goes_to_the_device_in_pieces(monkeypatch):
    """A piece takes no more memory than the tables may: here two steps of a batch of 64."""
    taken, trajectory = [], functional.trajectory

    def watch(*arguments, noise, **options):
        taken.append(len(noise))
        return trajectory(*arguments, noise=noise, **options)

    monkeypatch.setattr(functional, "trajectory", watch)
    model, scheduler = (
        make_model(DiTConfig(hidden=16, n_layers=1, n_heads=1)),
        DiffusionScheduler(5),
    )
    noise = torch.randn(5, 64, 3, 16, 16)
    options = dict(execution="trajectory", table_bytes=2 * noise[0].nbytes + 1)
    images = Sampler(model, scheduler, **options)([3] * 64, noise=noise)
    assert taken == [2, 2, 1]
    whole = Sampler(model, scheduler, execution="trajectory")([3] * 64, noise=noise)
    assert torch.equal(images, whole) and taken[3:] == [5]


MEMORY = """
import resource, fastdit, torch
model = fastdit.DiT(img_size=32, in_channels=4, hidden=768, n_layers=8, n_heads=12,
                    num_classes=10, modulation_act="silu").requires_grad_(False)
sampler = fastdit.Sampler(model, fastdit.DiffusionScheduler(2, schedule="cosine"))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
sampler.model.y_embed(torch.tensor([1]))
before = peak()
sampler([1])
weights = sum(p.nbytes for p in model.parameters())
print(sampler.execution_for(), (peak() - before) / weights)
"""


def test_sampling_takes_little_more_memory_than_the_model():
    """No copy of the weights is made; what is needed beside them is small."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=120
    )
    execution, growth = done.stdout.split()
    assert execution == "trajectory" and float(growth) < 0.3


def test_a_progress_function_sees_every_step_and_changes_no_bit():
    model, scheduler = make_model(GUIDED), DiffusionScheduler(4, schedule="cosine")
    guidance, seen = Guidance(2.0, interval=(1, 2)), {}
    for execution in ("trajectory", "eager"):
        sampler = Sampler(model, scheduler, guidance=guidance, execution=execution)
        seen[execution] = []
        images = sampler([1, 2], progress=lambda k, x0, own=seen[execution]: own.append((k, x0)))
        assert torch.equal(sampler([1, 2]), images)
    for (k, x0), (step, expected) in zip(*seen.values(), strict=True):
        assert k == step and relative_error(x0, expected) < 1e-5


def test_a_trajectory_takes_inference_mode():
    sampler = Sampler(make_model(), DiffusionScheduler(3), execution="trajectory")
    with torch.inference_mode():
        inside = sampler([3, 1])
    assert torch.equal(sampler([3, 1]), inside)


@pytest.mark.parametrize(
    "cfg",
    [DiTConfig(), GUIDED, DiTConfig(hidden=16, n_layers=2, n_heads=2, embedders="block"), NEWER],
    ids=["split", "silu", "block", "newer"],
)
def test_the_cache_follows_every_weight(cfg):
    """The changes go through `p.data`, so PyTorch's version counters do not show them."""
    model, scheduler = make_model(cfg), DiffusionScheduler(3, schedule="cosine")
    labels = [cfg.num_classes - 1, 0]
    guided = dict(guidance=Guidance(2.0)) if cfg.null_class else {}
    sampler = Sampler(model, scheduler, execution="trajectory", **guided)
    first = sampler(labels)
    for name, p in model.named_parameters():
        last = p.data.view(-1)[-1].clone()
        p.data.view(-1)[-1] += 0.5
        fresh = Sampler(model, scheduler, execution="trajectory", **guided)
        changed = sampler(labels)
        assert torch.equal(changed, fresh(labels)) and not torch.equal(changed, first), name
        p.data.view(-1)[-1] = float("nan")
        with pytest.raises(ValueError, match=f"finite values, but {name} holds NaN"):
            sampler(labels)
        p.data.view(-1)[-1] = last
    assert torch.equal(sampler(labels), first)


def test_the_tables_of_unchanged_weights_are_made_once(monkeypatch):
    made, store = [], trajectory.TableStore
    monkeypatch.setattr(trajectory, "TableStore", lambda *args: made.append(1) or store(*args))
    model, scheduler = make_model(), DiffusionScheduler(3, schedule="cosine")
    sampler = Sampler(model, scheduler, execution="trajectory")
    images = [sampler(labels, seeds=[5, 6]) for labels in ([1, 3], [2, 3], None)]
    assert len(made) == 1
    for labels, kept in zip(([1, 3], [2, 3], None), images, strict=True):
        fresh = Sampler(model, scheduler, execution="trajectory")
        assert torch.equal(fresh(labels, seeds=[5, 6]), kept)


def test_the_cache_follows_the_config_and_the_timesteps():
    model, scheduler = make_model(), DiffusionScheduler(3, schedule="cosine")
    sampler = Sampler(model, scheduler, execution="trajectory")
    before = sampler([1, 2])
    for change in (dict(t_freq_shift=1), dict(modulation_act="silu")):
        model.cfg = replace(model.cfg, **change)
        images = sampler([1, 2])
        assert torch.equal(images, Sampler(model, scheduler, execution="trajectory")([1, 2]))
        assert relative_error(images, before) > 1e-4
        before = images
    sampler.table.timesteps[0] -= 1
    assert relative_error(sampler([1, 2]), before) > 1e-6


def test_weights_seen_only_by_a_failed_call_leave_nothing_in_the_cache(monkeypatch):
    """The loop makes its tables in parts, from a float32 copy of this bfloat16 model."""
    model, scheduler = make_model().bfloat16(), DiffusionScheduler(9, schedule="cosine")
    row = (6 * 4 + 2) * 64 * 4
    options = dict(dtype=torch.float32, execution="trajectory", table_bytes=6 * row)
    sampler = Sampler(model, scheduler, **options)
    weight = model.t_embed[0].weight.data
    expected, before = sampler([1, 2]), weight.clone()
    weight.mul_(3)
    with monkeypatch.context() as patched:
        patched.setattr(DiTWeights, "of", lambda model: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            sampler([1, 2])
    weight.copy_(before)
    assert torch.equal(sampler([1, 2]), expected)
