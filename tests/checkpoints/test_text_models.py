"""PixArt and Stable Diffusion 3 of diffusers: weights, configs and networks, in both directions."""

from dataclasses import replace

import pytest
import torch

import fastdit
from fastdit.checkpoints import text_models
from fastdit.testing import randomize, relative_error

diffusers = pytest.importorskip("diffusers")

PIXART = dict(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    cross_attention_dim=24,
    sample_size=8,
    caption_channels=20,
    use_additional_conditions=False,
)
SD3 = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=20,
    caption_projection_dim=16,
    pooled_projection_dim=12,
    pos_embed_max_size=12,
)
PIXART_OPTIONS = {
    "as published": {},
    "sizes": dict(use_additional_conditions=True),
    "sizes by the sample": dict(use_additional_conditions=None, sample_size=128),
    "scaled positions": dict(interpolation_scale=2),
    "half positions": dict(interpolation_scale=0.5),
    "no projection": dict(caption_channels=None, cross_attention_dim=20),
    "no biases": dict(attention_bias=False),
    "erf": dict(activation_fn="gelu"),
    "epsilon": dict(norm_eps=1e-2),
    "no variance": dict(out_channels=None),
    "patches of 4": dict(patch_size=4),
}
SD3_OPTIONS = {
    "medium": {},
    "3.5 large": dict(qk_norm="rms_norm"),
    "3.5 medium": dict(qk_norm="rms_norm", dual_attention_layers=(0,)),
    "dual last": dict(dual_attention_layers=[1]),
    "one layer": dict(num_layers=1),
}
ALL = [("pixart", name) for name in PIXART_OPTIONS] + [("sd3", name) for name in SD3_OPTIONS]


def theirs(kind, **options):
    """Return a tiny transformer of diffusers with random weights."""
    torch.manual_seed(0)
    if kind == "pixart":
        model = diffusers.PixArtTransformer2DModel(**PIXART | options)
    else:
        model = diffusers.SD3Transformer2DModel(**SD3 | options)
    randomize(model)
    return model.eval()


def named(kind, name):
    return theirs(kind, **(PIXART_OPTIONS if kind == "pixart" else SD3_OPTIONS)[name])


@torch.no_grad()
def outputs(module, model):
    """Return what both compute from the same latents, timesteps and prompts."""
    cfg = model.cfg
    x, t = torch.randn(2, 4, 8, 16), torch.tensor([3, 700])
    text = torch.randn(2, 5, cfg.text_width)
    if isinstance(model, fastdit.MMDiT):
        pooled = torch.randn(2, cfg.pooled_width)
        return model(x, t, text, pooled), module(x, text, pooled, t).sample
    sizes = {}
    if cfg.size_conditions:
        sizes = dict(resolution=torch.full((2, 2), 64.0), aspect_ratio=torch.full((2, 1), 0.5))
    return model(x, t, text, **sizes), module(x, text, t, sizes).sample


@pytest.mark.parametrize("kind, name", ALL, ids=[f"{k}-{n}" for k, n in ALL])
def test_every_option_is_reproduced_and_written_back_to_the_bit(kind, name):
    module = named(kind, name)
    model = fastdit.load(module)
    assert relative_error(*outputs(module, model)) < 1e-5
    config, tensors = text_models.to_diffusers(model.cfg, model.state_dict())
    again = type(module).from_config(config)
    assert tensors.keys() == again.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(tensors[n], t) for n, t in module.state_dict().items())
    kept = text_models.config_from_diffusers(config, model.cfg.text_tokens)
    assert kept == model.cfg


def test_what_a_live_module_is_trained_on_is_known_by_its_class():
    model = fastdit.load(theirs("pixart"))
    assert model.diffusion == {"T": 1000, "schedule": "linear", "prediction": "epsilon"}
    assert model.cfg.text_tokens == 300
    flow = fastdit.load(theirs("sd3"))
    assert flow.diffusion == fastdit.FlowMatching(clean_at=0, time_scale=1000).options
    assert flow.cfg.text_tokens == 589

    class Own(diffusers.PixArtTransformer2DModel):
        pass

    own = Own(**PIXART)
    assert isinstance(fastdit.load(own), fastdit.PixArt)


REFUSED = [
    ("pixart", "norm_type", "ada_norm", "expected norm_type to be one of ada_norm_single"),
    ("pixart", "norm_elementwise_affine", True, "norm_elementwise_affine to be one of False"),
    ("pixart", "upcast_attention", True, "upcast_attention to be one of False"),
    ("pixart", "attention_type", "gated", "attention_type to be one of default, got 'gated'"),
    ("pixart", "activation_fn", "geglu", "activation_fn to be one of gelu-approximate, gelu"),
    ("pixart", "attention_bias", "no", "attention_bias to be one of True, False"),
    ("pixart", "use_additional_conditions", 2, "use_additional_conditions to be one of None"),
    ("pixart", "cross_attention_dim", 20, "cross_attention_dim of 24, the width that captions"),
    ("pixart", "cross_attention_dim", None, "cross_attention_dim to be a positive integer"),
    ("pixart", "out_channels", 12, "out_channels of 4 or 8, got 12"),
    ("pixart", "norm_eps", 0.0, "ln_eps: expected a positive float"),
    ("pixart", "interpolation_scale", 0, "interpolation_scale to be a positive number"),
    ("pixart", "caption_channels", 2**40, "caption_channels to be a positive integer"),
    ("sd3", "qk_norm", "layer_norm", "qk_norm to be one of None, rms_norm, got 'layer_norm'"),
    ("sd3", "caption_projection_dim", 20, "caption_projection_dim of 16, the width of the"),
    ("sd3", "out_channels", 8, "out_channels of 4, got 8"),
    ("sd3", "dual_attention_layers", [2], "dual_blocks: expected numbers from 0 to 1"),
    ("sd3", "dual_attention_layers", 1, "expected dual_attention_layers as a list, got 1"),
    ("sd3", "num_layers", 10**6, "says 1000000 blocks"),
    ("sd3", "in_channels", 2**19, "out_channels of 524288, got 4"),
    ("sd3", "patch_size", 4, "says 2 blocks and pos_embed.proj.weight of .16, 4, 4, 4., but"),
    ("sd3", "pos_embed_max_size", 2**19, "pos_embed: expected shape .*cannot be built|expected"),
]


@pytest.mark.parametrize("kind, option, value, message", REFUSED, ids=lambda v: str(v)[:24])
def test_what_fastdit_does_not_have_is_refused_by_name(kind, option, value, message):
    module = theirs(kind)
    module._internal_dict = {**module.config, option: value}
    assert module.config[option] == value
    with pytest.raises(ValueError, match=message):
        fastdit.load(module)


@pytest.mark.parametrize("preset", sorted(fastdit.TEXT_PRESETS))
def test_full_sizes_have_the_keys_and_shapes_of_diffusers(preset):
    cfg = fastdit.TEXT_PRESETS[preset]
    with torch.device("meta"):
        kind = fastdit.MMDiT if isinstance(cfg, fastdit.MMDiTConfig) else fastdit.PixArt
        model = kind.from_config(cfg)
        config, tensors = text_models.to_diffusers(cfg, model.state_dict())
        module = getattr(diffusers, config["_class_name"]).from_config(config)
    expected = {name: t.shape for name, t in module.state_dict().items()}
    assert {name: t.shape for name, t in tensors.items()} == expected
    assert replace(cfg, text_tokens=300) == text_models.config_from_diffusers(config, 300)
