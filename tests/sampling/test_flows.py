"""Flows are sampled as diffusions are: by every execution, and each image by its seed alone."""

import math
import sys

import pytest
import torch
from torch import nn

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, FlowMatching, Guidance, Sampler, reference
from fastdit.noise import normal
from fastdit.solvers import Dopri5, DPMSolverPP, Euler, EulerMaruyama, Heun
from fastdit.testing import check_against_oracle, randomize, relative_error

STEPS = 8
PLAIN = DiTConfig(img_size=8, hidden=16, n_layers=1, n_heads=2)
GUIDED = DiTConfig(
    img_size=8,
    in_channels=4,
    hidden=16,
    n_layers=1,
    n_heads=2,
    num_classes=10,
    null_class=True,
    modulation_act="silu",
    pos_embed="sincos",
    learn_sigma=True,
)
REPA = FlowMatching(clean_at=0)
JIT = FlowMatching(prediction="sample", min_noise=0.05, noise_scale=2.0, time_scale=10.0)
SOLVERS = {
    "euler": Euler(shift=0.5),
    "heun": Heun(clip=2.0),
    "dpm++": DPMSolverPP(),
    "euler-maruyama": EulerMaruyama(),
}
by_execution = pytest.mark.parametrize(
    "execution",
    ["eager", "compile", pytest.param("graph", marks=pytest.mark.gpu), "trajectory"],
)
by_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def device_of(execution):
    return "cuda" if execution == "graph" else "cpu"


def make_model(cfg=PLAIN, dtype=torch.float32, kind=fastdit.DiT):
    model = kind.from_config(cfg)
    randomize(model)
    return model.to(dtype)


def plain_loop(cfg, dtype, table, x, labels, noise, guidance=None):
    """Sample by the reference model and update, one row of the table after another."""
    model = make_model(cfg, dtype, reference.DiT)
    state = torch.promote_types(dtype, torch.float32)
    x, noise, c = x.to(state), noise.to(state), table.coefficients.to(state)
    x0 = torch.zeros_like(x)
    for k, (t, time) in enumerate(zip(table.timesteps, table.model_times, strict=True)):
        times = torch.full((len(x),), time, dtype=torch.float32)
        out, now = model(x.to(dtype), times, labels), None
        if guidance and guidance.active(t):
            out, now = torch.cat([out, model(x.to(dtype), times, None)]), guidance
        step = torch.tensor(k)
        x, x0 = reference.sampler_update(x, out.to(state), c, step, x0, None, noise[k], now)
    return x


@by_execution
@by_solver
@pytest.mark.parametrize(
    ("cfg", "flow", "guidance"),
    [
        (PLAIN, JIT, None),
        (GUIDED, REPA, Guidance(3.0, interval=(0.25, 0.75), channels=3)),
    ],
    ids=["jit", "repa-guided"],
)
@torch.no_grad()
def test_every_execution_obeys_the_error_rule(cfg, flow, guidance, solver, execution):
    device = device_of(execution)
    table = solver.table(flow, STEPS)
    assert guidance is None or 0 < sum(map(guidance.active, table.timesteps)) < len(table.timesteps)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(len(table.timesteps) + 1, 22, *cfg.sample_shape, generator=generator)
    labels = torch.arange(22) % 10
    sampler = Sampler(
        make_model(cfg).to(device), flow, solver, STEPS, guidance=guidance, execution=execution
    )
    images = sampler(labels, x_T=z[0], noise=z[1:]).cpu()
    plain, exact = (
        plain_loop(cfg, dtype, table, z[0], labels, z[1:], guidance)
        for dtype in (torch.float32, torch.float64)
    )
    check_against_oracle(images, plain, exact)


@torch.no_grad()
def test_sixteen_bits_obey_the_error_rule():
    table, labels = SOLVERS["euler"].table(REPA, STEPS), torch.arange(22) % 10
    z = torch.randn(STEPS + 1, 22, *GUIDED.sample_shape, generator=torch.Generator().manual_seed(1))
    sampler = Sampler(
        make_model(GUIDED),
        REPA,
        SOLVERS["euler"],
        STEPS,
        dtype=torch.bfloat16,
        execution="eager",
    )
    images = sampler(labels, x_T=z[0], noise=z[1:])
    plain, exact = (
        plain_loop(GUIDED, dtype, table, z[0], labels, z[1:])
        for dtype in (torch.bfloat16, torch.float64)
    )
    check_against_oracle(images, plain, exact)


