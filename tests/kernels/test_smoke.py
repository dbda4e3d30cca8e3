"""Every op, forward and backward, and every execution once; run this first on a GPU.

On a GPU the shapes are those of DiT-XL/2 and the file takes seconds; interpreted they are tiny.
"""

import functools
import os
from dataclasses import replace

import pytest
import torch

import fastdit
from fastdit import DiffusionScheduler, Guidance, Sampler, functional, noise, reference
from fastdit.ops.trajectory import DiTWeights, Modulation
from fastdit.sampling.predictors import TokenLayout
from fastdit.testing import check_against_oracle, randomize, relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16  # the interpreter lacks bfloat16
# B * D > 4096, so that every tensor has enough elements to be judged.
B, N, D, HEADS = (57, 5, 72, 1) if INTERPRETED else (8, 256, 1152, 16)
STEPS = 2 if INTERPRETED else 8
XL = replace(fastdit.PRESETS["DiT-XL/2"], n_layers=2)
LATENTS = replace(XL, img_size=8, hidden=16, n_layers=1, n_heads=1) if INTERPRETED else XL
PIXELS = replace(fastdit.PRESETS["toy"], n_layers=1) if INTERPRETED else fastdit.PRESETS["toy"]


def modulated(names):
    """Return [B, N, D] for each upper-case name, and chunks of one [B, 6 D] for the others."""
    chunks = iter(torch.randn(B, 6 * D).chunk(6, dim=1))
    return [torch.randn(B, N, D) if name.isupper() else next(chunks) for name in names]


OPS = {
    "layer_norm_modulate": (lambda: modulated(["X", "scale", "shift"]), 1e-6),
    "gated_residual_layer_norm_modulate": (
        lambda: modulated(["X", "Y", "gate", "scale", "shift"]),
        1e-6,
    ),
    "rms_norm_modulate": (lambda: modulated(["X", "scale", "shift"]) + [torch.randn(D)], 1e-6),
    "gated_residual_rms_norm_modulate": (
        lambda: modulated(["X", "Y", "gate", "scale", "shift"]) + [torch.randn(D)],
        1e-6,
    ),
    "attention": (lambda: [torch.randn(B, N, 3 * D)], HEADS),
    "swiglu": (lambda: [torch.randn(B, N, 2 * D)],),
}


