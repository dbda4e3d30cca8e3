"""The loss: the squared error, and the bound against PyTorch's own distributions."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastdit import DiffusionScheduler, DiTConfig
from fastdit.train.losses import diffusion_loss
from fastdit.train.recipe import Recipe
from fastdit.train.sources import Shapes
from fastdit.train.trainer import Trainer

T = 50
SCHEDULER = DiffusionScheduler(T, schedule="linear-scaled")


def batch(t, B=64):
    t = torch.full((B,), t)
    x0 = (2 * torch.rand(B, 2, 4, 4, dtype=torch.float64) - 1).mul(127.5).round() / 127.5
    x0[0], x0[1] = 1, -1  # levels whose bins are unbounded
    eps = torch.randn_like(x0)
    out = torch.cat([eps + 0.1 * torch.randn_like(x0), torch.rand_like(x0) * 2 - 1], dim=1)
    return out, x0, SCHEDULER.q_sample(x0, t, eps), t, eps, SCHEDULER


def step(out, x0, x_t, t):
    """Return the model's step and the posterior as distributions, by the textbook formulas."""
    c = {name: values[int(t[0])] for name, values in SCHEDULER.tables.items()}
    eps, share = out.chunk(2, dim=1)
    predicted = (x_t - (1 - c["alpha_bars"]).sqrt() * eps) / c["alpha_bars"].sqrt()

    def mean(x0):
        of_x0 = c["alpha_bars_prev"].sqrt() * c["betas"] / (1 - c["alpha_bars"])
        return (
            of_x0 * x0
            + c["alphas"].sqrt() * (1 - c["alpha_bars_prev"]) / (1 - c["alpha_bars"]) * x_t
        )

    low = SCHEDULER.tables["posterior_var"][max(1, int(t[0]))].log()
    log_variance = (share + 1) / 2 * c["betas"].log() + (1 - share) / 2 * low
    return Normal(mean(predicted), (log_variance / 2).exp()), Normal(mean(x0), (low / 2).exp())


@pytest.mark.parametrize("t", [1, 2, 25, T - 1])
def test_the_bound_is_the_divergence_from_the_posterior(t):
    out, x0, x_t, t, eps, scheduler = batch(t)
    model, posterior = step(out, x0, x_t, t)
    bits = kl_divergence(posterior, model).mean() / math.log(2)
    mse = ((out[:, :2] - eps) ** 2).mean()
    loss = diffusion_loss(out, x0, x_t, t, eps, scheduler)
    assert loss.item() == pytest.approx((mse + bits).item(), rel=1e-10)


def test_at_timestep_0_the_bound_is_the_likelihood_of_the_levels():
    """The published code approximates the normal's CDF with an error of about 1e-3."""
    out, x0, x_t, t, eps, scheduler = batch(0)
    model, _ = step(out, x0, x_t, t)
    above, below = model.cdf(x0 + 1 / 255), model.cdf(x0 - 1 / 255)
    probability = torch.where(x0 > 0.999, 1 - below, torch.where(x0 < -0.999, above, above - below))
    bits = -probability.clamp(min=1e-12).log2().mean()
    loss = diffusion_loss(out, x0, x_t, t, eps, scheduler)
    assert loss.item() - ((out[:, :2] - eps) ** 2).mean().item() == pytest.approx(
        bits.item(), rel=0.02
    )


