"""Schedules and tables follow their papers; signal left at the last step gives a warning."""

import math
import warnings

import pytest
import torch

from fastdit import DiffusionScheduler, timestep_embedding
from fastdit.diffusion import TerminalSNRWarning
from fastdit.solvers import DDPM

ATTRIBUTES = [
    "betas",
    "alphas",
    "alpha_bars",
    "alpha_bars_prev",
    "sqrt_alpha_bars",
    "sqrt_one_minus_alpha_bars",
    "posterior_var",
]


def test_linear_tables_equal_a_plain_loop():
    scheduler = DiffusionScheduler(T=200)
    alpha_bar = 1.0
    for t in range(200):
        beta = 1e-4 + (0.02 - 1e-4) * t / 199
        previous, alpha_bar = alpha_bar, alpha_bar * (1 - beta)
        expected = [
            beta,
            1 - beta,
            alpha_bar,
            previous,
            math.sqrt(alpha_bar),
            math.sqrt(1 - alpha_bar),
            beta * (1 - previous) / (1 - alpha_bar),
        ]
        for name, value in zip(ATTRIBUTES, expected, strict=True):
            assert scheduler.tables[name][t].item() == pytest.approx(value, rel=1e-13, abs=1e-30)
            assert getattr(scheduler, name)[t] == torch.tensor(value, dtype=torch.float32)
    assert scheduler.T == 200
    assert scheduler.alpha_bars[-1].item() == pytest.approx(0.132, abs=5e-4)
    assert scheduler.posterior_var[0] == 0


def test_linear_scaled_is_the_published_schedule_at_1000():
    assert torch.equal(
        DiffusionScheduler(1000, schedule="linear-scaled").betas, DiffusionScheduler(1000).betas
    )
    short = DiffusionScheduler(100, schedule="linear-scaled")
    assert short.betas[0].item() == pytest.approx(1e-3)
    assert short.betas[-1].item() == pytest.approx(0.2)


def test_cosine_follows_its_formula_until_the_clip():
    T = 50
    scheduler = DiffusionScheduler(T, schedule="cosine")

    def f(t):
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in range(T - 1):
        assert scheduler.tables["alpha_bars"][t].item() == pytest.approx(f(t + 1) / f(0), rel=1e-10)
    assert scheduler.tables["betas"][-1].item() == 0.999


@pytest.mark.parametrize("schedule", ["linear", "linear-scaled", "cosine"])
@pytest.mark.parametrize("T", [21, 200, 1000])
def test_every_table_is_finite_and_alpha_bars_fall(schedule, T):
    scheduler = DiffusionScheduler(T, schedule=schedule)
    assert all(table.isfinite().all() for table in scheduler.tables.values())
    assert (scheduler.tables["alpha_bars"].diff() < 0).all()


def test_terminal_snr_warns_and_says_what_it_does_to_samples():
    said = r"0\.152.*36% .*samples drift.*linear-scaled"
    scheduler, x = DiffusionScheduler(T=200), torch.zeros(1, 4)
    with pytest.warns(TerminalSNRWarning, match=said) as caught:
        for _ in range(2):
            scheduler.q_sample(x, torch.tensor([3]), x)
    assert len(caught) == 1 and caught[0].filename == __file__  # the caller's


def test_terminal_snr_concerns_training_only():
    """Who samples a model cannot change the schedule that it was trained on."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = DiffusionScheduler(T=200)
        DDPM().table(scheduler, 5)


@pytest.mark.parametrize(
    ("T", "schedule"), [(1000, "linear"), (200, "linear-scaled"), (200, "cosine"), (50, "cosine")]
)
def test_schedules_that_end_in_noise_do_not_warn(T, schedule):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler, x = DiffusionScheduler(T, schedule=schedule), torch.zeros(1, 4)
        scheduler.q_sample(x, torch.tensor([3]), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"T": 0}, "T: expected a positive integer, got 0"),
        ({"T": 10.0}, "T: expected a positive integer, got 10.0"),
        ({"T": 20, "schedule": "linear-scaled"}, "T: schedule='linear-scaled' needs more than 20"),
        ({"schedule": "cosin"}, "schedule: expected one of linear, linear-scaled, cosine"),
    ],
)
def test_bad_options_are_value_errors(options, message):
    with pytest.raises(ValueError) as error:
        DiffusionScheduler(**options)
    assert message in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 16, 48), (4,)], ids=["image", "token", "flat"])
def test_q_sample_is_its_formula_in_every_dtype(dtype, shape):
    scheduler = DiffusionScheduler()
    x0, eps = torch.randn(2, *shape, dtype=torch.float64)
    t = torch.tensor([0, 3, 150, 199])
    out = scheduler.q_sample(x0.to(dtype), t, eps.to(dtype))
    assert out.dtype == dtype and out.shape == x0.shape
    for i in range(4):
        alpha_bar = scheduler.tables["alpha_bars"][t[i]]
        expected = alpha_bar.sqrt() * x0[i] + (1 - alpha_bar).sqrt() * eps[i]
        tolerance = 4 * torch.finfo(dtype).eps
        assert torch.allclose(out[i].double(), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize(
    ("t", "eps", "message"),
    [
        ([0, 200], (2, 3), "t: expected values in [0, 200), got 0 to 200"),
        ([-1, 5], (2, 3), "t: expected values in [0, 200), got -1 to 5"),
        ([0], (2, 3), "t: expected shape [2], got [1]"),
        ([0, 1], (2, 1), "eps: expected x0's shape [2, 3], got [2, 1]"),
    ],
)
def test_q_sample_checks_its_arguments(t, eps, message):
    with pytest.raises(ValueError) as error:
        DiffusionScheduler().q_sample(torch.zeros(2, 3), torch.tensor(t), torch.zeros(eps))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("x0", "t", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2).long(), "x0: expected a float dtype"),
        (torch.zeros(2, 3), torch.zeros(2), "t: expected integers, got torch.float32"),
        (torch.zeros(2, 3), torch.zeros(2).bool(), "t: expected integers, got torch.bool"),
    ],
)
def test_q_sample_checks_dtypes(x0, t, message):
    with pytest.raises(ValueError) as error:
        DiffusionScheduler().q_sample(x0, t, torch.zeros(2, 3))
    assert message in str(error.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_q_sample_takes_any_integer_timesteps(dtype):
    scheduler, t = DiffusionScheduler(), torch.tensor([5, 5])
    x0, eps = torch.randn(2, 2, 3)
    assert torch.equal(scheduler.q_sample(x0, t.to(dtype), eps), scheduler.q_sample(x0, t, eps))


@pytest.mark.parametrize("dim", [1, 2, 7, 256])
def test_timestep_embedding_is_its_formula(dim):
    t = torch.tensor([0, 1, 37, 999])
    out = timestep_embedding(t, dim)
    assert out.dtype == torch.float32 and out.shape == (4, dim)
    half = dim // 2
    for row, step in zip(out, t.tolist(), strict=True):
        for i in range(half):
            angle = step * math.exp(-math.log(10000) * i / half)
            # The float32 angle is off by up to one ulp, which is 6e-5 at 999.
            assert row[i].item() == pytest.approx(math.cos(angle), abs=1e-4)
            assert row[half + i].item() == pytest.approx(math.sin(angle), abs=1e-4)
        assert dim % 2 == 0 or row[-1] == 0


def test_timestep_embedding_takes_fractional_steps():
    assert not torch.equal(
        timestep_embedding(torch.tensor([1.5]), 8), timestep_embedding(torch.tensor([1]), 8)
    )
