"""The oracle and the model compared with the published formulas, which are written out here.

No expected value in this file is computed by fastdit, so a fault that the oracle and the model
share shows.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdit
from fastdit import PRESETS, DiTConfig, reference
from fastdit.testing import randomize, relative_error

by_model = pytest.mark.parametrize(
    "model_class", [reference.DiT, fastdit.DiT], ids=["reference", "fastdit"]
)
PUBLISHED = replace(
    PRESETS["DiT-S/2"], img_size=8, hidden=32, n_layers=2, n_heads=2, num_classes=10
)


class PlainBlock(nn.Module):
    """The weights of a block, in the order in which the published code makes them."""

    def __init__(self, D):
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        self.adaLN_modulation = nn.Linear(D, 6 * D)


class PlainDiT(nn.Module):
    """The toy's weights as its author draws them, or if `published`, as Peebles & Xie do."""

    def __init__(self, cfg, published):
        super().__init__()
        D, p, N = cfg.hidden, cfg.patch_size, cfg.n_tokens
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(cfg.in_channels, D, p, stride=p)
        self.pos_embed = nn.Parameter(torch.zeros(1, N, D), requires_grad=not published)
        width = 256 if published else D
        self.t_embed = nn.Sequential(nn.Linear(width, D), nn.SiLU(), nn.Linear(D, D))
        self.y_embed = nn.Embedding(cfg.num_classes + published, D)
        self.blocks = nn.ModuleList(PlainBlock(D) for _ in range(cfg.n_layers))
        self.final_mod = nn.Linear(D, 2 * D)
        self.final_linear = nn.Linear(D, p * p * cfg.in_channels * (1 + published))
        if published:
            self.draw_as_published(D, *cfg.grid)
        else:
            nn.init.normal_(self.pos_embed, std=0.02)
        zeroed = [*(block.adaLN_modulation for block in self.blocks), self.final_mod]
        for layer in [*zeroed, self.final_linear]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def draw_as_published(self, D, rows, columns):
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.t_embed[0].weight, std=0.02)
        nn.init.normal_(self.t_embed[2].weight, std=0.02)
        nn.init.normal_(self.y_embed.weight, std=0.02)
        for n in range(rows * columns):
            for i in range(D // 4):
                omega = 10000 ** (-i / (D // 4))
                column, row = n % columns * omega, n // columns * omega
                values = math.sin(column), math.cos(column), math.sin(row), math.cos(row)
                for part, value in enumerate(values):
                    self.pos_embed[0, n, part * (D // 4) + i] = value


@by_model
@pytest.mark.parametrize(
    ("cfg", "published"),
    [(DiTConfig(), False), (PUBLISHED, True), (replace(PUBLISHED, img_size=(4, 16)), True)],
    ids=["seed", "published", "wide"],
)
def test_fresh_weights_have_the_published_names_and_draws(model_class, cfg, published):
    """Draws of one seed are equal bit for bit; computed positions agree to a rounding."""
    torch.manual_seed(7)
    expected = PlainDiT(cfg, published)
    torch.manual_seed(7)
    model = model_class(**cfg.to_dict())
    assert list(model.state_dict()) == list(expected.state_dict())
    for (name, own), plain in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert own.requires_grad == plain.requires_grad, name
        if name == "pos_embed" and published:
            assert (own - plain).abs().max() < 1e-6
        else:
            assert torch.equal(own, plain), name


def toy_forward(w, x, t, y, heads):
    """The toy's forward as its author wrote it, from a state dict, image by image, head by head."""
    D, p = w["pos_embed"].shape[2], w["patch_embed.proj.weight"].shape[2]

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def normed(h):
        mean = h.mean(-1, keepdim=True)
        return (h - mean) / ((h - mean).pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    def gelu(h):
        return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))

    out = []
    for image, step, label in zip(x, t.tolist(), y.tolist(), strict=True):
        angles = [step * math.exp(-math.log(10000) * i / (D // 2)) for i in range(D // 2)]
        e = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=x.dtype)
        c = linear("t_embed.2", gelu(linear("t_embed.0", e))) + w["y_embed.weight"][label]
        tokens = [
            w["patch_embed.proj.weight"].flatten(1) @ image[:, i : i + p, j : j + p].flatten()
            for i in range(0, image.shape[1], p)
            for j in range(0, image.shape[2], p)
        ]
        h = torch.stack(tokens) + w["patch_embed.proj.bias"] + w["pos_embed"][0]
        layer = 0
        while f"blocks.{layer}.attn.qkv.weight" in w:
            b = f"blocks.{layer}"
            scale1, shift1, gate1, scale2, shift2, gate2 = linear(f"{b}.adaLN_modulation", c).chunk(
                6
            )
            q, k, v = linear(f"{b}.attn.qkv", normed(h) * (1 + scale1) + shift1).chunk(3, dim=1)
            d = D // heads
            mixed = []
            for head in range(heads):
                own = slice(head * d, (head + 1) * d)
                weights = torch.softmax(q[:, own] @ k[:, own].T / math.sqrt(d), dim=1)
                mixed.append(weights @ v[:, own])
            h = h + gate1 * linear(f"{b}.attn.proj", torch.cat(mixed, dim=1))
            m = gelu(linear(f"{b}.mlp.0", normed(h) * (1 + scale2) + shift2))
            h = h + gate2 * linear(f"{b}.mlp.2", m)
            layer += 1
        scale, shift = linear("final_mod", c).chunk(2)
        patches = linear("final_linear", normed(h) * (1 + scale) + shift)
        result, n = torch.empty_like(image), 0
        for i in range(0, image.shape[1], p):
            for j in range(0, image.shape[2], p):
                result[:, i : i + p, j : j + p] = patches[n].view(p, p, -1).permute(2, 0, 1)
                n += 1
        out.append(result)
    return torch.stack(out)


@by_model
@torch.no_grad()
def test_a_forward_equals_the_formulas_of_the_toys_author(model_class):
    model = model_class(n_layers=2).double()
    randomize(model)
    x, t, y = (
        torch.randn(3, 3, 16, 16).double(),
        torch.tensor([0, 17, 199]),
        torch.tensor([3, 0, 9]),
    )
    expected = toy_forward(model.state_dict(), x, t, y, heads=4)
    # The timestep's embedding is computed in float32 in any dtype.
    assert relative_error(model(x, t, y), expected) < 1e-6


@by_model
@pytest.mark.parametrize("size", [(8, 24), (24, 8)], ids=str)
@torch.no_grad()
def test_a_patch_has_its_own_pixels_and_position(model_class, size):
    """A model whose gates are zero computes each patch by itself, from pixels and a position."""
    model = model_class(img_size=size, hidden=8, n_layers=1, n_heads=1).double()
    randomize(model)
    for name, p in model.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_mod"):
            p.zero_()
    x = torch.randn(2, 3, *size).double()
    out = model(x, torch.tensor([3, 5]), torch.tensor([0, 1]))
    assert out.shape == x.shape
    patch, final = model.patch_embed.proj, model.final_linear
    for row in range(size[0] // 4):
        for column in range(size[1] // 4):
            own = (..., slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
            h = torch.einsum("bcij,dcij->bd", x[own], patch.weight) + patch.bias
            h = F.layer_norm(h + model.pos_embed[0, row * (size[1] // 4) + column], [8])
            expected = (h @ final.weight.T + final.bias).view(2, 4, 4, 3).permute(0, 3, 1, 2)
            assert relative_error(out[own], expected) < 1e-12


@by_model
@torch.no_grad()
@pytest.mark.parametrize("act", ["none", "silu"])
def test_conditioning_is_the_sum_of_time_and_label(model_class, act):
    """This covers the choices that the toy does not make: SiLU, a null row, another width."""
    options = dict(modulation_act=act, t_embed_act="silu", t_embed_width=9, null_class=True)
    model = model_class(hidden=16, n_layers=1, n_heads=2, **options).double()
    randomize(model)
    t = torch.tensor([0, 5])
    angles = t[:, None] * torch.tensor([math.exp(-math.log(10000) * i / 4) for i in range(4)])
    e = F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, 1)).double()
    first, last = model.t_embed[0], model.t_embed[2]
    hidden = e @ first.weight.T + first.bias
    c = hidden * torch.sigmoid(hidden) @ last.weight.T + last.bias
    for y, row in ((torch.tensor([4, 2]), [4, 2]), (None, [16, 16])):
        expected = c + model.y_embed.weight[row]
        if act == "silu":
            expected = expected * torch.sigmoid(expected)
        assert relative_error(model.conditioning(t, y), expected) < 1e-6