@pytest.mark.parametrize("t", [0, 25])
def test_the_bound_trains_the_variance_alone(t):
    out, *rest = batch(t)
    out.requires_grad_()
    (gradient,) = torch.autograd.grad(diffusion_loss(out, *rest), out)
    x0, eps = rest[0], rest[3]
    of_mse = 2 * (out[:, :2] - eps) / x0.numel()
    assert torch.allclose(gradient[:, :2], of_mse.detach(), rtol=1e-12, atol=0)
    assert (gradient[:, 2:] != 0).any(dim=0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_narrow_dtypes_lose_few_digits(schedule, dtype):
    """T = 1000 makes alpha_bar nearly 1 at the first timestep and nearly 0 at the last."""
    scheduler = DiffusionScheduler(1000, schedule=schedule)
    for t in (0, 1, 2, 500, 999):
        steps = torch.full((32,), t)
        x0 = (2 * torch.rand(32, 2, 4, 4) - 1).to(dtype)
        eps = torch.randn(32, 2, 4, 4).to(dtype)
        x_t = scheduler.q_sample(x0, steps, eps)
        out = torch.cat([eps, torch.rand_like(eps) * 2 - 1], dim=1)
        loss = diffusion_loss(out, x0, x_t, steps, eps, scheduler)
        exact = diffusion_loss(
            out.double(), x0.double(), x_t.double(), steps, eps.double(), scheduler
        )
        assert loss.item() == pytest.approx(exact.item(), rel=1e-4, abs=1e-7), t


def test_one_step_has_no_variance_to_learn():
    scheduler = DiffusionScheduler(1)
    x = torch.zeros(2, 2, 4, 4)
    t = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="scheduler: a learned variance needs T of 2 or more"):
        diffusion_loss(torch.zeros(2, 4, 4, 4), x, x, t, x, scheduler)


def test_without_a_learned_variance_it_is_the_squared_error():
    out, x0, x_t, t, eps, scheduler = batch(25)
    loss = diffusion_loss(out[:, :2], x0, x_t, t, eps, scheduler)
    assert torch.equal(loss, torch.nn.functional.mse_loss(out[:, :2], eps))


def test_a_learned_variance_is_trained(tmp_path):
    """The loss falls, and the variance's interpolation leaves its initial value, 0."""
    config = DiTConfig(hidden=32, n_layers=1, n_heads=2, learn_sigma=True)
    trainer = Trainer(config, Recipe(steps=32, batch_size=32), Shapes(16), tmp_path)
    losses = trainer.run().losses.view(4, 8).mean(1)
    assert losses[-1] < losses[0]
    samples, numbers = trainer.loader.load(trainer.step)
    batch = trainer.objective.draw(samples, numbers)
    with torch.no_grad():
        assert trainer.model(batch.x_t, batch.t, batch.labels)[:, 3:].abs().mean() > 1e-3


def test_the_variance_gets_the_gradients_of_the_textbook_expression_to_the_bit():
    """A run that a release began goes on in the next one: autograd's order of sums must stay."""
    scheduler, t = DiffusionScheduler(1000), torch.tensor([1, 3, 500, 999])
    x0, eps, predicted = torch.randn(3, 4, 4, 8, 8)
    v = torch.rand(4, 4, 8, 8).requires_grad_()
    x_t = scheduler.q_sample(x0, t, eps)
    diffusion_loss(torch.cat([predicted, v], dim=1), x0, x_t, t, eps, scheduler).backward()

    def at(name):
        return scheduler.gather(name, t, torch.float32)[:, None, None, None]

    w, low, beta = v.detach().clone().requires_grad_(), at("posterior_var").log(), at("betas")
    noise = at("sqrt_one_minus_alpha_bars")
    of_x0 = at("alpha_bars_prev").sqrt() * beta / noise**2
    of_x = at("alphas").sqrt() * at("posterior_var") / beta
    mean = of_x0 * ((x_t - noise * predicted) / at("sqrt_alpha_bars")) + of_x * x_t
    log_variance = low + (w + 1) / 2 * (beta.log() - low)
    divergence = 0.5 * (
        log_variance
        - low
        - 1
        + (low - log_variance).exp()
        + (of_x0 * x0 + of_x * x_t - mean) ** 2 * (-log_variance).exp()
    )
    (divergence / math.log(2)).flatten(1).mean(1).mean().backward()
    assert torch.equal(v.grad, w.grad)