def results(function, tensors, *rest):
    """Return the outputs and the gradients of all inputs, under one upstream gradient."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outs = function(*leaves, *rest)
    outs = outs if isinstance(outs, tuple) else (outs,)
    own = torch.Generator().manual_seed(1)
    upstream = [torch.randn(out.shape, generator=own).to(out) for out in outs]
    return [t.detach() for t in (*outs, *torch.autograd.grad(outs, leaves, upstream))]


@pytest.mark.parametrize("op", OPS)
def test_an_op_and_its_gradients_meet_the_error_rule(op, device):
    make, *last = OPS[op]
    tensors = [t.to(device, DTYPE) for t in make()]
    own, formula = (
        functools.partial(getattr(functional, op), backend="triton"),
        getattr(reference, op),
    )
    actual, plain = results(own, tensors, *last), results(formula, tensors, *last)
    oracle = results(formula, [t.double() for t in tensors], *last)
    for triple in zip(actual, plain, oracle, strict=True):
        if triple[0].dim() > 1:  # a weight [D] has too few elements to be judged
            check_against_oracle(*triple)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_qk_norm_rope_and_its_gradients_meet_the_error_rule(norm, device):
    """The weights' gradients have too few elements for the rule; they are bounded beside it."""
    d, images = D // HEADS, 4 if INTERPRETED else B
    weights = [torch.randn(d) for _ in range(4 if norm == "layer" else 2)]
    angles = torch.arange(N)[:, None] * torch.linspace(0.1, 1, d // 2)
    table = torch.stack([angles.cos(), angles.sin()]).to(device)

    def call(op, qkv, *given, **backend):
        q_weight, q_bias, k_weight, k_bias = (
            given if norm == "layer" else (given[0], None, given[1], None)
        )
        rope = table.to(torch.promote_types(qkv.dtype, torch.float32))
        return op(qkv, HEADS, q_weight, q_bias, k_weight, k_bias, rope, **backend)

    tensors = [t.to(device, DTYPE) for t in (torch.randn(images, N, 3 * D), *weights)]
    own = functools.partial(call, functional.qk_norm_rope, backend="triton")
    plain = functools.partial(call, reference.qk_norm_rope)
    actual, expected = results(own, tensors), results(plain, tensors)
    oracle = results(plain, [t.double() for t in tensors])
    for triple in zip(actual[:2], expected[:2], oracle[:2], strict=True):
        check_against_oracle(*triple)
    for gradient, exact in zip(actual[2:], oracle[2:], strict=True):
        assert relative_error(gradient, exact) < 2 * torch.finfo(DTYPE).eps


def test_an_update_with_guidance_and_its_own_noise_meets_the_error_rule(device):
    images, shape = (2, (64, 32, 4)) if INTERPRETED else (32, (1024, 1, 4))
    P, C = shape[0] * shape[1], shape[2]
    seeds = torch.arange(2 * images).view(images, 2)
    x, z = (
        torch.randn(images, P, C),
        noise.normal(seeds, torch.tensor([3]), P * C)[0].view(-1, P, C),
    )
    out = torch.randn(2 * images, P, 2 * C).to(DTYPE)
    row = (1.3, -0.7, 1.25, 0.4, 0.3, 0.5, -0.2, 0.6, -1.5, -0.5)
    own = [t.to(device) for t in (x, out, torch.tensor([row] * 4), torch.tensor(2))]
    guidance = Guidance(4.0, channels=3)
    actual = functional.sampler_update(
        *own, seeds=seeds.to(device), guidance=guidance, backend="triton"
    )

    def update(dtype):
        floats = [t.to(dtype) for t in (x, out, torch.tensor([row] * 4), z)]
        return reference.sampler_update(
            *floats[:3], torch.tensor(2), noise=floats[3], guidance=guidance
        )

    for triple in zip(actual, update(torch.float32), update(torch.float64), strict=True):
        check_against_oracle(triple[0].cpu(), *triple[1:])


def loops(cfg, labels, device, execution, dtype=torch.float32, guidance=None):
    """Return a sampler's images, twice, the plain loop's in the same dtype, and the oracle's."""
    model = fastdit.DiT.from_config(cfg)
    randomize(model)
    exact = reference.DiT.from_config(cfg)
    exact.load_state_dict(model.state_dict())
    layout, steps = TokenLayout(cfg.sample_shape, cfg.patch_size), torch.arange(STEPS + 1)
    seeds = torch.tensor([[5, i] for i in range(len(labels))])
    z = noise.normal(seeds, steps, layout.shape.numel()).view(-1, *layout.shape)
    z = layout.to_images(z).unflatten(0, (STEPS + 1, len(labels))).to(device)
    scheduler, y = DiffusionScheduler(STEPS, schedule="cosine"), torch.tensor(labels, device=device)
    model = model.to(device)
    if execution == "triton":  # the trajectory in Triton, which a Sampler uses on a GPU only
        images = [trajectory(model.to(dtype), scheduler, z, seeds, y)] * 2
    else:
        sampler = Sampler(model.to(dtype), scheduler, guidance=guidance, execution=execution)
        images = [sampler(labels, seed=5) for _ in range(2)]
    plain = reference.DiT.from_config(cfg)
    plain.load_state_dict(exact.state_dict())
    in_dtype = InDtype(plain.to(device, dtype), dtype)
    plain = reference.sample(in_dtype, scheduler, z[0], y, z[1:], guidance)
    z, exact = z.double(), exact.to(device).double()
    return images, plain, reference.sample(exact, scheduler, z[0], y, z[1:], guidance)


class InDtype(torch.nn.Module):
    """A model with its own dtype in a loop whose state is float32."""

    def __init__(self, model, dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x, t, y):
        return self.model(x.to(self.dtype), t, y).to(x.dtype)


@torch.no_grad()
def trajectory(model, scheduler, z, seeds, y):
    """Take all steps by the Triton trajectory."""
    cfg, layout = model.cfg, TokenLayout(model.cfg.sample_shape, model.cfg.patch_size)
    table = fastdit.solvers.DDPM().table(scheduler, None)
    by_step = [model.modulation(torch.full_like(y, t), y) for t in table.timesteps]
    modulation = Modulation(torch.stack(by_step), None, torch.arange(len(y)).to(y.device))
    x = layout.to_state(z[0]).contiguous()
    coefficients = table.coefficients.to(x.device)
    on = (DiTWeights.of(model), modulation, coefficients, 0, seeds.to(x.device))
    assert cfg.n_tokens == 16
    return layout.to_images(functional.trajectory(x, 0 * x, *on, backend="triton")[0])


def test_a_guided_loop_of_published_shape_meets_the_error_rule_and_repeats_its_bits(device):
    """On a GPU this is the graph execution, captured in the first call and replayed in both."""
    execution = "graph" if device.type == "cuda" else "eager"
    labels = [3, 7, 999] if device.type == "cuda" else list(range(16))
    guidance = Guidance(2.0, channels=3)
    images, plain, oracle = loops(LATENTS, labels, device, execution, DTYPE, guidance)
    assert torch.equal(*images)
    check_against_oracle(images[0], plain, oracle)


def test_the_eager_loop_meets_the_error_rule(device):
    images, plain, oracle = loops(PIXELS, [3, 7, 0, 1, 2, 15], device, "eager")
    check_against_oracle(images[0], plain, oracle)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=["float32", "bfloat16"],
)
def test_the_trajectory_meets_the_error_rule(dtype, device):
    images, plain, oracle = loops(PIXELS, [3, 7, 0, 1, 2, 15], device, "triton", dtype)
    check_against_oracle(images[0], plain, oracle)


def test_a_training_step_of_published_shape_meets_the_error_rule(device):
    """All gradients are judged as one tensor, and those with enough elements by themselves too."""
    x, y = torch.randn(4, *LATENTS.sample_shape), torch.arange(4)
    t = torch.tensor([1, 50, 400, 999])
    model = fastdit.DiT.from_config(LATENTS)
    randomize(model)

    def gradients(kind, dtype):
        own = kind.from_config(LATENTS)
        own.load_state_dict(model.state_dict())
        own.to(device, dtype)
        own(x.to(device, dtype), t.to(device), y.to(device)).square().mean().backward()
        return {n: p.grad for n, p in own.named_parameters() if p.grad is not None}

    runs = [
        gradients(fastdit.DiT, DTYPE),
        gradients(reference.DiT, DTYPE),
        gradients(reference.DiT, torch.float64),
    ]
    check_against_oracle(*(torch.cat([g.flatten() for g in own.values()]) for own in runs))
    for name, oracle in runs[2].items():
        if oracle.numel() >= 4096:
            check_against_oracle(runs[0][name], runs[1][name], oracle)
