"""A model is fitted to other data: what the data change is made anew, and all else is kept."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdit
from fastdit import PRESETS, DiTConfig
from fastdit.checkpoints import adaptation
from fastdit.checkpoints.adaptation import adapted
from fastdit.testing import randomize

TOY = DiTConfig(img_size=8, hidden=16, n_layers=2, n_heads=2, num_classes=6)
PUBLISHED = replace(PRESETS["DiT-S/2"], img_size=8, hidden=16, n_layers=2, n_heads=2, num_classes=6)
by_config = pytest.mark.parametrize("cfg", [TOY, PUBLISHED], ids=["toy", "published"])
CLASSES = {"y_embed.weight"}
CHANNELS = {"patch_embed.proj.weight", "patch_embed.proj.bias"}
CHANNELS |= {"final_linear.weight", "final_linear.bias"}


def make_model(cfg, dtype=torch.float32):
    model = fastdit.DiT.from_config(cfg)
    randomize(model)
    return model.to(dtype)


def changed(model, fitted):
    """Return the names of the weights that are not the model's to the bit."""
    own, new = model.state_dict(), fitted.state_dict()
    assert own.keys() == new.keys()
    return {name for name in own if not torch.equal(own[name], new[name])}


@torch.no_grad()
def forward(model, batch=3):
    cfg = model.cfg
    x = torch.randn(batch, *cfg.sample_shape).to(model.pos_embed.dtype)
    out = model(x, torch.tensor([0, 5, 9]), torch.arange(batch) % cfg.class_rows)
    assert out.shape == (batch, cfg.out_channels, *cfg.sample_shape[1:]) and out.isfinite().all()
    return out


@by_config
@pytest.mark.parametrize(
    ("change", "names", "phrases"),
    [
        ({"num_classes": 5}, CLASSES, ["the 5 class rows"]),
        ({"num_classes": 1}, CLASSES, ["the 1 class row"]),
        ({"num_classes": 40}, CLASSES, ["the 40 class rows"]),
        (
            {"in_channels": 1},
            CHANNELS,
            ["the patch embedding of 1 channel", "the final linear, which starts at zero"],
        ),
        (
            {"in_channels": 5, "num_classes": 5, "img_size": None},
            CLASSES | CHANNELS,
            [
                "the 5 class rows",
                "the patch embedding of 5 channels",
                "the final linear, which starts at zero",
            ],
        ),
    ],
    ids=["fewer-classes", "one-class", "more-classes", "channels", "both"],
)
def test_what_the_data_change_is_made_anew_and_the_rest_is_kept(cfg, change, names, phrases):
    model = make_model(cfg)
    fitted, made = adapted(model, **change)
    assert changed(model, fitted) == names and made == phrases
    assert fitted.cfg == replace(cfg, **{k: n for k, n in change.items() if n is not None})
    assert model.cfg == cfg, "the model that was given is left as it is"
    forward(fitted)


@by_config
@pytest.mark.parametrize("img_size", [4, 12, (4, 12), (12, 8)], ids=str)
def test_another_size_makes_only_the_positions_anew(cfg, img_size):
    model = make_model(cfg)
    fitted, made = adapted(model, img_size=img_size)
    assert changed(model, fitted) == {"pos_embed"}
    assert fitted.cfg == replace(cfg, img_size=img_size)
    new, old = (f"{c.grid[0]} x {c.grid[1]}" for c in (fitted.cfg, cfg))
    how = f", interpolated from {old}" if cfg.pos_embed == "learned" else ""
    assert made == [f"the positions of {new} patches{how}"]
    forward(fitted)


@by_config
def test_the_models_own_numbers_change_nothing(cfg):
    model = make_model(cfg)
    for change in (
        {},
        {"num_classes": 6, "img_size": (8, 8), "in_channels": cfg.in_channels},
        {"img_size": [8, 8]},
    ):
        fitted, made = adapted(model, **change)
        assert fitted is model and made == []


