"""The loss of numbered samples: what is drawn for each of them, and the model's gradients."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, reference
from fastdit.noise import normal
from fastdit.testing import check_against_oracle, randomize
from fastdit.train.losses import diffusion_loss
from fastdit.train.objective import Objective
from fastdit.train.sources import ImageBatch, Shapes

NULL = DiTConfig(hidden=16, n_layers=1, n_heads=1, null_class=True)
SCHEDULER = DiffusionScheduler(200, schedule="linear-scaled")


def objective(config=NULL, seed=0, **options):
    model = fastdit.DiT.from_config(config)
    return Objective(model, config, SCHEDULER, seed, **options)


def shapes(n):
    return Shapes(per_class=n // 16).take(torch.arange(n))


def test_draws_depend_on_the_samples_number_alone():
    """Noise, timestep and label of a sample are the same in every batch."""
    samples, numbers = shapes(64), torch.arange(64)
    draw = objective(label_dropout=0.5).draw
    whole = draw(samples, numbers)
    part = draw(ImageBatch(samples.mean[40:50], None, samples.labels[40:50]), numbers[40:50])
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[40:50], b)
    other = objective(label_dropout=0.5, seed=1).draw(samples, numbers)
    assert not torch.equal(other.t, whole.t) and not torch.equal(other.eps, whole.eps)


def test_draws_are_distributed_as_they_should_be():
    n = 4096
    samples = ImageBatch(torch.zeros(n, 3, 16, 16), None, torch.arange(n) % 16)
    batch = objective(label_dropout=0.25).draw(samples, torch.arange(n))
    assert abs(batch.eps.mean()) < 3e-3 and abs(batch.eps.std() - 1) < 3e-3
    counts = batch.t.bincount(minlength=200).double()
    assert len(counts) == 200 and counts.sum() == n
    chi_squared = ((counts - n / 200) ** 2 / (n / 200)).sum()
    assert 130 < chi_squared < 280, "199 degrees of freedom"
    dropped = batch.labels == 16
    assert 0.22 < dropped.float().mean() < 0.28
    assert torch.equal(batch.labels[~dropped], samples.labels[~dropped])
    # Timesteps and dropped labels are independent of each other and of the noise. The noise's first
    # four elements share one counter, and its magnitude follows from the counter's first word.
    first = batch.eps.permute(0, 2, 3, 1).flatten(1)[:, :8].T  # in the order of the model's tokens
    drawn = [batch.t.float(), dropped.float(), *batch.eps.flatten(1)[:, :8].T, *first]
    sizes = torch.stack([*drawn, *(part.abs() for part in drawn[2:])])
    assert torch.corrcoef(sizes)[:2].triu(1).abs().max() < 0.07
    for step in range(4):
        own = normal(torch.tensor([[0, 0]]), torch.tensor([step]), 768)
        assert not torch.allclose(own.view(3, 16, 16), batch.eps[0]), "sampling has its own noise"
    assert torch.equal(batch.x_t, SCHEDULER.q_sample(samples.mean, batch.t, batch.eps))


def test_latents_are_drawn_from_their_distribution():
    n = 2048
    mean, std = torch.full((n, 4, 8, 8), 3.0), torch.full((n, 4, 8, 8), 0.5)
    config = replace(NULL, in_channels=4, img_size=8)
    draw = objective(config).draw
    latents = ImageBatch(mean, std, torch.zeros(n, dtype=torch.int64))
    batch = draw(latents, torch.arange(n))
    assert abs(batch.x0.mean() - 3) < 3e-3 and abs(batch.x0.std() - 0.5) < 3e-3
    share = torch.corrcoef(torch.stack([batch.x0.flatten(), batch.eps.flatten()]))[0, 1]
    assert abs(share) < 0.01
    later = draw(latents, torch.arange(n, 2 * n))
    assert not torch.equal(later.x0, batch.x0), "another pass draws others"


def test_the_loss_is_the_published_one():
    own = objective()
    randomize(own.model)
    samples, numbers = shapes(32), torch.arange(32)
    batch = own.draw(samples, numbers)
    expected = F.mse_loss(own.model(batch.x_t, batch.t, batch.labels), batch.eps)
    assert torch.equal(own(samples, numbers), expected)


def test_a_model_without_classes_gets_no_labels():
    config = replace(NULL, null_class=False, use_class_cond=False)
    own = objective(config)
    assert own.draw(shapes(16), torch.arange(16)).labels is None
    assert own(shapes(16), torch.arange(16)).isfinite()


def test_labels_are_dropped_only_where_there_is_a_null_class():
    with pytest.raises(ValueError, match="label_dropout: needs a model with null_class=True"):
        objective(replace(NULL, null_class=False), label_dropout=0.1)


GRADIENT_CONFIGS = {
    "toy": DiTConfig(hidden=32, n_layers=2, n_heads=2, null_class=True),
    "published": DiTConfig(
        hidden=32,
        n_layers=2,
        n_heads=2,
        null_class=True,
        modulation_act="silu",
        gelu="tanh",
        ln_eps=1e-6,
        pos_embed="sincos",
        t_embed_act="silu",
        learn_sigma=True,
    ),
    "block": DiTConfig(hidden=32, n_layers=2, n_heads=2, null_class=True, embedders="block"),
}


def gradients(model, config, samples, autocast=None, **how):
    for block in getattr(model, "blocks", ()):
        if how.get("checkpointing"):
            block.checkpointing = True
        if how.get("compile") == "block":
            block.compile(dynamic=False)
    own = Objective(model, config, SCHEDULER, 7, 0.2, autocast)
    if how.get("compile") == "whole":
        own.compile(dynamic=False)
    own(samples, torch.arange(len(samples.labels))).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


# Every pair of choices occurs, except that the published config is not compiled in every way: the
# compiler does not depend on its choices.
CROSS = [
    *itertools.product(["toy"], [None, torch.bfloat16], ["none"], [False, True]),
    ("toy", None, "block", False),
    ("toy", None, "whole", True),
    ("toy", torch.bfloat16, "block", True),
    ("toy", torch.bfloat16, "whole", False),
    ("block", None, "none", False),
    ("published", None, "none", True),
    ("published", torch.bfloat16, "none", False),
    ("published", torch.bfloat16, "whole", True),
]


@pytest.mark.parametrize(
    ("name", "autocast", "compile", "checkpointing"),
    CROSS,
    ids=lambda value: {None: "float32", True: "checkpointed", False: "kept"}.get(value, str(value)),
)
def test_the_whole_models_gradients_obey_the_error_rule(name, autocast, compile, checkpointing):
    """The oracle is in float64; the plain model under the same autocast sets the bound."""
    torch._dynamo.reset()
    config, samples = GRADIENT_CONFIGS[name], shapes(48)
    model = fastdit.DiT.from_config(config)
    randomize(model)
    plain, oracle = (reference.DiT.from_config(config) for _ in range(2))
    for other in (plain, oracle):
        other.load_state_dict(model.state_dict())
    exact = ImageBatch(samples.mean.double(), None, samples.labels)
    of_oracle = gradients(oracle.double(), config, exact)
    of_plain = gradients(plain, config, samples, autocast)
    actual = gradients(
        model, config, samples, autocast, compile=compile, checkpointing=checkpointing
    )

    def flat(grads, names):
        return torch.cat([grads[n].flatten() for n in names])

    check_against_oracle(*(flat(g, of_oracle) for g in (actual, of_plain, of_oracle)))
    large = [n for n, g in of_oracle.items() if g.numel() >= 4096]
    assert len(large) >= 4
    for n in large:
        check_against_oracle(actual[n], of_plain[n], of_oracle[n])


def test_float64_losses_draw_what_float32_ones_do():
    model = fastdit.DiT.from_config(NULL)
    randomize(model)
    samples, numbers = shapes(32), torch.arange(32)
    single = Objective(model, NULL, SCHEDULER, 0)
    batch = single.draw(samples, numbers)
    exact = Objective(model, NULL, SCHEDULER, 0).draw(
        ImageBatch(samples.mean.double(), None, samples.labels), numbers
    )
    assert torch.equal(exact.eps.float(), batch.eps) and torch.equal(exact.t, batch.t)
    out = model(batch.x_t, batch.t, batch.labels)
    expected = diffusion_loss(out, batch.x0, batch.x_t, batch.t, batch.eps, SCHEDULER)
    assert torch.equal(single(samples, numbers), expected)


def test_checkpointing_keeps_less_for_the_backward():
    config = GRADIENT_CONFIGS["toy"]

    def kept(checkpointing):
        model = fastdit.DiT.from_config(config)
        for block in model.blocks:
            block.checkpointing = checkpointing
        sizes = []

        def pack(t):
            sizes.append(t.nbytes)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            Objective(model, config, SCHEDULER, 0)(shapes(64), torch.arange(64))
        return sum(sizes)

    assert kept(True) < 0.5 * kept(False)
