"""Solvers compared with other implementations and with an ODE of known solution."""

import math

import pytest
import torch
from torch import nn

from fastdit import DiffusionScheduler, FlowMatching, Sampler
from fastdit.diffusion import spaced_timesteps, strided_timesteps
from fastdit.solvers import DDIM, DDPM, SOLVERS, DPMSolverPP, Heun
from fastdit.testing import relative_error

SHAPE = (2, 4, 4)
SPREAD = 0.7


class Gaussian(nn.Module):
    """The exact predictor for images that are normal noise times SPREAD.

    Its probability flow ODE has a known solution: x / a is proportional to
    sqrt(SPREAD^2 + sigma^2).
    """

    def __init__(self, scheduler, prediction="epsilon"):
        super().__init__()
        self.alpha_bars, self.prediction = scheduler.tables["alpha_bars"], prediction
        self.dtype_of = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x, t, y):
        alpha_bar = self.alpha_bars[t][:, None, None, None]
        a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        eps = s * x / (alpha_bar * SPREAD**2 + 1 - alpha_bar)
        x0 = (x - s * eps) / a
        return {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0}[self.prediction]


class Wavy(nn.Module):
    """A nonlinear predictor; if `learned`, its last C of 2C channels are the variance's share."""

    def __init__(self, learned=False):
        super().__init__()
        self.learned = learned
        self.dtype_of = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x, t, y=None):
        eps = torch.sin(2 * x) + t[:, None, None, None] / 1000
        return torch.cat([eps, torch.cos(3 * x)], dim=1) if self.learned else eps


def recorded(evaluations, batch=3):
    z = torch.randn(evaluations + 1, batch, *SHAPE, dtype=torch.float64)
    return z[0], z[1:]


def sample(model, scheduler, solver, steps, **options):
    return Sampler(model, scheduler, solver, steps, sample_shape=SHAPE)(None, **options)


def test_spaced_timesteps_are_the_published_ones():
    assert spaced_timesteps(1000, 10) == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert spaced_timesteps(1000, 1) == [0] and spaced_timesteps(7, 7) == list(range(7))
    assert len(set(spaced_timesteps(1000, 250))) == 250 and spaced_timesteps(1000, 250)[-1] == 999


def test_strided_timesteps_are_the_published_ones():
    assert strided_timesteps(1000, 10) == list(range(0, 1000, 100))
    assert strided_timesteps(1000, 50) == list(range(0, 1000, 20))
    assert strided_timesteps(200, 200) == list(range(200))
    # Several strides give three steps, of which the smallest is taken.
    assert strided_timesteps(10, 3) == [0, 4, 8]
    with pytest.raises(ValueError, match="no stride takes 300 of 1000.*are 250 and 334"):
        strided_timesteps(1000, 300)


