"""The training of flows: the times that are drawn, and the loss of each path and prediction."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import fastdit
from fastdit import DiTConfig
from fastdit.flow import FlowMatching
from fastdit.testing import randomize
from fastdit.train.flows import FlowTraining
from fastdit.train.losses import flow_loss
from fastdit.train.objective import Objective
from fastdit.train.sources import ImageBatch

CONFIG = DiTConfig(img_size=8, hidden=8, n_layers=1, n_heads=2, null_class=True)
PATHS = {
    "linear": (lambda s: s, lambda s: 1 - s),
    "gvp": (lambda s: torch.sin(math.pi * s / 2), lambda s: torch.cos(math.pi * s / 2)),
    "vp": (
        lambda s: torch.exp(-((1 - s) ** 2) * 19.9 / 4 - (1 - s) * 0.1 / 2),
        lambda s: (1 - torch.exp(-((1 - s) ** 2) * 19.9 / 2 - (1 - s) * 0.1)).sqrt(),
    ),
}


def objective(flow=None, model=None, seed=0, config=CONFIG, **training):
    model = model or fastdit.DiT.from_config(config)
    return Objective(model, config, flow or FlowMatching(), seed, flow=FlowTraining(**training))


def batch(n, shape=(3, 8, 8)):
    images = torch.rand(n, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return ImageBatch(images, None, torch.arange(n) % 16)


def times(n=20_000, flow=None, **training):
    """Return the times of many samples, whose images have one value."""
    config = replace(CONFIG, img_size=1, patch_size=1, in_channels=1)
    drawn = objective(flow, config=config, **training).draw(batch(n, (1, 1, 1)), torch.arange(n))
    assert drawn.t.dtype == torch.float32
    return drawn


def distance(t, cdf):
    """Return the Kolmogorov distance of samples from a distribution."""
    ordered = t.double().sort().values
    n, exact = len(ordered), cdf(ordered)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return max((steps[1:] - exact).max().item(), (exact - steps[:-1]).max().item())


def normal_cdf(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


BOUND = 1.95 / math.sqrt(20_000)  # exceeded by one sample in a thousand


def test_uniform_times_are_uniform():
    t = times().t
    assert 0 <= t.min() and t.max() < 1
    assert distance(t, lambda x: x) < BOUND
    assert abs(t.mean() - 0.5) < 0.01 and abs(t.var() - 1 / 12) < 0.003


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (-0.8, 0.8)])
def test_logit_normal_times_are_the_sigmoid_of_a_normal(mean, deviation):
    t = times(time_draw="logit-normal", time_mean=mean, time_deviation=deviation).t
    assert distance(t, lambda x: normal_cdf((torch.logit(x) - mean) / deviation)) < BOUND
    logits = torch.logit(t.double())
    assert abs(logits.mean() - mean) < 0.03 and abs(logits.std() - deviation) < 0.03


@pytest.mark.parametrize("shift", [0.3, 4.0])
def test_shifted_times_have_the_shifted_distribution(shift):
    """The shift's inverse is the shift by 1 / s."""
    t = times(time_shift=shift).t
    assert distance(t, lambda x: x / shift / (1 + (1 / shift - 1) * x)) < BOUND
    assert (t.mean() < 0.5) == (shift < 1), "below 1 it draws more noise"


def test_times_count_from_the_noise_where_the_models_time_does_not():
    options = dict(time_draw="logit-normal", time_mean=-1.0, time_shift=0.5)
    forwards = times(**options)
    backwards = times(flow=FlowMatching(clean_at=0), **options)
    torch.testing.assert_close(1 - backwards.t, forwards.t, rtol=0, atol=1e-6)
    torch.testing.assert_close(backwards.x_t, forwards.x_t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clean_at", [0, 1])
@pytest.mark.parametrize("draw", ["uniform", "logit-normal"])
def test_times_stay_in_the_span_that_can_be_trained(draw, clean_at):
    for flow in (
        FlowMatching("linear", "epsilon", clean_at),
        FlowMatching("vp", clean_at=clean_at),
    ):
        t = times(2000, flow, time_draw=draw, time_deviation=9.0 if draw != "uniform" else 1.0).t
        low, high = sorted(flow.training_span)
        assert low - 1e-7 <= t.min() and t.max() <= high + 1e-7
        assert t.max() - t.min() > 0.9 * (high - low)


@pytest.mark.parametrize("draw", ["uniform", "logit-normal"])
def test_time_and_noise_depend_on_the_samples_number_and_the_seed_alone(draw):
    images, numbers = batch(64), torch.arange(64)
    own = objective(time_draw=draw)
    whole = own.draw(images, numbers)
    part = own.draw(ImageBatch(images.mean[40:50], None, images.labels[40:50]), numbers[40:50])
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[40:50], b)
    other = objective(time_draw=draw, seed=1).draw(images, numbers)
    assert not torch.equal(other.t, whole.t) and not torch.equal(other.eps, whole.eps)


@pytest.mark.parametrize("draw", ["uniform", "logit-normal"])
def test_time_label_and_noise_are_independent(draw):
    n = 8192
    flow = FlowTraining(time_draw=draw)
    own = Objective(
        fastdit.DiT.from_config(CONFIG), CONFIG, FlowMatching(), 0, label_dropout=0.5, flow=flow
    )
    drawn = own.draw(batch(n), torch.arange(n))
    dropped = drawn.labels == 16
    assert 0.48 < dropped.float().mean() < 0.52
    first = drawn.eps.flatten(1)[:, :8].T
    rows = torch.stack([drawn.t, dropped.float(), *first, *first.abs()])
    assert torch.corrcoef(rows)[:2].triu(1).abs().max() < 0.05


