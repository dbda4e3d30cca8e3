"""The trajectory execution: when "auto" takes it, what it caches, and that images stay equal."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, Guidance, Sampler, functional, reference
from fastdit.kernels import cpu
from fastdit.ops import dispatch
from fastdit.ops.trajectory import DiTWeights
from fastdit.sampling import executions, trajectory
from fastdit.sampling.executions import Subject
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


@pytest.mark.parametrize("cfg", [DiTConfig(), replace(GUIDED, hidden=96)], ids=["split", "silu"])
def test_an_image_has_the_same_bits_in_any_batch_of_a_sampler(cfg):
    """Other labels, another number of threads and another bound of the tables change no bit."""
    before = torch.get_num_threads()
    model, scheduler = make_model(cfg), DiffusionScheduler(7, schedule="cosine")
    row = (6 * cfg.n_layers + 2) * cfg.hidden * 4
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


@pytest.mark.parametrize("options", [dict(hidden=516), dict(img_size=68)], ids=["wide", "long"])
def test_auto_takes_wide_models_and_many_tokens(options, monkeypatch):
    model, scheduler = make_model(DiTConfig(**options, n_layers=1)), DiffusionScheduler(2)
    sampler = Sampler(model, scheduler)
    assert sampler.execution_for() == "trajectory"
    eager = Sampler(model, scheduler, execution="eager")
    assert relative_error(sampler([1, 2]), eager([1, 2])) < 1e-5
    # Without the vectors of AVX2, products of this width are left to PyTorch.
    monkeypatch.setattr(cpu, "instruction_set", lambda: "plain")
    assert sampler.execution_for() == ("eager" if "hidden" in options else "trajectory")


def test_auto_takes_the_trajectory_only_for_an_unchanged_dit():
    def by_hook(model):
        model.blocks[0].mlp.register_forward_hook(lambda module, inputs, out: 2 * out)

    def by_module(model):
        model.blocks[0].mlp[1] = torch.nn.SiLU()

    def by_attribute(model):
        model.blocks[1].eps = 1e-2

    def by_method(model):
        denoise = model.denoise
        model.denoise = lambda *args: 2 * denoise(*args)

    scheduler = DiffusionScheduler(3, schedule="cosine")

    def by_private_method(model):
        run = model.blocks[0]._run
        model.blocks[0]._run = lambda *args: run(*(2 * a for a in args))

    def by_shape(model):
        mlp = model.blocks[0].mlp
        mlp[0].weight = torch.nn.Parameter(mlp[0].weight[:200])
        mlp[0].bias = torch.nn.Parameter(mlp[0].bias[:200])
        mlp[2].weight = torch.nn.Parameter(mlp[2].weight[:, :200])

    def by_bias(model):
        model.blocks[0].mlp[0].bias = None

    class Doubled(torch.Tensor):
        """Weights of another kind, as quantised ones are."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            out = super().__torch_function__(func, types, args, kwargs or {})
            return 2 * out if func is torch.nn.functional.linear else out

    def by_kind(model):
        proj = model.blocks[0].attn.proj
        own = proj.weight.as_subclass(Doubled)
        proj.weight = torch.nn.Parameter(own, requires_grad=False)

    changes = (by_hook, by_module, by_attribute, by_method, by_private_method, by_shape, by_bias)
    changes += (by_kind,)
    for alter in changes:
        model = make_model()
        sampler = Sampler(model, scheduler)
        named = Sampler(model, scheduler, execution="trajectory")
        plain = sampler([1, 2])
        assert sampler.execution_for() == "trajectory"
        alter(model)
        assert sampler.execution_for() == "eager"
        assert relative_error(sampler([1, 2]), plain) > 1e-5
        with pytest.raises(ValueError, match="'trajectory' reads a fastdit.DiT's weights only"):
            named([1, 2])


def test_auto_takes_the_trajectory_on_a_cpu_in_float32():
    model, scheduler = make_model(), DiffusionScheduler(3, schedule="cosine")
    sampler = Sampler(model, scheduler)
    assert sampler.execution_for() == "trajectory"
    with torch.autocast("cpu", torch.float16):
        assert sampler.execution_for() == "eager"
    assert Sampler(model.double(), scheduler).execution_for() == "eager"


