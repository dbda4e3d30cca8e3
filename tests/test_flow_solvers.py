"""Solvers of flows against a flow of known solution, and against each project's published loop."""

import math

import pytest
import torch
from torch import nn

from fastdit import DiffusionScheduler, FlowMatching, Guidance, Sampler
from fastdit.flow import PATHS, published_flow
from fastdit.solvers import (
    DIFFUSIONS,
    LAST_STEPS,
    Dopri5,
    DPMSolverPP,
    Euler,
    EulerMaruyama,
    Heun,
)
from fastdit.testing import relative_error
from fastdit.update import Coefficients

SHAPE = (2, 4, 4)
MEAN, SPREAD = 0.6, 0.7
PREDICTIONS = ("velocity", "epsilon", "sample", "score")


class SameSpan(FlowMatching):
    """A flow whose span does not depend on what its model predicts."""

    span = (0.001, 0.999)


class Gaussian(nn.Module):
    """The exact predictor for images whose pixels are normal, of MEAN and SPREAD.

    Along its probability flow (x - a MEAN) / sqrt(a^2 SPREAD^2 + b^2) is constant.
    """

    def __init__(self, flow):
        super().__init__()
        self.flow = flow
        self.dtype_of = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x, t, y=None):
        assert t.dtype == torch.float64
        at = self.flow.amplitudes(t / self.flow.time_scale)
        a, b, da, db = (c[:, None, None, None] for c in at)
        variance = a**2 * SPREAD**2 + b**2
        z = b * (x - a * MEAN) / variance
        x0 = MEAN + a * SPREAD**2 * (x - a * MEAN) / variance
        own = {"velocity": da * x0 + db * z, "epsilon": z, "sample": x0, "score": -z / b}
        return own[self.flow.prediction]


class Wavy(nn.Module):
    """A nonlinear predictor, in the dtype of its input."""

    def __init__(self):
        super().__init__()
        self.dtype_of = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x, t, y=None):
        return torch.sin(2 * x) + t[:, None, None, None] ** 2 - 0.3 * x


def sample(model, flow, solver, steps=None, **options):
    return Sampler(model, flow, solver, steps, sample_shape=SHAPE)(None, **options)


def recorded(evaluations, batch=3):
    generator = torch.Generator().manual_seed(1)
    shape = evaluations + 1, batch, *SHAPE
    z = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return z[0], z[1:]


def times_of(t, batch=3):
    return torch.full((batch,), t, dtype=torch.float64)


def spread_at(flow, t):
    """The mean and the deviation of a pixel of the state at time t."""
    at = flow.amplitudes(torch.tensor(t))
    return at.signal * MEAN, (at.signal**2 * SPREAD**2 + at.noise**2).sqrt()


def pushed(flow, x):
    """Where the exact flow takes states from the beginning to the end of its span."""
    (m0, s0), (m1, s1) = (spread_at(flow, t) for t in flow.span)
    return m1 + s1 * (x - m0) / s0


def slope(steps, errors):
    return -(math.log(errors[-1]) - math.log(errors[0])) / math.log(steps[-1] / steps[0])


@pytest.mark.parametrize(
    "flow",
    [
        *(FlowMatching(path) for path in PATHS),
        FlowMatching("linear", clean_at=0, time_scale=1000.0, noise_scale=2.0),
    ],
    ids=[*PATHS, "backward"],
)
@pytest.mark.parametrize(
    ("solver", "order", "steps"),
    [
        (Euler(), 1, (40, 80)),
        (Heun(), 2, (40, 80)),
        (Heun(shift=0.4), 2, (40, 80)),
        # Its steps in ln(a / s) are long at both ends, where it comes to its order slowly.
        (DPMSolverPP(), 2, (320, 640)),
    ],
    ids=["euler", "heun", "heun-shifted", "dpm++"],
)
def test_the_error_falls_with_the_order_of_the_solver(solver, order, steps, flow):
    """The images go to the exact push-forward of their noise."""
    x_T, _ = recorded(0)
    errors = []
    for n in steps:
        images = sample(Gaussian(flow), flow, solver, n, x_T=x_T)
        errors.append(relative_error(images, pushed(flow, x_T)))
    assert errors[-1] < 0.02
    assert slope(steps, errors) == pytest.approx(order, abs=0.3), errors