def test_classes_keep_the_null_row_and_draw_the_others():
    model = make_model(PUBLISHED)
    fitted, _ = adapted(model, num_classes=400)
    table = fitted.y_embed.weight
    assert table.shape == (401, 16) and fitted.y_embed.num_embeddings == 401
    assert torch.equal(table[-1], model.y_embed.weight[-1])
    assert table[:-1].std().item() == pytest.approx(0.02, rel=0.03)  # the published draw
    toy, _ = adapted(make_model(TOY), num_classes=400)
    assert toy.y_embed.weight.shape == (400, 16)
    assert toy.y_embed.weight.std().item() == pytest.approx(1, rel=0.03)  # that of nn.Embedding
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    assert torch.equal(fitted(x, t), model(x, t)), "without a label the model is the same"


@by_config
def test_channels_are_drawn_as_in_a_fresh_model(cfg):
    fitted, _ = adapted(make_model(cfg), in_channels=64)
    patch = fitted.patch_embed.proj
    fan_in = 64 * cfg.patch_size**2
    if cfg.init == "xavier":
        bound = math.sqrt(6 / (fan_in + 16))
        assert not patch.bias.any()
    else:  # that of nn.Conv2d
        bound = math.sqrt(1 / fan_in)
        assert 0 < patch.bias.abs().max() <= bound
    assert 0.98 * bound < patch.weight.abs().max() <= bound
    assert patch.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not fitted.final_linear.weight.any() and not fitted.final_linear.bias.any()
    assert not forward(fitted).any(), "as a fresh model"