@pytest.mark.parametrize(
    ("has", "chosen"),
    [
        (dict(avx512_bf16=True), "trajectory"),
        (dict(avx512_bf16=True, amx_tile=True), "eager"),  # PyTorch's products use AMX
        (dict(), "eager"),
        (dict(architecture="aarch64"), "eager"),
    ],
    ids=["bf16", "amx", "neither", "arm"],
)
def test_auto_in_bfloat16_follows_the_cpus_instructions(has, chosen, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"} | has)
    model, scheduler = make_model(), DiffusionScheduler(3, schedule="cosine")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        sampler = Sampler(model, scheduler, dtype=torch.bfloat16)
    assert sampler.execution_for() == chosen
    slow = [w for w in seen if "slower than float32" in str(w.message)]
    assert len(slow) == (has == {}) and all(w.filename == __file__ for w in slow)


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


def test_the_rule_of_auto_is_described_in_words():
    described = executions.describe_automatic(DiTConfig())
    assert "on a CPU 'trajectory' in float32, and in bfloat16 with AVX512-BF16" in described
    assert described.endswith("'eager' in other dtypes")
    wide = executions.describe_automatic(fastdit.PRESETS["DiT-XL/2"])
    assert wide.endswith("'eager' in other dtypes and without AVX2")


def on_cuda(monkeypatch, major=9, minor=0):
    """Fake a GPU for the choice of an execution, which reads only its properties."""
    properties = SimpleNamespace(major=major, minor=minor, name="A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return torch.device("cuda", 0)


def test_auto_on_cuda_takes_the_trajectory_only_where_it_was_measured_to_win(monkeypatch):
    device, model = on_cuda(monkeypatch), make_model()

    def automatic(model, dtype=torch.bfloat16):
        return executions.automatic(Subject(model, device, dtype))

    assert executions.WINS == () and automatic(model) == "graph"
    assert executions.describe_automatic(model.cfg).startswith("'graph' on CUDA, ")
    monkeypatch.setattr(executions, "WINS", (executions.Win("sm_90", 16, 64, 4),))
    assert automatic(model) == "trajectory"
    assert automatic(model, torch.float32) == "graph"
    assert executions.describe_automatic(model.cfg).startswith(
        "'graph' on CUDA, but 'trajectory' in 16 bits on sm_90, on a CPU"
    )
    for other in (dict(n_layers=5), dict(hidden=128), dict(patch_size=2)):
        assert automatic(make_model(DiTConfig(**other))) == "graph"
        assert executions.describe_automatic(DiTConfig(**other)).startswith("'graph' on CUDA, ")
    model.blocks[0].register_forward_hook(lambda module, inputs, out: out)
    assert automatic(model) == "graph"
    on_cuda(monkeypatch, 8)
    assert automatic(make_model()) == "graph"


@pytest.mark.parametrize(
    ("options", "dtype", "majors", "message"),
    [
        (dict(hidden=128), torch.float32, (8, 9, 10), "takes a hidden size of 64 in float32, got"),
        (
            dict(img_size=32),
            torch.float32,
            (8, 9, 10),
            "takes up to 16 features of a token where there are 64 tokens in float32, got 48",
        ),
        (
            dict(img_size=32),
            torch.bfloat16,
            (8, 12),
            "takes up to 16 features of a token where there are 64 tokens on A GPU, got 48",
        ),
        (dict(img_size=32, hidden=128), torch.float16, (8, 10, 12), "tokens on A GPU, got 48"),
        (dict(img_size=32), torch.bfloat16, (9, 10), None),
        (dict(patch_size=2, hidden=128), torch.bfloat16, (8, 9, 10, 12), None),
        (dict(patch_size=2), torch.float32, (8, 9, 10, 12), None),
        (dict(), torch.float32, (8, 9, 10, 12), None),
    ],
)
def test_a_model_that_would_spill_on_a_gpu_is_refused_with_the_reason(
    monkeypatch, options, dtype, majors, message
):
    pytest.importorskip("triton")
    cfg = DiTConfig(**options)
    for major in majors:
        device = on_cuda(monkeypatch, major)
        reason = dispatch.obstacle("trajectory", "triton", cfg, device, dtype)
        assert (reason is None) if message is None else (message in reason)


@pytest.mark.parametrize("cfg", [DiTConfig(), GUIDED], ids=["split", "silu"])
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
