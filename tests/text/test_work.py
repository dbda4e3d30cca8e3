"""The counts of a text model's FLOP agree with those of a real forward."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastdit
from fastdit.text.work import costs

PIXART = dict(img_size=8, hidden=24, n_layers=2, n_heads=2, text_width=20, text_tokens=6)
MMDIT = dict(
    img_size=8,
    in_channels=4,
    hidden=24,
    n_layers=3,
    n_heads=2,
    text_width=20,
    pooled_width=12,
    text_tokens=6,
    position_size=8,
)
MODELS = {
    "pixart": (fastdit.PixArt, PIXART),
    "pixart-sizes": (fastdit.PixArt, PIXART | dict(size_conditions=True, learn_sigma=False)),
    "pixart-no-projection": (fastdit.PixArt, PIXART | dict(text_projection=False)),
    "mmdit": (fastdit.MMDiT, MMDIT),
    "mmdit-dual": (fastdit.MMDiT, MMDIT | dict(dual_blocks=(0, 2), qk_norm="rms")),
}


def flop_of(call, *args):
    # PyTorch's counter sees the products of attention only in its MATH backend.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = call(*args)
    return out, counter.get_total_flops()


@torch.no_grad()
@pytest.mark.parametrize(("kind", "options"), MODELS.values(), ids=MODELS.keys())
def test_flop_are_those_of_a_real_forward(kind, options):
    model, rows, M, size = kind(**options), 3, 5, (6, 10)
    cfg = model.cfg
    expected = costs(cfg, rows, M, size)
    text, flop = flop_of(model.encode_text, torch.randn(rows, M, cfg.text_width))
    assert flop == expected.text.flop
    c, of_conditioning = flop_of(model.time_conditioning, torch.zeros(1))
    if kind is fastdit.MMDiT:
        pooled, flop = flop_of(model.pooled_conditioning, torch.randn(rows, cfg.pooled_width))
        c, of_conditioning = c + pooled, of_conditioning + flop
    elif cfg.size_conditions:
        sizes, flop = flop_of(model.size_conditioning, torch.ones(rows, 2), torch.ones(rows, 1))
        c, of_conditioning = c + sizes, of_conditioning + flop
    modulation, flop = flop_of(model.modulation_of, c)
    assert of_conditioning + flop == expected.conditioning.flop
    tokens = torch.randn(rows, 15, cfg.patch_size**2 * cfg.in_channels)
    given = modulation.expand(rows, -1), text, model.positions((3, 5))
    assert flop_of(model.denoise, tokens, *given)[1] == expected.step.flop


def test_the_least_time_is_set_by_weights_for_few_rows_and_by_products_for_many():
    cfg = fastdit.TEXT_PRESETS["PixArt-alpha-XL/2-256"]
    rates = dict(itemsize=2, flop_rate=790e12, byte_rate=4.3e12)
    few, many = (costs(cfg, rows).step for rows in (1, 256))
    weights = sum(p.times * p.inner * p.columns * 2 for p in few.products)
    assert few.floor_seconds(**rates) > weights / 4.3e12
    assert many.flop == 256 * few.flop
    assert 1 < many.floor_seconds(**rates) / (many.flop / 790e12) < 1.3
    # By default the prompt has the most tokens and the image the size of training.
    assert costs(cfg) == costs(cfg, 1, 120, (32, 32)) != costs(cfg, 1, 119)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(text_tokens=121), "text_tokens: expected 1 to 120, .* got 121"),
        (dict(size=(33, 32)), r"size: .* got \(33, 32\)"),
    ],
)
def test_bad_input_is_a_value_error(call, message):
    with pytest.raises(ValueError, match=message):
        costs(fastdit.TEXT_PRESETS["PixArt-alpha-XL/2-256"], **call)