@pytest.mark.parametrize("grid", [(2, 5), (5, 2), (7, 3)], ids=str)
def test_learned_positions_are_interpolated_bicubically(grid):
    """Each channel is one image for torch's interpolation, filled position by position."""
    cfg = replace(TOY, img_size=(12, 16))  # 3 x 4 patches
    model = make_model(cfg)
    fitted, _ = adapted(model, img_size=(4 * grid[0], 4 * grid[1]))
    for channel in (0, 7, 15):
        image = torch.empty(1, 1, 3, 4)
        for n in range(12):
            image[0, 0, n // 4, n % 4] = model.pos_embed[0, n, channel]
        expected = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)[0, 0]
        for n in range(grid[0] * grid[1]):
            value = expected[n // grid[1], n % grid[1]]
            torch.testing.assert_close(fitted.pos_embed[0, n, channel], value)


def test_rows_and_columns_are_interpolated_separately():
    """Positions that are a function of the row alone stay so, and more columns change nothing."""
    model = make_model(replace(TOY, img_size=(12, 16)))
    with torch.no_grad():
        of_row = torch.randn(3, 1, 16).expand(3, 4, 16)
        model.pos_embed.copy_(of_row.reshape(1, 12, 16))
    fitted, _ = adapted(model, img_size=(12, 36))
    table = fitted.pos_embed.view(3, 9, 16)
    torch.testing.assert_close(table, of_row[:, :1].expand(3, 9, 16))


@pytest.mark.parametrize(
    ("dtype", "arithmetic"),
    [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
    ids=["bfloat16", "float64"],
)
def test_positions_are_interpolated_in_wide_arithmetic_and_stored_as_before(dtype, arithmetic):
    model = make_model(TOY, dtype)
    fitted, _ = adapted(model, img_size=12)
    wide = model.pos_embed.detach().to(arithmetic).view(2, 2, 16).permute(2, 0, 1)[None]
    expected = F.interpolate(wide, size=(3, 3), mode="bicubic", align_corners=False)
    expected = expected[0].permute(1, 2, 0).reshape(1, 9, 16).to(dtype)
    assert torch.equal(fitted.pos_embed, expected)


@pytest.mark.parametrize("img_size", [(4, 12), 12], ids=str)
def test_fixed_positions_are_those_of_a_fresh_model(img_size):
    model = make_model(PUBLISHED)
    fitted, _ = adapted(model, img_size=img_size)
    fresh = fastdit.DiT.from_config(replace(PUBLISHED, img_size=img_size))
    assert torch.equal(fitted.pos_embed, fresh.pos_embed)


@by_config
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_what_is_trained_are_kept(cfg, dtype):
    model = make_model(cfg, dtype).eval()
    model.final_linear.bias.requires_grad_(False)
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    fitted, _ = adapted(model, num_classes=3, img_size=(4, 8), in_channels=2)
    for (name, a), b in zip(model.named_parameters(), fitted.parameters(), strict=True):
        assert (b.dtype, b.device, b.requires_grad) == (a.dtype, a.device, a.requires_grad), name
    assert fitted.pos_embed.requires_grad == (cfg.pos_embed == "learned")
    assert not fitted.training and adapted(model.train(), num_classes=3)[0].training
    forward(fitted)


def test_draws_are_the_same_in_every_call_and_leave_the_callers_alone():
    model, change = make_model(TOY), dict(num_classes=3, in_channels=2)
    state = torch.get_rng_state()
    first, _ = adapted(model, **change)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    again, _ = adapted(model, **change)
    assert not changed(first, again)
    classes_only, _ = adapted(model, num_classes=3)
    assert len({row.sum().item() for row in classes_only.y_embed.weight}) == 3


def test_the_class_tables_of_all_blocks_are_drawn(monkeypatch):
    """Each block may have an embedding of its own, as diffusers trains them."""

    class PerBlock(fastdit.DiT):
        def __init__(self, **options):
            super().__init__(**options)
            del self.y_embed
            for block in self.blocks:
                block.y_embed = nn.Embedding(self.cfg.class_rows, self.cfg.hidden)

    monkeypatch.setattr(adaptation, "DiT", PerBlock)
    model = PerBlock.from_config(PUBLISHED)
    randomize(model)
    fitted, made = adapted(model, num_classes=4)
    assert changed(model, fitted) == {f"blocks.{i}.y_embed.weight" for i in range(2)}
    assert made == ["the 4 class rows of every block"]
    tables = [block.y_embed.weight for block in fitted.blocks]
    rows = torch.cat([table[:4] for table in tables])
    assert len({row.sum().item() for row in rows}) == 8, "no row is drawn twice"
    for table, block in zip(tables, model.blocks, strict=True):
        assert table.shape == (5, 16) and torch.equal(table[4], block.y_embed.weight[6])


def test_a_fitted_model_is_saved_and_trained(tmp_path):
    fitted, _ = adapted(make_model(TOY), num_classes=3, img_size=(4, 12), in_channels=1)
    fastdit.save(fitted, tmp_path / "m.safetensors")
    again = fastdit.load(tmp_path / "m.safetensors")
    assert again.cfg == fitted.cfg and not changed(fitted, again)
    out = fitted(torch.randn(2, 1, 4, 12), torch.tensor([0, 1]), torch.tensor([0, 2]))
    out.sum().backward()
    assert fitted.final_linear.weight.grad.norm() > 0


@pytest.mark.parametrize(
    ("cfg", "change", "message"),
    [
        (TOY, {"num_classes": 0}, "num_classes: expected a positive integer, got 0"),
        (TOY, {"in_channels": 1.0}, "in_channels: expected a positive integer, got 1.0"),
        (TOY, {"img_size": 10}, "img_size: expected a multiple of 4, got 10"),
        (TOY, {"img_size": (8, 9)}, "(height, width), each a multiple of 4, got (8, 9)"),
        (
            replace(TOY, use_class_cond=False),
            {"num_classes": 6},
            "num_classes: expected None, since the model has use_class_cond=False, got 6",
        ),
    ],
    ids=["classes", "channels", "size", "pair", "no-classes"],
)
def test_what_cannot_be_fitted_is_an_error(cfg, change, message):
    with pytest.raises(ValueError) as error:
        adapted(make_model(cfg), **change)
    assert message in str(error.value)


def test_a_model_without_classes_takes_another_size_and_other_channels():
    model = make_model(replace(TOY, use_class_cond=False))
    fitted, _ = adapted(model, img_size=(4, 8), in_channels=1)
    x, t = torch.randn(2, 1, 4, 8), torch.tensor([0, 1])
    assert fitted(x, t).shape == x.shape
