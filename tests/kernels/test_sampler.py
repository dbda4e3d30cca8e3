"""The sampler on the kernels, whose update draws the noise of the seeds itself."""

import torch

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, Guidance, Sampler, functional, reference
from fastdit.noise import normal
from fastdit.ops.dispatch import choose
from fastdit.testing import randomize, relative_error

STEPS = 3
CFG = DiTConfig(hidden=16, n_layers=1, n_heads=1, null_class=True, learn_sigma=True)


def test_a_guided_loop_on_the_kernels_is_the_plain_one(device):
    model = fastdit.DiT.from_config(CFG)
    randomize(model)
    exact = reference.DiT.from_config(CFG)
    exact.load_state_dict(model.state_dict())
    scheduler, guidance = DiffusionScheduler(STEPS, schedule="cosine"), Guidance(2.0, (1, 3))
    assert choose("layer_norm_modulate", None, next(model.to(device).parameters())) == "triton"
    sampler = Sampler(model, scheduler, guidance=guidance, execution="eager")
    images = sampler([3, 7, 3], seed=5)

    z = normal(torch.tensor([[5, i] for i in range(3)]), torch.arange(STEPS + 1), 768)
    z = functional.unpatchify(z.view(-1, 16, 48), 4).view(STEPS + 1, 3, *CFG.sample_shape).double()
    labels = torch.tensor([3, 7, 3])
    oracle = reference.sample(exact.double(), scheduler, z[0], labels, z[1:], guidance)
    assert relative_error(images, oracle) < 1e-5
