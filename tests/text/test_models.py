"""PixArt and MMDiT as modules of PyTorch: compiled, copied, moved, in inference mode; bad input."""

import copy
import pickle
import re

import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

import fastdit
from fastdit.testing import randomize

PIXART = dict(img_size=(4, 8), hidden=24, n_layers=2, n_heads=2, text_width=20, text_tokens=7)
MMDIT = dict(
    img_size=(4, 8),
    in_channels=4,
    hidden=16,
    n_layers=2,
    n_heads=2,
    text_width=20,
    pooled_width=12,
    text_tokens=7,
    position_size=8,
    qk_norm="rms",
    dual_blocks=(0,),
)
MODELS = {"pixart": (fastdit.PixArt, PIXART), "mmdit": (fastdit.MMDiT, MMDIT)}
by_model = pytest.mark.parametrize(("kind", "options"), MODELS.values(), ids=MODELS.keys())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(kind, options):
    model = kind(**options)
    randomize(model)
    return model


def inputs(model, size=(4, 8), batch=2, device="cpu"):
    named = dict(x=torch.randn(batch, 4, *size), t=torch.arange(batch) * 100 + 3)
    named["text"] = torch.randn(batch, 5, 20)
    if isinstance(model, fastdit.MMDiT):
        named["pooled"] = torch.randn(batch, 12)
    return {name: value.to(device) for name, value in named.items()}


@by_model
def test_a_forward_is_one_graph_and_takes_other_sizes(kind, options):
    """The second size may compile again; later ones share what that made dynamic."""
    model, counter = make(kind, options), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size in ((4, 8), (6, 10), (8, 4)):
        given = inputs(model, size)
        model(**given)  # keeps positions, which no graph depends on
        assert torch.allclose(compiled(**given), model(**given), atol=1e-6)
    assert counter.frame_count <= 2


@by_model
def test_copies_and_pickles_compute_the_same_and_share_nothing(kind, options):
    model = make(kind, options)
    given = inputs(model)
    expected = model(**given)
    stored = pickle.dumps(model)
    for other in (copy.deepcopy(model), pickle.loads(stored)):
        assert torch.equal(other(**given), expected)
        with torch.no_grad():
            other.final_linear.bias.add_(1)
    assert torch.equal(model(**given), expected)
    assert len(pickle.dumps(make(kind, options))) == len(stored)  # no positions are stored


@by_model
def test_a_model_that_moves_takes_its_positions_along(kind, options):
    model = make(kind, options)
    given = inputs(model)
    with FakeTensorMode(allow_non_fake_inputs=True):  # which computes no values
        assert model(**given).shape[2:] == (4, 8)
    expected = model(**given)
    state = copy.deepcopy(model.state_dict())
    assert model.to("meta")(**inputs(model, device="meta")).shape == expected.shape
    model.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(model(**given), expected)
    model.double().float()
    assert torch.equal(model(**given), expected)


@by_model
def test_inference_mode_leaves_a_model_that_can_be_trained(kind, options):
    model = make(kind, options)
    given = inputs(model)
    with torch.inference_mode():
        before = model(**given).clone()
    out = model(**given)
    out.square().sum().backward()
    assert torch.equal(out, before)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.final_linear.weight.grad.any()


