"""fastdit.PixArt and fastdit.MMDiT equal the reference: parameters, outputs and gradients."""

import pytest
import torch

import fastdit
from fastdit import MMDiTConfig, PixArtConfig, reference
from fastdit.testing import check_against_oracle, randomize, relative_error

# Oblong, so that a mistaken axis shows, and of three blocks where the first and last are special.
PIXART = dict(img_size=(6, 10), hidden=24, n_layers=2, n_heads=2, text_width=20, text_tokens=7)
MMDIT = dict(
    img_size=(6, 10),
    in_channels=4,
    hidden=16,
    n_layers=3,
    n_heads=2,
    text_width=20,
    pooled_width=12,
    text_tokens=7,
    position_size=8,
)
CONFIGS = {
    "pixart": PixArtConfig(**PIXART),
    "pixart-sizes": PixArtConfig(**PIXART, size_conditions=True, position_scale=2.0),
    "pixart-no-projection": PixArtConfig(**PIXART, text_projection=False, qkv_bias=False),
    "pixart-erf": PixArtConfig(**PIXART, gelu="erf", learn_sigma=False, ln_eps=1e-2),
    "pixart-patch-1": PixArtConfig(**PIXART | dict(patch_size=1, img_size=(2, 3), n_layers=1)),
    "mmdit": MMDiTConfig(**MMDIT),
    "mmdit-norms": MMDiTConfig(**MMDIT, qk_norm="rms"),
    "mmdit-dual": MMDiTConfig(**MMDIT, qk_norm="rms", dual_blocks=(0, 2)),
    "mmdit-one-block": MMDiTConfig(**MMDIT | dict(n_layers=1), dual_blocks=(0,)),
}
by_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
LOW = {"pixart": CONFIGS["pixart-sizes"], "mmdit": CONFIGS["mmdit-dual"]}
by_family = pytest.mark.parametrize("cfg", LOW.values(), ids=LOW.keys())
RAGGED = torch.tensor([7, 1, 4])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_pair(cfg, dtype=torch.float64):
    name = "PixArt" if isinstance(cfg, PixArtConfig) else "MMDiT"
    plain, model = (getattr(home, name)(**cfg.to_dict()) for home in (reference, fastdit))
    randomize(plain)
    model.load_state_dict(plain.state_dict(), strict=True)
    return plain.to(dtype), model.to(dtype)


def make_inputs(cfg, dtype=torch.float64, size=None, lengths=None):
    """Return the arguments of a forward, of three prompts."""
    size = cfg.sample_shape[1:] if size is None else size
    x = torch.randn(3, cfg.in_channels, *size, dtype=dtype)
    named = dict(t=torch.tensor([3, 500, 999]), lengths=lengths)
    named["text"] = torch.randn(3, 7, cfg.text_width, dtype=dtype)
    if isinstance(cfg, MMDiTConfig):
        named["pooled"] = torch.randn(3, cfg.pooled_width, dtype=dtype)
    elif cfg.size_conditions:
        named["resolution"] = torch.tensor([[48.0, 80.0], [64.0, 64.0], [90.0, 30.0]])
        named["aspect_ratio"] = named["resolution"][:, :1] / named["resolution"][:, 1:]
    return x, named


@by_config
@pytest.mark.parametrize(
    ("size", "lengths"), [(None, None), ((8, 4), RAGGED)], ids=["all-tokens", "ragged"]
)
def test_float64_forward_and_gradients_equal_the_reference(cfg, size, lengths):
    plain, model = make_pair(cfg)
    x, named = make_inputs(cfg, size=size, lengths=lengths)
    inputs = [(x.clone().requires_grad_(), named["text"].clone().requires_grad_()) for _ in "ab"]
    outs = [
        m(x, **named | dict(text=text)) for m, (x, text) in zip((plain, model), inputs, strict=True)
    ]
    assert relative_error(outs[1], outs[0]) < 1e-12
    upstream = torch.randn_like(outs[0])
    for out in outs:
        out.backward(upstream)
    pairs = {"x": (inputs[0][0].grad, inputs[1][0].grad)}
    pairs["text"] = inputs[0][1].grad, inputs[1][1].grad
    own = dict(model.named_parameters())
    pairs |= {name: (p.grad, own[name].grad) for name, p in plain.named_parameters()}
    for name, (expected, actual) in pairs.items():
        if name == unused_of(cfg):
            assert not expected.any() and not actual.any()
            continue
        assert expected.norm() > 0, name
        assert relative_error(actual, expected) < 1e-11, name