# Compiled steps are the same for all solvers, and compiling them takes longest.
@pytest.mark.parametrize(
    ("solver", "execution"),
    [
        *((solver, execution) for solver in SOLVERS for execution in ("eager", "trajectory")),
        ("euler-maruyama", "compile"),
        pytest.param("euler-maruyama", "graph", marks=pytest.mark.gpu),
    ],
)
def test_an_image_depends_on_its_seed_alone(solver, execution):
    guidance = None if execution == "compile" else Guidance(2.0, interval=(0.2, 0.8))
    model = make_model(GUIDED).to(device_of(execution))
    solver = SOLVERS[solver]
    sampler = Sampler(model, REPA, solver, STEPS, guidance=guidance, execution=execution)
    labels, keys = [0, 3, 3], [2**40, 1, 2]
    together = sampler(labels, seeds=keys)
    assert relative_error(sampler(labels[::-1], seeds=keys[::-1]).flip(0), together) < 1e-5
    alone = sampler(labels[1:2], seeds=keys[1:2])
    assert relative_error(alone[0], together[1]) < 1e-5
    eager = Sampler(model, REPA, solver, STEPS, guidance=guidance, execution="eager")
    assert relative_error(together, eager(labels, seeds=keys)) < 1e-5
    assert relative_error(together[1], together[2]) > 0.1


@pytest.mark.parametrize("execution", ["eager", "trajectory"])
def test_a_seeds_noise_is_scaled_and_a_given_x_T_is_not(execution):
    sampler = Sampler(make_model(), JIT, "heun", 3, execution=execution)
    z = normal(torch.tensor([[7, 0], [7, 1]]), torch.arange(1), 3 * 8 * 8)[0]
    x_T = fastdit.functional.unpatchify(2 * z.view(2, 4, 48), 4)
    assert relative_error(sampler([3, 0], x_T=x_T), sampler([3, 0], seed=7)) < 1e-6