def moments(flow, solver, steps):
    """The mean and the variance of a pixel after a loop, exactly.

    The predictor is affine in the state, and so is each step.
    """
    table, model = solver.table(flow, steps), Gaussian(flow)
    mean, deviation = spread_at(flow, flow.span[0])
    variance = deviation**2
    for t, c in zip(table.model_times, table.coefficients, strict=True):
        at = torch.tensor([t], dtype=torch.float64)
        offset, one = (float(model(torch.full((1, 1, 1, 1), v).double(), at)) for v in (0.0, 1.0))
        gain = one - offset
        of_x = c[3] + c[4] * gain + c[5] * (c[0] + c[1] * gain)
        mean = of_x * mean + (c[4] + c[5] * c[1]) * offset
        variance = of_x**2 * variance + c[7] ** 2
    return float(mean), float(variance.sqrt())


@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("diffusion", DIFFUSIONS)
@pytest.mark.parametrize(("path", "scale"), [("linear", 2.0), ("vp", 1.0)], ids=["linear", "vp"])
def test_the_moments_of_the_stochastic_solver_are_of_weak_order_one(
    path, scale, diffusion, last_step
):
    """The last step shrinks with the others; otherwise its own error would remain."""
    # On the linear path "SBDM" is infinite at the noise, which the span of this flow leaves out.
    flow = SameSpan(path, noise_scale=scale)
    errors, steps = [], (100, 200)
    for n in steps:
        solver = EulerMaruyama(diffusion=diffusion, last_step=last_step, last_size=1 / n)
        mean, deviation = moments(flow, solver, n)
        m, s = (float(v) for v in spread_at(flow, 0.999 if last_step is None else 1.0))
        errors.append(abs(mean - m) + abs(deviation - s))
    assert errors[-1] < 0.05, errors
    assert slope(steps, errors) > 0.7, errors


