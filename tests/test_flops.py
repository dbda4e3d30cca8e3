"""The counts of FLOP and bytes agree with the published ones and with a real forward."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastdit
from fastdit import DiTConfig, flops

XL = fastdit.PRESETS["DiT-XL/2"]


def test_flop_are_the_published_ones():
    """DiT-XL/2 at 256 x 256: 118.6 Gflops in the paper, which counts a multiply-add as one."""
    by_name = {product.name: product for product in flops.products(XL, 1)}
    assert [round(by_name[n].flop / 1e9, 2) for n in ("qkv", "proj")] == [2.04, 0.68]
    assert flops.flop(XL, 1) / 2e9 == pytest.approx(118.6, rel=0.01)
    assert flops.attention_work(XL, 1, 2) == (28 * 4 * 256 * 256 * 1152, 28 * 2 * 4 * 256 * 1152)


@torch.no_grad()
@pytest.mark.parametrize(
    "cfg",
    [
        DiTConfig(),
        DiTConfig(learn_sigma=True, hidden=96, n_heads=3),
        DiTConfig(img_size=(8, 20), n_layers=1),
        DiTConfig(embedders="block"),
        DiTConfig(norm="rms", modulation_shift=False, mlp="swiglu", rope=True, qk_norm="rms"),
        DiTConfig(patch_bottleneck=5, context_tokens=3, context_start=1),
    ],
    ids=["toy", "learn-sigma", "oblong", "block", "lightning", "jit"],
)
def test_flop_are_those_of_a_real_forward(cfg):
    model, rows = fastdit.DiT.from_config(cfg), 3
    tokens = torch.randn(rows, cfg.n_tokens, cfg.patch_size**2 * cfg.in_channels)
    modulation = model.modulation(torch.zeros(rows))
    # PyTorch's counter sees the products of attention only in its MATH backend.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.denoise(tokens, modulation)
    assert counter.get_total_flops() == flops.flop(cfg, rows)
    with FlopCounterMode(display=False) as counter:
        model.modulation(torch.zeros(rows))
    conditioning = counter.get_total_flops()
    assert flops.training_flop(cfg, rows) == 3 * (flops.flop(cfg, rows) + conditioning)


def test_the_least_time_is_set_by_weights_for_few_rows_and_by_products_for_many():
    """Few rows take the time to read the weights, many the time to compute the products."""
    rates = dict(flop_rate=790e12, byte_rate=4.3e12)
    weights = sum(p.times * p.inner * p.columns * 2 for p in flops.products(XL, 1))
    assert flops.floor_seconds(XL, 1, 2, **rates) > weights / 4.3e12
    many = flops.floor_seconds(XL, 512, 2, **rates)
    assert many == pytest.approx(512 * flops.flop(XL, 1) / 790e12, rel=0.2)
    assert many > 512 * flops.flop(XL, 1) / 790e12