class Recorder(nn.Module):
    """A predictor that is no DiT, and keeps what it was called with."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.gain, self.seen = nn.Parameter(torch.full((1,), 0.5, dtype=dtype)), []

    def forward(self, x, t, y):
        self.seen.append((x.dtype, t, y))
        return self.gain * torch.sin(x) + (0 if y is None else y[:, None, None, None] / 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("labels", [None, [2**24 + 1, 0, 5]], ids=["no-labels", "labels"])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_predictor_gets_fractional_times_and_integer_labels(batch, labels, dtype):
    """t is float32 or wider, for bfloat16 would round it, and y keeps every digit."""
    flow, model = FlowMatching(clean_at=0, time_scale=1000.0), Recorder(dtype)
    sampler = Sampler(model, flow, "euler", 3, sample_shape=(1, 2, 2))
    labels = labels and labels[:batch]
    images = sampler(labels, seeds=range(batch))
    assert images.shape == (batch, 1, 2, 2) and images.isfinite().all()
    wide = torch.promote_types(dtype, torch.float32)
    for (x_dtype, t, y), time in zip(model.seen, (1000, 2000 / 3, 1000 / 3), strict=True):
        assert x_dtype == dtype and t.dtype == wide
        torch.testing.assert_close(t, torch.full((batch,), time, dtype=wide))
        assert y is None if labels is None else (y.dtype, y.tolist()) == (torch.int64, labels)


def test_the_timesteps_of_a_diffusion_stay_integers():
    model = Recorder()
    Sampler(model, DiffusionScheduler(3), sample_shape=(1, 2, 2))(None, seeds=[0])
    assert [(t.dtype, t.tolist()) for _, t, _ in model.seen] == [
        (torch.int64, [k]) for k in (2, 1, 0)
    ]


def test_times_do_not_take_the_default_dtype():
    model = make_model()
    expected = Sampler(model, FlowMatching(), steps=2, execution="eager")([3])
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(
            Sampler(model, FlowMatching(), steps=2, execution="eager")([3]), expected
        )
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_solver_of_a_flow_is_eulers_if_none_is_named():
    sampler = Sampler(make_model(), FlowMatching())
    assert sampler.solver == Euler() and len(sampler.table.timesteps) == 250
    assert Sampler(make_model(), DiffusionScheduler(5)).solver == fastdit.solvers.DDPM()


def test_a_model_brings_the_flow_of_its_training():
    model = make_model()
    model.diffusion = JIT.options
    expected = Sampler(model, JIT, "heun", 3)([3], seed=5)
    assert torch.equal(Sampler(model, None, "heun", 3)([3], seed=5), expected)


@by_solver
def test_a_learned_variance_is_ignored(solver):
    """The first four of eight channels are used, so that the other four may be anything."""
    model, images = make_model(GUIDED), []
    for value in (0.0, 5.0):
        with torch.no_grad():
            rows = model.final_linear.weight.view(4, 4, 8, 16)
            rows[:, :, 4:] = value
        images.append(Sampler(model, REPA, solver, 4, execution="eager")([3, 1], seed=2))
    assert relative_error(images[1], images[0]) < 1e-6


@pytest.mark.parametrize("execution", ["eager", "trajectory"])
def test_progress_is_told_of_every_evaluation(execution):
    seen = []
    sampler = Sampler(make_model(), JIT, "heun", 3, execution=execution)
    images = sampler([3, 1], seed=2, progress=lambda k, x0: seen.append((k, x0)))
    assert [k for k, _ in seen] == list(range(5))
    assert all(x0.shape == images.shape for _, x0 in seen)
    # The last step is Euler's to t = 1 from t = 2/3, which ends at the predicted image itself.
    assert relative_error(seen[-1][1], images) < 1e-5


def test_a_loop_is_cut_where_guidance_begins_and_ends(monkeypatch):
    calls = []
    own = fastdit.functional.trajectory

    def counted(x, x0, weights, modulation, coefficients, **options):
        calls.append((len(coefficients), options["guidance"] is not None))
        return own(x, x0, weights, modulation, coefficients, **options)

    monkeypatch.setattr(fastdit.functional, "trajectory", counted)
    guidance = Guidance(2.0, interval=(0.3, 0.7))
    sampler = Sampler(make_model(GUIDED), REPA, steps=10, guidance=guidance, execution="trajectory")
    sampler([3])
    assert calls == [(3, False), (5, True), (2, False)]  # both ends of the interval are guided


class Straight(nn.Module):
    """The velocity of data that are normal, of deviation 0.5, on the linear path."""

    def __init__(self):
        super().__init__()
        self.dtype_of = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x, t, y):
        t = t[:, None, None, None]
        assert 0 <= float(t.min()) and float(t.max()) <= 1
        return (t * 0.25 - (1 - t)) / (t**2 * 0.25 + (1 - t) ** 2) * x


@pytest.fixture
def needs_torchdiffeq():
    pytest.importorskip("torchdiffeq")


@pytest.mark.usefixtures("needs_torchdiffeq")
def test_dopri5_goes_to_the_exact_end_within_its_tolerance():
    x_T = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    for tolerance in (1e-4, 1e-8):
        solver = Dopri5(rtol=tolerance, atol=tolerance)
        sampler = Sampler(Straight(), FlowMatching(), solver, sample_shape=(1, 4, 4))
        assert relative_error(sampler(None, x_T=x_T), 0.5 * x_T) < 100 * tolerance


@pytest.mark.usefixtures("needs_torchdiffeq")
@pytest.mark.parametrize(
    "flow", [REPA, JIT, FlowMatching("vp", "epsilon")], ids=["repa", "jit", "vp"]
)
def test_dopri5_agrees_with_many_steps_of_heuns_method(flow):
    model, guidance = make_model(GUIDED), Guidance(1.5, channels=3)
    exact = Sampler(model, flow, "heun", 200, guidance=guidance)([3], seed=2)
    own = Sampler(model, flow, Dopri5(rtol=1e-2, atol=1e-2), guidance=guidance)([3], seed=2)
    assert relative_error(own, exact) < 5e-2


@pytest.mark.usefixtures("needs_torchdiffeq")
def test_with_dopri5_too_an_image_depends_on_its_seed_alone():
    """Solved together, images would share their steps, and so the errors of these."""
    model, guidance = make_model(GUIDED), Guidance(2.0, interval=(0.2, 0.8))
    solver = Dopri5(rtol=0.1, atol=0.1)  # the interval's ends make jumps, which take many steps
    sampler = Sampler(model, REPA, solver, guidance=guidance)
    labels, keys, seen = [0, 3, 3], [2**40, 1, 2], []
    together = sampler(labels, seeds=keys, progress=lambda k, x0: seen.append((k, x0)))
    assert torch.equal(sampler(labels[::-1], seeds=keys[::-1]).flip(0), together)
    assert torch.equal(sampler(labels[1:2], seeds=keys[1:2])[0], together[1])
    assert [k for k, _ in seen] == list(range(len(seen)))
    assert not seen[0][1][1:].any() and seen[-1][1].shape == together.shape


@pytest.mark.usefixtures("needs_torchdiffeq")
@pytest.mark.parametrize("execution", ["compile", "graph", "trajectory"])
def test_dopri5_runs_eagerly_only(execution):
    assert Sampler(make_model(), REPA, "dopri5").execution_for() == "eager"
    with pytest.raises(ValueError, match=f"execution: '{execution}' takes steps that are planned"):
        Sampler(make_model(), REPA, "dopri5", execution=execution)


@pytest.mark.usefixtures("needs_torchdiffeq")
def test_dopri5_names_predictions_that_are_not_finite():
    model = nn.Module()
    model.forward = lambda x, t, y: x * math.inf
    sampler = Sampler(model, FlowMatching(), "dopri5", sample_shape=(1, 2, 2))
    with pytest.raises(FloatingPointError, match="model: expected finite predictions"):
        sampler(None, seeds=[0])


def test_dopri5_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(
        ValueError, match=r"needs the package torchdiffeq; pip install 'fastdit\[ode"
    ):
        Sampler(make_model(), FlowMatching(), "dopri5")