@pytest.mark.parametrize("steps", [0, 11, 2.0, True, "5"])
@pytest.mark.parametrize(
    "solver", [n for n, s in SOLVERS.items() if DiffusionScheduler in s.processes]
)
def test_an_impossible_number_of_steps_is_an_error(solver, steps):
    with pytest.raises(ValueError, match="steps: expected an integer from 1 to T = 10, got"):
        Sampler(Wavy(), DiffusionScheduler(10), solver, steps, sample_shape=SHAPE)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("process", "can"),
    [
        (DiffusionScheduler(10), "DiffusionScheduler, which are ddpm, ddim, dpm++, heun; got"),
        (FlowMatching(), "FlowMatching, which are dpm++, heun, euler, euler-maruyama, dopri5; got"),
    ],
    ids=["diffusion", "flow"],
)
def test_a_solver_that_a_process_cannot_take_is_an_error_that_names_those_it_can(
    process, can, solver
):
    if solver in can.split("; ")[0].replace(",", " ").split():
        SOLVERS[solver].table(process)
        return
    with pytest.raises(ValueError) as error:
        Sampler(Wavy(), process, solver, sample_shape=SHAPE)
    assert f"solver: expected one that takes a {can} {SOLVERS[solver]}" == str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(eta=1.5), "eta: expected a number from 0 to 1, got 1.5"),
        (
            lambda: Heun(shift=0.3).table(DiffusionScheduler(50)),
            "shift: expected 1, since only a FlowMatching is shifted, got 0.3",
        ),
        (lambda: DDPM(clip=0.0), "clip: expected a positive number, or None, got 0.0"),
        (
            lambda: DiffusionScheduler(50, prediction="v"),
            "prediction: expected one of epsilon, sample, v_prediction; got 'v'",
        ),
    ],
)
def test_bad_options_are_value_errors(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("solver", "order"),
    [(DDIM(), 1), (DPMSolverPP(), 2), (Heun(), 2)],
    ids=["ddim", "dpm++", "heun"],
)
def test_the_error_falls_with_the_order_of_the_solver(solver, order):
    """The order is the slope of log error over log steps, on an ODE of known solution."""
    scheduler = DiffusionScheduler(4000, schedule="linear-scaled")
    model = Gaussian(scheduler)
    x_T = torch.randn(4, *SHAPE, dtype=torch.float64)
    steps, errors = (20, 40, 80, 160), []
    for n in steps:
        timesteps = solver.table(scheduler, n).timesteps
        start, end = scheduler.tables["alpha_bars"][[timesteps[0], timesteps[-1]]]
        sigma = (1 / start - 1).sqrt()
        exact = x_T / start.sqrt() * SPREAD / (SPREAD**2 + sigma**2).sqrt()
        errors.append(relative_error(sample(model, scheduler, solver, n, x_T=x_T), exact))
    slope = -(math.log(errors[-1]) - math.log(errors[0])) / math.log(steps[-1] / steps[0])
    assert slope == pytest.approx(order, abs=0.3), errors


@pytest.mark.parametrize("clip", [None, 0.8], ids=["free", "clipped"])
@pytest.mark.parametrize("solver", [DDPM, DDIM, DPMSolverPP, Heun])
def test_the_prediction_type_does_not_change_the_images(solver, clip):
    images = []
    for prediction in ("epsilon", "sample", "v_prediction"):
        scheduler = DiffusionScheduler(60, schedule="linear-scaled", prediction=prediction)
        evaluations = len(solver(clip=clip).table(scheduler, 12).timesteps)
        torch.manual_seed(1)
        x_T, noise = recorded(evaluations)
        model = Gaussian(scheduler, prediction)
        images.append(sample(model, scheduler, solver(clip=clip), 12, x_T=x_T, noise=noise))
    assert relative_error(images[1], images[0]) < 1e-10
    assert relative_error(images[2], images[0]) < 1e-10


@pytest.mark.parametrize("solver", [DDPM, DDIM, DPMSolverPP, Heun])
def test_a_wide_clip_changes_nothing_and_a_narrow_one_bounds_the_images(solver):
    scheduler = DiffusionScheduler(60, schedule="cosine")
    x_T, noise = recorded(len(solver().table(scheduler, 12).timesteps))
    free = sample(Wavy(), scheduler, solver(), 12, x_T=x_T, noise=noise)
    wide = sample(Wavy(), scheduler, solver(clip=1e9), 12, x_T=x_T, noise=noise)
    assert relative_error(wide, free) < 1e-9
    bound = sample(Wavy(), scheduler, solver(clip=0.5), 12, x_T=x_T, noise=noise)
    assert bound.abs().max() <= 0.5 + 1e-9 < free.abs().max()


def test_a_clipped_ancestral_step_is_the_published_posterior():
    """Compare with Ho et al. 2020, equation 7, for the clipped x0."""
    scheduler = DiffusionScheduler(30, schedule="cosine")
    x, noise = recorded(30)
    images = sample(Wavy(), scheduler, DDPM(clip=1.0), None, x_T=x, noise=noise)
    table = scheduler.tables
    for k, t in enumerate(reversed(range(30))):
        c = {name: values[t] for name, values in table.items()}
        eps = Wavy()(x, torch.full((3,), t))
        x0 = ((x - (1 - c["alpha_bars"]).sqrt() * eps) / c["alpha_bars"].sqrt()).clamp(-1, 1)
        of_x0 = c["alpha_bars_prev"].sqrt() * c["betas"] / (1 - c["alpha_bars"])
        of_x = c["alphas"].sqrt() * (1 - c["alpha_bars_prev"]) / (1 - c["alpha_bars"])
        x = of_x0 * x0 + of_x * x + (c["posterior_var"].sqrt() * noise[k] if t else 0)
    assert relative_error(images, x.detach()) < 1e-10