@by_model
def test_a_fresh_model_returns_zeros(kind, options):
    model = kind(**options)
    assert not model(**inputs(model)).any()


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("pixart", dict(x=zeros(2, 3, 4, 8)), "x: expected shape [B, 4, H, W], got [2, 3, 4, 8]"),
        ("pixart", dict(x=zeros(2, 4, 5, 8)), "each a multiple of 2, got (5, 8)"),
        ("pixart", dict(x=zeros(2, 4, 4, 8).half()), "x: expected torch.float32, as the model's"),
        ("mmdit", dict(t=zeros(3)), "t: expected shape [2], one timestep an image, got [3]"),
        ("mmdit", dict(t=zeros(2).bfloat16()), "t: expected integers or float32, got torch.bfl"),
        ("pixart", dict(text=zeros(2, 5, 21)), "text: expected shape [2, tokens, 20], a prompt "),
        ("pixart", dict(text=zeros(3, 5, 20)), "a prompt an image, got [3, 5, 20]"),
        ("pixart", dict(text=None), "text: expected a tensor, got NoneType"),
        ("pixart", dict(lengths=[2, 1]), "lengths: expected a tensor, got list"),
        ("mmdit", dict(t=5), "t: expected a tensor, got int"),
        ("mmdit", dict(text=zeros(2, 8, 20)), "text: expected 1 to 7 tokens, the most that the"),
        ("mmdit", dict(text=zeros(2, 0, 20)), "the most that the model takes, got 0"),
        ("mmdit", dict(text=zeros(2, 5, 20).double()), "text: expected torch.float32, as the mo"),
        (
            "pixart",
            dict(lengths=zeros(2, 12)),
            "lengths: expected int64 of shape [2], the tokens of each prompt, got torch.float32 of "
            "shape [2, 12]",
        ),
        ("mmdit", dict(lengths=zeros(2).int()), "the tokens of each prompt, got torch.int32"),
        ("mmdit", dict(pooled=None), "pooled: expected shape [2, 12], a prompt an image, got None"),
        ("mmdit", dict(pooled=zeros(2, 20)), "a prompt an image, got [2, 20]"),
        ("mmdit", dict(pooled=zeros(2, 12).bfloat16()), "pooled: expected torch.float32, as the"),
        ("mmdit", dict(x=zeros(2, 4, 4, 18)), "at most 16 x 16, as position_size=8, got 4 x 18"),
        (
            "mmdit",
            dict(skip_layers=[2]),
            "expected numbers of blocks, 0 to 1, got [2]",
        ),
        ("mmdit", dict(skip_layers=1), "skip_layers: expected numbers of blocks, 0 to 1, got 1"),
        ("pixart", dict(resolution=zeros(2, 2)), "resolution: expected None, as size_conditions=F"),
    ],
)
def test_bad_input_is_a_value_error_that_names_both(name, changed, message):
    kind, options = MODELS[name]
    model = kind(**options)
    with pytest.raises(ValueError, match=re.escape(message)):
        model(**inputs(model) | changed)


def test_size_conditions_are_asked_for_and_checked():
    model = fastdit.PixArt(**PIXART, size_conditions=True)
    given = inputs(model)
    with pytest.raises(ValueError, match=r"resolution: expected shape \[2, 2\], as size_conditi"):
        model(**given)
    with pytest.raises(ValueError, match=r"aspect_ratio: expected shape \[2, 1\], got \[2\]"):
        model(**given, resolution=zeros(2, 2), aspect_ratio=zeros(2))


# Of the config.json that was published with each model; where it differs from diffusers' defaults.
LARGE = dict(pos_embed_max_size=192, joint_attention_dim=4096, pooled_projection_dim=2048)
PUBLISHED = {
    "PixArt-alpha-XL/2-512": (
        PixArtTransformer2DModel,
        dict(sample_size=64, caption_channels=4096, use_additional_conditions=False),
    ),
    "PixArt-alpha-XL/2-1024": (
        PixArtTransformer2DModel,
        dict(sample_size=128, caption_channels=4096, use_additional_conditions=True),
    ),
    "SD3-medium": (
        SD3Transformer2DModel,
        LARGE | dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536),
    ),
    "SD3.5-medium": (
        SD3Transformer2DModel,
        LARGE
        | dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536)
        | dict(qk_norm="rms_norm", dual_attention_layers=tuple(range(13)), pos_embed_max_size=384),
    ),
    "SD3.5-large": (
        SD3Transformer2DModel,
        LARGE
        | dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432)
        | dict(qk_norm="rms_norm"),
    ),
}
# What they have in all: 0.61 and 2.03 billion in the papers' words.
BILLIONS = {"PixArt-alpha-XL/2-512": 0.61, "SD3-medium": 2.03, "SD3.5-large": 8.06}


@pytest.mark.parametrize("name", fastdit.TEXT_PRESETS)
def test_presets_have_as_many_parameters_as_the_published_models(name):
    cfg = fastdit.TEXT_PRESETS[name]
    kind = fastdit.PixArt if isinstance(cfg, fastdit.PixArtConfig) else fastdit.MMDiT
    with torch.device("meta"):
        model = kind.from_preset(name)
        theirs = PUBLISHED[name][0](**PUBLISHED[name][1]) if name in PUBLISHED else None
    assert model.cfg == cfg
    flow = dict(clean_at=0, time_scale=1000.0, path="linear", prediction="velocity")
    diffusion = dict(T=1000, schedule="linear", prediction="epsilon")
    assert model.diffusion.items() >= (flow if kind is fastdit.MMDiT else diffusion).items()
    count = sum(p.numel() for p in model.parameters())
    if theirs is not None:
        assert count == sum(p.numel() for p in theirs.parameters())
    elif name.startswith("PixArt"):  # of one architecture, whatever the size of the image
        assert count == 610_856_096
    assert round(count / 1e9, 2) == BILLIONS.get(name, round(count / 1e9, 2))


def test_a_preset_of_another_class_is_an_error():
    with pytest.raises(ValueError, match=r"name: expected one of SD3-medium, .*; got 'PixArt-a"):
        fastdit.MMDiT.from_preset("PixArt-alpha-XL/2-512")