@pytest.mark.parametrize("clip", [None, 0.8], ids=["free", "clipped"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "solver",
    [
        Euler,
        Heun,
        DPMSolverPP,
        *(lambda s=s, **o: EulerMaruyama(last_step=s, **o) for s in LAST_STEPS),
    ],
    ids=["euler", "heun", "dpm++", *(f"euler-maruyama-{s}" for s in LAST_STEPS)],
)
def test_what_the_model_predicts_does_not_change_the_images(solver, path, clip):
    images = []
    for prediction in PREDICTIONS:
        flow = SameSpan(path, prediction, noise_scale=1.5)
        x_T, noise = recorded(len(solver(clip=clip).table(flow, 12).timesteps))
        images.append(sample(Gaussian(flow), flow, solver(clip=clip), 12, x_T=x_T, noise=noise))
    assert all(relative_error(other, images[0]) < 1e-9 for other in images[1:])


@pytest.mark.parametrize(
    "solver", [Euler(), Heun(), DPMSolverPP(), EulerMaruyama()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("path", PATHS)
def test_the_direction_and_the_scale_of_time_do_not_change_the_images(path, solver):
    forward = FlowMatching(path)
    backward = FlowMatching(path, clean_at=0, time_scale=1000.0)
    x_T, noise = recorded(len(solver.table(forward, 12).timesteps))
    images = [
        sample(Gaussian(flow), flow, solver, 12, x_T=x_T, noise=noise)
        for flow in (forward, backward)
    ]
    assert relative_error(images[1], images[0]) < 1e-9


@pytest.mark.parametrize("solver", [Euler, Heun, DPMSolverPP, EulerMaruyama])
def test_a_wide_clip_changes_nothing_and_a_narrow_one_bounds_the_images(solver):
    flow = FlowMatching()
    last = dict(last_step="tweedie") if solver is EulerMaruyama else {}
    x_T, noise = recorded(len(solver().table(flow, 12).timesteps))
    free, wide, bound = (
        sample(Wavy(), flow, solver(clip=clip, **last), 12, x_T=x_T, noise=noise)
        for clip in (None, 1e9, 0.5)
    )
    assert relative_error(wide, free) < 1e-6
    assert bound.abs().max() <= 0.5 + 1e-9 < free.abs().max()


def sit_amplitudes(path, t):
    if path == "linear":
        return t, 1 - t, 1.0, -1.0
    if path == "gvp":
        angle, q = t * math.pi / 2, math.pi / 2
        return math.sin(angle), math.cos(angle), q * math.cos(angle), -q * math.sin(angle)
    log = -0.25 * (1 - t) ** 2 * 19.9 - 0.5 * (1 - t) * 0.1
    a, rate = math.exp(log), 0.5 * (1 - t) * 19.9 + 0.05
    b = math.sqrt(1 - a * a)
    return a, b, a * rate, -a * a * rate / b


def sit_diffusion(form, path, t, norm):
    a, b, da, db = sit_amplitudes(path, t)
    sbdm = (0.1 + (1 - t) * 19.9) / 2 if path == "vp" else da / a * b * b - b * db if a else None
    return {
        "constant": norm,
        "SBDM": norm * sbdm if sbdm is not None else None,
        "sigma": norm * b,
        "linear": norm * (1 - t),
        "decreasing": 0.25 * (norm * math.cos(math.pi * t) + 1) ** 2,
        "increasing-decreasing": norm * math.sin(math.pi * t) ** 2,
    }[form]


def sit_score(path, t, v, x):
    """`get_score_from_velocity`, with the ratio a / a' multiplied out."""
    a, b, da, db = sit_amplitudes(path, t)
    return (a * v - da * x) / (da * b * b - a * db * b)


# "SBDM" is infinite where the other two paths begin, which is an error.
FINITE = [(p, d) for p in PATHS for d in DIFFUSIONS if d != "SBDM" or p == "vp"]


@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize(("path", "diffusion"), FINITE)
def test_the_stochastic_solver_is_that_of_sit(path, diffusion, last_step):
    """The loop of `transport/integrators.py`: num_steps n, of which the last is `last_step`."""
    n, norm = 9, 0.8
    flow, model = FlowMatching(path), Wavy()
    x, noise = recorded(n)
    x_T, ends = x, flow.span[1] if last_step is None else 1 - 0.04
    times = torch.linspace(0, ends, n, dtype=torch.float64).tolist()
    dt = times[1] - times[0]

    def velocity_and_drift(x, t):
        v = model(x, torch.full((len(x),), t, dtype=torch.float64))
        return v, v + sit_diffusion(diffusion, path, t, norm) * sit_score(path, t, v, x)

    for k, t in enumerate(times[:-1]):
        w = sit_diffusion(diffusion, path, t, norm)
        x = x + velocity_and_drift(x, t)[1] * dt + math.sqrt(2 * w) * math.sqrt(dt) * noise[k]
    v, drift = velocity_and_drift(x, ends)
    if last_step == "mean":
        x = x + drift * 0.04
    elif last_step == "euler":
        x = x + v * 0.04
    elif last_step == "tweedie":
        a, b, _, _ = sit_amplitudes(path, ends)
        x = x / a + b * b / a * sit_score(path, ends, v, x)
    solver = EulerMaruyama(diffusion=diffusion, norm=norm, last_step=last_step)
    steps = n - 1 if last_step is None else n
    own = sample(model, flow, solver, steps, x_T=x_T, noise=noise[:steps])
    assert relative_error(own, x.detach()) < 1e-10


def test_the_stochastic_solver_is_that_of_repa():
    """Noise is at t = 1. `linspace(1, 0.04, n)`, then 0; w = 2 t, half of it in the drift."""
    n, model = 7, Wavy()
    x, noise = recorded(n)
    x_T = x
    times = [*torch.linspace(1, 0.04, n, dtype=torch.float64).tolist(), 0.0]
    for k, (t, after) in enumerate(zip(times[:-1], times[1:], strict=True)):
        v, dt, w = model(x, times_of(t)), after - t, 2 * t
        a, b, da, db = 1 - t, t, -1, 1
        score = (a / da * v - x) / (b**2 - a / da * db * b)
        x = x + (v - 0.5 * w * score) * dt
        if after:
            x = x + math.sqrt(w) * math.sqrt(-dt) * noise[k]
    own = sample(model, FlowMatching(clean_at=0), EulerMaruyama(), n, x_T=x_T, noise=noise)
    assert relative_error(own, x.detach()) < 1e-10


def test_eulers_method_is_that_of_lightningdit():
    """`linspace(0, 1, n)`, shifted, is n - 1 evaluations."""
    n, model = 12, Wavy()
    x, _ = recorded(0)
    x_T = x
    times = [0.3 * t / (1 + (0.3 - 1) * t) for t in torch.linspace(0, 1, n).double().tolist()]
    for t, after in zip(times[:-1], times[1:], strict=True):
        x = x + (after - t) * model(x, times_of(t))
    own = sample(model, FlowMatching(), Euler(shift=0.3), n - 1, x_T=x_T)
    assert relative_error(own, x.detach()) < 1e-6  # their times are float32
    backward = Euler(shift=0.3).table(FlowMatching(clean_at=0), n - 1).timesteps
    assert backward == pytest.approx([1 - t for t in times[:-1]], abs=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 28])
def test_eulers_method_is_that_of_stable_diffusion_3(steps, shift):
    """The table of diffusers' scheduler, whose shift is the reciprocal of ours."""
    diffusers = pytest.importorskip("diffusers", reason="compares with the scheduler of diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    scheduler.set_timesteps(steps)
    flow, solver = published_flow("SD3", 128), Euler.from_diffusers(shift)
    assert solver.shift == pytest.approx(1 / shift)
    table = solver.table(flow, steps)
    assert flow == FlowMatching(clean_at=0, time_scale=1000.0)
    assert table.model_times == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)
    columns = Coefficients(*table.coefficients.unbind(1))
    assert columns.eps.tolist() == pytest.approx(scheduler.sigmas.diff().tolist(), abs=1e-6)
    assert columns.x.eq(1).all() and columns.x0.eq(0).all() and columns.sigma.eq(0).all()


@pytest.mark.parametrize("solver", [Euler, Heun, DPMSolverPP])
@pytest.mark.parametrize("clean_at", [0, 1])
def test_a_last_size_sets_where_the_last_step_begins(clean_at, solver):
    """The others are equal; and at the size of an equal step it changes nothing."""
    flow = FlowMatching(clean_at=clean_at)
    assert flow.data_time(visited(solver(last_size=0.2), flow, 3)).tolist() == pytest.approx(
        [0, 0.4, 0.8]
    )
    assert visited(solver(last_size=0.25), flow, 4).equal(visited(solver(), flow, 4))
    x = torch.ones(1, *SHAPE, dtype=torch.float64)
    ends = [
        sample(Gaussian(flow), flow, solver(last_size=size), 40, x_T=x) for size in (None, 0.01)
    ]
    assert relative_error(ends[1], ends[0]) < 0.05


def visited(solver, flow, steps):
    """Return the times of a table, each once."""
    return torch.tensor(list(dict.fromkeys(solver.table(flow, steps).timesteps)))


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_heuns_method_is_that_of_jit(steps):
    model, least = Wavy(), 0.05
    x, _ = recorded(0)
    x_T = x = 2 * x
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64).tolist()

    def velocity(x, t):
        return (model(x, times_of(t)) - x) / max(1 - t, least)

    for k, (t, after) in enumerate(zip(times[:-1], times[1:], strict=True)):
        v = velocity(x, t)
        ahead = x + (after - t) * v
        last = k == steps - 1
        x = ahead if last else x + (after - t) * 0.5 * (v + velocity(ahead, after))
    flow = FlowMatching(prediction="sample", noise_scale=2.0, min_noise=least)
    assert relative_error(sample(model, flow, Heun(), steps, x_T=x_T), x.detach()) < 1e-10


def test_the_default_numbers_of_steps_are_the_published_ones():
    flow = FlowMatching()
    assert len(Euler().table(flow).timesteps) == len(EulerMaruyama().table(flow).timesteps) == 250
    assert len(Heun().table(flow).timesteps) == 2 * 50 - 1


def test_times_are_the_models_own_and_exact_on_a_grid():
    forward = Euler().table(FlowMatching(time_scale=1000.0), 10)
    assert forward.timesteps == pytest.approx([k / 10 for k in range(10)], abs=1e-15)
    assert forward.timesteps[7] == 0.7
    assert forward.model_times == [t * 1000 for t in forward.timesteps]
    backward = Heun().table(FlowMatching(clean_at=0), 5).timesteps
    assert backward == pytest.approx([1, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2], abs=1e-15)


@pytest.mark.parametrize("solver", [DPMSolverPP(), Euler(), Heun(), EulerMaruyama()])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("steps", [1, 2, 250])
def test_every_coefficient_is_finite_at_the_ends(steps, path, prediction, solver):
    table = solver.table(FlowMatching(path, prediction), steps).coefficients
    assert table[:, [0, 1, 3, 4, 5, 6, 7]].isfinite().all()


@pytest.mark.parametrize("shift", [0.1, 0.3, 0.7, 3.0, 10.0])
def test_a_shift_leaves_the_ends_exactly_where_they_are(shift):
    for solver in (Euler(shift=shift), DPMSolverPP(shift=shift)):
        table = solver.table(FlowMatching(clean_at=0), 3)
        t, dt = table.timesteps, Euler(shift=shift).table(FlowMatching(), 3).coefficients[:, 4]
        assert t[0] == 1 and dt.sum().item() == pytest.approx(1, abs=1e-15)
        assert table.coefficients[:, 3:5].isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Euler(shift=0), "shift: expected a positive number, got 0.0"),
        (lambda: Euler(shift="a"), "shift: expected a number, got 'a'"),
        (lambda: EulerMaruyama(diffusion="sbdm"), "got 'sbdm'; did you mean 'SBDM'?"),
        (
            lambda: EulerMaruyama(last_step="Mean"),
            "last_step: expected one of mean, tweedie, euler",
        ),
        (lambda: EulerMaruyama(norm=0), "norm: expected a positive number, got 0.0"),
        (lambda: EulerMaruyama(last_size=1), "last_size: expected a number between 0 and 1, got"),
        (lambda: EulerMaruyama(last_size=None), "last_size: expected a number where last_step is"),
        (lambda: Euler(last_size=0), "last_size: expected a number between 0 and 1, got 0.0"),
        (lambda: Euler.from_diffusers(0), "shift: expected a positive number, got 0"),
        (lambda: Euler.from_diffusers(3.0, 1), "T: expected at least 2, got 1"),
        (
            lambda: DPMSolverPP(last_size=0.1).table(DiffusionScheduler(10)),
            "last_size: expected None, since only a FlowMatching has times of its own, got 0.1",
        ),
        (
            lambda: Euler(last_size=1e-3).table(FlowMatching(prediction="epsilon"), 3),
            "last_size: expected more than 0.001, which sampling of the flow leaves out at the "
            "data, got 0.001",
        ),
        (lambda: Dopri5(rtol=-1), "rtol: expected a positive number, got -1.0"),
        (
            lambda: Dopri5().table(FlowMatching(), 50),
            "steps: expected None, since dopri5 chooses its steps, got 50",
        ),
        (lambda: Euler().table(FlowMatching(), 0), "steps: expected a positive integer, got 0"),
        (lambda: Euler().table(FlowMatching(), 2.0), "steps: expected a positive integer, got 2.0"),
        (
            lambda: EulerMaruyama(diffusion="SBDM").table(FlowMatching("gvp")),
            "solver: expected a diffusion that is finite at t = 0, where sampling the 'gvp' path "
            "begins, such as constant, sigma, linear, decreasing, increasing-decreasing; got "
            "'SBDM', which divides by the amplitude of the image",
        ),
        (lambda: Euler(shift=10**400), "shift: expected a number, got 1000"),
        (lambda: EulerMaruyama(diffusion=["sigma"]), "diffusion: expected one of constant, "),
        (lambda: Guidance(10**400), "scale: expected a finite number, got 1000"),
        (lambda: Guidance(2.0, (0.5, 10**400)), "interval: expected integers 0 <= low < high"),
        (
            lambda: EulerMaruyama(last_size=0.9999).table(FlowMatching(prediction="epsilon")),
            "last_size: expected at most 0.999, where sampling of the flow begins, got 0.9999",
        ),
        (
            lambda: EulerMaruyama(last_size=1e-300).table(FlowMatching(), 3),
            "got coefficients that are not finite; EulerMaruyama(",
        ),
        (
            lambda: Heun(shift=1e300).table(FlowMatching(), 3),
            "solver: expected steps from the noise that all end before the data but the last",
        ),
    ],
)
def test_bad_options_are_value_errors(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