def exact_loss(path, prediction, out, x0, z, s, noise_scale=1.0, sign=1):
    """Return the loss by the formulas of the papers, with autograd's derivatives in time."""
    s = s.clone().requires_grad_()
    a, b = (f(s) for f in PATHS[path])
    b = noise_scale * b
    (da,) = torch.autograd.grad(a.sum(), s, retain_graph=True)
    (db,) = torch.autograd.grad(b.sum(), s)
    a, b, da, db = (c.detach()[:, None, None, None] for c in (a, b, da, db))
    x_t = a * x0 + b * z
    if prediction == "velocity":
        error = out - sign * (da * x0 + db * z)
    elif prediction == "epsilon":
        error = out - z
    elif prediction == "score":
        error = out * b + z
    else:
        error = out - x0
    return x_t, (error**2).mean()


@pytest.mark.parametrize("clean_at", [1, 0], ids=["clean-at-1", "clean-at-0"])
@pytest.mark.parametrize("prediction", ["velocity", "epsilon", "score", "sample"])
@pytest.mark.parametrize("path", PATHS)
def test_the_loss_of_every_path_and_prediction_is_the_published_one(path, prediction, clean_at):
    flow = FlowMatching(path, prediction, clean_at, time_scale=7.0, noise_scale=2.0)
    images, numbers = batch(8), torch.arange(8)
    images = images._replace(mean=images.mean.double())
    seen = []

    def model(x_t, t, labels):
        seen.append((x_t, t))
        return torch.sin(3 * x_t) + t.double()[:, None, None, None] / 7

    own = objective(flow, model=model)
    drawn = own.draw(images, numbers)
    loss = own(images, numbers)
    ((x_t, t),) = seen
    assert torch.equal(t, drawn.t * 7)
    s = drawn.t.double() if clean_at else 1 - drawn.t.double()
    out = model(x_t, t, None)
    sign = 1 if clean_at else -1
    state, exact = exact_loss(path, prediction, out, images.mean, drawn.eps, s, 2.0, sign)
    torch.testing.assert_close(x_t, state, rtol=1e-12, atol=1e-12)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-10)


def test_the_loss_of_images_is_taken_in_the_velocity_where_the_noise_is_bounded():
    """As JiT does: both the image and its prediction give a velocity, by one bounded divisor."""
    flow = FlowMatching("linear", "sample", min_noise=0.3)
    x0, z, out = torch.randn(3, 16, 3, 4, 4, dtype=torch.float64)
    t = torch.linspace(0.05, 0.99, 16)
    assert (t > 0.7).any() and (t < 0.7).any()
    s = t.double()[:, None, None, None]
    x_t = s * x0 + (1 - s) * z
    divisor = (1 - s).clamp(min=0.3)
    exact = (((x0 - x_t) / divisor - (out - x_t) / divisor) ** 2).mean()
    assert flow_loss(out, x0, t, z, flow).item() == pytest.approx(exact.item(), rel=1e-10)


def test_the_loss_of_the_direction_is_one_minus_the_cosine_over_the_channels():
    flow = FlowMatching()
    x0, z, out = torch.randn(3, 4, 5, 2, 3, dtype=torch.float64)
    t, v = torch.rand(4), x0 - z
    lengths = out.square().sum(1).sqrt() * v.square().sum(1).sqrt()
    cosines = (out * v).sum(1) / lengths
    assert cosines.shape == (4, 2, 3)
    exact = (out - v).square().mean() + 0.7 * (1 - cosines).mean()
    loss = flow_loss(out, x0, t, z, flow, direction=0.7)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-10)


def test_of_a_learned_variance_nothing_is_trained():
    flow = FlowMatching()
    x0, z = torch.randn(2, 4, 3, 2, 2)
    out = torch.randn(4, 6, 2, 2, requires_grad=True)
    t = torch.rand(4)
    loss = flow_loss(out, x0, t, z, flow, direction=1.0)
    first = flow_loss(out[:, :3], x0, t, z, flow, direction=1.0)
    assert torch.equal(loss, first)
    (gradient,) = torch.autograd.grad(loss, out)
    assert gradient[:, :3].abs().min() > 0 and not gradient[:, 3:].any()


def test_a_models_loss_is_that_of_its_output():
    """In float32, and with the model's time scaled."""
    flow = FlowMatching("gvp", time_scale=100.0)
    own = objective(flow, time_draw="logit-normal", time_shift=0.5, direction_loss=1.0)
    randomize(own.model)
    images, numbers = batch(8), torch.arange(8)
    drawn = own.draw(images, numbers)
    out = own.model(drawn.x_t, 100 * drawn.t, drawn.labels)
    a, b = (f(drawn.t.double()) for f in PATHS["gvp"])
    rate = (math.pi / 2 * c.float()[:, None, None, None] for c in (b, -a))
    target = next(rate) * drawn.x0 + next(rate) * drawn.eps
    exact = F.mse_loss(out, target) + (1 - F.cosine_similarity(out, target, dim=1)).mean()
    assert own(images, numbers).item() == pytest.approx(exact.item(), rel=1e-5)