def diffusers_loop(scheduler, x, noise=None, **options):
    """Run the loop of a diffusers scheduler; pass noise only if its step takes variance noise."""
    for k, t in enumerate(scheduler.timesteps):
        eps = Wavy()(x, t.expand(len(x)))
        if noise is not None:
            options["variance_noise"] = noise[k]
        x = scheduler.step(eps, t, x, **options).prev_sample
    return x.detach()


def arguments_of(scheduler, **options):
    betas = scheduler.tables["betas"].numpy()
    return dict(num_train_timesteps=scheduler.T, trained_betas=betas, **options)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_ddim_equals_diffusers(eta, clip):
    DDIMScheduler = pytest.importorskip("diffusers").DDIMScheduler
    scheduler = DiffusionScheduler(100, schedule="linear-scaled")
    options = dict(clip_sample=clip is not None, timestep_spacing="leading")
    theirs = DDIMScheduler(**arguments_of(scheduler, **options))
    theirs.set_timesteps(20)
    x_T, noise = recorded(20)
    noisy = noise if eta else None
    expected = diffusers_loop(
        theirs, x_T, noisy, eta=eta, use_clipped_model_output=clip is not None
    )
    own = sample(Wavy(), scheduler, DDIM(eta=eta, clip=clip), 20, x_T=x_T, noise=noise)
    assert relative_error(own, expected) < 1e-5  # diffusers' tables are float32


def test_dpm_solver_pp_equals_diffusers():
    DPMSolverMultistepScheduler = pytest.importorskip("diffusers").DPMSolverMultistepScheduler
    scheduler = DiffusionScheduler(100, schedule="linear-scaled")
    options = dict(algorithm_type="dpmsolver++", final_sigmas_type="zero")
    theirs = DPMSolverMultistepScheduler(**arguments_of(scheduler, **options))
    theirs.set_timesteps(timesteps=DPMSolverPP().table(scheduler, 20).timesteps)
    x_T, _ = recorded(0)
    own = sample(Wavy(), scheduler, "dpm++", 20, x_T=x_T)
    assert relative_error(own, diffusers_loop(theirs, x_T)) < 1e-5


@pytest.mark.parametrize("steps", [1, 8, 20, 22])
def test_dpm_solver_pp_equals_diffusers_on_their_own_timesteps(steps):
    """Their default grid, with which PixArt is published; 20 and 22 steps round halves."""
    DPMSolverMultistepScheduler = pytest.importorskip("diffusers").DPMSolverMultistepScheduler
    scheduler, solver = DiffusionScheduler(1000), DPMSolverPP(last_timestep="stride")
    theirs = DPMSolverMultistepScheduler(1000, 1e-4, 0.02, "linear")
    theirs.set_timesteps(steps)
    assert solver.table(scheduler, steps).timesteps == theirs.timesteps.tolist()
    x_T, _ = recorded(0)
    own = sample(Wavy(), scheduler, solver, steps, x_T=x_T)
    assert relative_error(own, diffusers_loop(theirs, x_T)) < 1e-5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPMSolverPP(last_timestep="last"), "last_timestep: expected one of zero, stride"),
        (
            lambda: DPMSolverPP(last_timestep="stride").table(DiffusionScheduler(10)),
            "steps: expected at most 9, since last_timestep='stride' leaves out timestep 0, got 10",
        ),
    ],
    ids=["name", "steps"],
)
def test_a_bad_last_timestep_is_a_value_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("learned", [False, True], ids=["posterior", "learned-range"])
def test_ddim_with_eta_one_and_ancestral_sampling_agree_over_all_steps(learned):
    """Song et al. 2021, section 4.1: both are one process. DDIM ignores a learned variance."""
    scheduler = DiffusionScheduler(40, schedule="linear-scaled")
    x_T, noise = recorded(40)
    ddim = sample(Wavy(learned), scheduler, DDIM(eta=1.0), None, x_T=x_T, noise=noise)
    ddpm = sample(Wavy(), scheduler, "ddpm", None, x_T=x_T, noise=noise)
    assert relative_error(ddim, ddpm) < 1e-10