def unused_of(cfg):
    """Return the parameter without effect: nothing comes of the last text's queries."""
    if isinstance(cfg, MMDiTConfig) and cfg.qk_norm == "rms":
        return f"blocks.{cfg.n_layers - 1}.text.attn.q_norm.weight"
    return None


@pytest.mark.parametrize("skip", [[0], [2], [1, 2], [0, 1, 2]], ids=str)
def test_skipped_blocks_are_left_out_as_by_the_reference(skip):
    plain, model = make_pair(CONFIGS["mmdit-dual"])
    x, named = make_inputs(plain.cfg, lengths=RAGGED)
    expected = plain(x, **named, skip_layers=skip)
    assert relative_error(model(x, **named, skip_layers=skip), expected) < 1e-12
    assert relative_error(expected, plain(x, **named)) > 1e-3


@by_family
@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["all-tokens", "ragged"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
@torch.no_grad()
def test_low_precision_forward_meets_the_error_rule(cfg, kind, lengths):
    dtype = torch.float32 if kind == "autocast" else getattr(torch, kind)
    models = [make_pair(cfg)[0], *make_pair(cfg, dtype)]
    outs = []
    for _ in range(4):  # seeds, which make over 4096 elements
        x, named = make_inputs(cfg, dtype, size=(12, 10), lengths=lengths)
        exact = {
            k: v.double() if v is not None and v.dtype == dtype else v for k, v in named.items()
        }
        of_each = [models[0](x.double(), **named | exact)]
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            of_each += [m(x, **named) for m in models[1:]]
        outs.append(of_each)
    oracle, plain, actual = (torch.cat(of_one) for of_one in zip(*outs, strict=True))
    check_against_oracle(actual, plain, oracle)


@by_family
def test_float32_gradients_meet_the_error_rule(cfg):
    """All gradients are judged as one vector, each divided by the oracle's norm of it."""
    models = [make_pair(cfg)[0], *make_pair(cfg, torch.float32)]
    vectors = [[], [], []]
    for _ in range(3):  # draws, since some gradients are small sums of large terms
        x, named = make_inputs(cfg, torch.float32, lengths=RAGGED)
        upstream = torch.randn(3, cfg.out_channels, *cfg.sample_shape[1:])
        for model in models:
            own = next(model.parameters()).dtype
            cast = {k: named[k].to(own) for k in ("text", "pooled") if k in named}
            model.zero_grad()
            model(x.to(own), **named | cast).backward(upstream.to(own))
        found = [{name: p.grad.double() for name, p in m.named_parameters()} for m in models]
        norms = {n: g.norm() for n, g in found[0].items() if n != unused_of(cfg)}
        for vector, of_one in zip(vectors, found, strict=True):
            vector += [of_one[name].flatten() / norm for name, norm in norms.items()]
    oracle, plain, actual = map(torch.cat, vectors)
    check_against_oracle(actual, plain, oracle)


@by_family
@torch.no_grad()
def test_every_image_has_its_own_prompt_and_none_reads_padding(cfg):
    """Three images run together and alone, without the padding."""
    _, model = make_pair(cfg)
    x, named = make_inputs(cfg, lengths=RAGGED)
    together = model(x, **named)
    for i, length in enumerate(RAGGED.tolist()):
        alone = {k: v[i : i + 1] for k, v in named.items() if k != "lengths"}
        alone["text"] = alone["text"][:, :length]
        assert relative_error(together[i : i + 1], model(x[i : i + 1], **alone)) < 1e-12
    another = named | dict(text=named["text"].roll(1, 0))
    assert relative_error(model(x, **another), together) > 1e-3
