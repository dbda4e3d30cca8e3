"""What a step must compute and move, against what is published and what a model really does."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastdit
from fastdit import DiTConfig, flops

XL = fastdit.PRESETS["DiT-XL/2"]


def test_the_published_work_is_counted():
    """DiT-XL/2 at 256 x 256: 118.6 Gflops in the paper, which counts a multiply-add as one."""
    by_name = {product.name: product for product in flops.products(XL, 1)}
    assert [round(by_name[n].flop / 1e9, 2) for n in ("qkv", "proj")] == [2.04, 0.68]
    assert flops.flop(XL, 1) / 2e9 == pytest.approx(118.6, rel=0.01)
    assert flops.attention_work(XL, 1, 2) == (28 * 4 * 256 * 256 * 1152, 28 * 2 * 4 * 256 * 1152)


@torch.no_grad()
@pytest.mark.parametrize("cfg", [DiTConfig(), DiTConfig(learn_sigma=True, hidden=96, n_heads=3)])
def test_a_forward_does_what_is_counted(cfg):
    model, rows = fastdit.DiT.from_config(cfg), 3
    tokens = torch.randn(rows, cfg.n_tokens, cfg.patch_size**2 * cfg.in_channels)
    modulation = model.modulation(torch.zeros(rows))
    # PyTorch counts the products of attention where it is made of them.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.denoise(tokens, modulation)
    assert counter.get_total_flops() == flops.flop(cfg, rows)


def test_a_floor_falls_to_the_weights_and_rises_with_the_rows():
    """Few rows cost the reading of the weights; many their products."""
    rates = dict(flop_rate=790e12, byte_rate=4.3e12)
    weights = sum(p.times * p.inner * p.columns * 2 for p in flops.products(XL, 1))
    assert flops.floor_seconds(XL, 1, 2, **rates) > weights / 4.3e12
    many = flops.floor_seconds(XL, 512, 2, **rates)
    assert many == pytest.approx(512 * flops.flop(XL, 1) / 790e12, rel=0.2)
    assert many > 512 * flops.flop(XL, 1) / 790e12
