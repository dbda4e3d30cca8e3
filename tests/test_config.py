"""Every option is checked when a config is built, and the presets have the published sizes."""

import dataclasses
import json
from dataclasses import replace

import pytest
import torch

import fastdit
from fastdit import PRESETS, DiTConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 0}, "img_size: expected a positive integer, got 0"),
        ({"hidden": 64.0}, "hidden: expected a positive integer, got 64.0"),
        ({"n_layers": True}, "n_layers: expected a positive integer, got True"),
        ({"patch_size": 5}, "patch_size: expected a divisor of img_size=16, got 5"),
        ({"img_size": (16, 30)}, "patch_size: expected a divisor of img_size=(16, 30), got 4"),
        ({"img_size": (30, 16)}, "patch_size: expected a divisor of img_size=(30, 16), got 4"),
        ({"img_size": (16, 0)}, "img_size: expected (height, width), each a positive integer, got"),
        ({"img_size": (8, 16, 4)}, "img_size: expected (height, width), each a positive integer"),
        ({"img_size": [True, 4]}, "img_size: expected (height, width), each a positive integer"),
        ({"img_size": "16"}, "img_size: expected a positive integer, got '16'"),
        ({"n_heads": 5}, "n_heads: expected a divisor of hidden=64, got 5"),
        ({"t_freq_shift": True}, "t_freq_shift: expected one of 0, 1; got True"),
        ({"mlp_ln_eps": 0.0}, "mlp_ln_eps: expected a positive float, got 0.0"),
        ({"gelu": "tan"}, "gelu: expected one of erf, tanh; got 'tan'; did you mean 'tanh'?"),
        ({"pos_embed": "rope"}, "pos_embed: expected one of learned, sincos; got 'rope'"),
        ({"modulation_act": "relu"}, "modulation_act: expected one of none, silu; got 'relu'"),
        ({"t_embed_act": None}, "t_embed_act: expected one of gelu, silu; got None"),
        ({"t_embed_width": 0}, "t_embed_width: expected a positive integer, got 0"),
        ({"ln_eps": 0.0}, "ln_eps: expected a positive float, got 0.0"),
        ({"ln_eps": float("nan")}, "ln_eps: expected a positive float, got nan"),
        ({"learn_sigma": 1}, "learn_sigma: expected True or False, got 1"),
        (
            {"use_class_cond": False, "null_class": True},
            "null_class: expected False where use_class_cond=False, got True",
        ),
        (
            {"pos_embed": "sincos", "hidden": 66, "n_heads": 2},
            "hidden: pos_embed='sincos' needs a multiple of 4, got 66",
        ),
        ({"hiden": 64}, "got 'hiden'; did you mean 'hidden'?"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("build", [fastdit.DiT, lambda **o: DiTConfig.from_dict(o)])
def test_bad_options_are_value_errors_that_name_them(options, message, build):
    with pytest.raises(ValueError) as error:
        build(**options)
    assert message in str(error.value)


def test_config_survives_a_round_trip_through_a_dict():
    for cfg in PRESETS.values():
        assert DiTConfig.from_dict(cfg.to_dict()) == cfg


@pytest.mark.parametrize(
    ("given", "kept", "grid"),
    [
        (16, 16, (4, 4)),
        ((16, 16), 16, (4, 4)),
        ([16, 16], 16, (4, 4)),
        ((8, 32), (8, 32), (2, 8)),
        ([32, 8], (32, 8), (8, 2)),
    ],
    ids=str,
)
def test_an_image_size_has_one_form_in_configs_and_files(given, kept, grid):
    """A square is an integer and any other size a tuple, which JSON makes a list."""
    cfg = DiTConfig(img_size=given)
    assert cfg.img_size == kept and type(cfg.img_size) is type(kept)
    assert (cfg.grid, cfg.n_tokens) == (grid, 16)
    assert cfg.sample_shape == (3, 4 * grid[0], 4 * grid[1])
    saved = json.loads(json.dumps(cfg.to_dict()))
    assert saved["img_size"] == (kept if isinstance(kept, int) else list(kept))
    again = DiTConfig.from_saved(saved)
    assert again == cfg and hash(again) == hash(cfg)


def test_a_saved_config_is_completed_as_its_release_meant_it():
    saved = PRESETS["DiT-S/2"].to_dict()
    assert DiTConfig.from_saved(saved) == PRESETS["DiT-S/2"]
    older = {k: v for k, v in saved.items() if k not in ("mlp_ln_eps", "t_freq_shift")}
    assert DiTConfig.from_saved(older) == PRESETS["DiT-S/2"]
    assert older.keys() < saved.keys()  # the caller's dict is left alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.pop("gelu"), "DiTConfig: expected every option, gelu missing"),
        (lambda saved: saved.update(hiden=1), "did you mean 'hidden'?"),
        (lambda saved: saved.update(hidden=0), "hidden: expected a positive integer, got 0"),
    ],
    ids=["missing", "unknown", "out-of-range"],
)
def test_a_saved_config_that_is_not_whole_is_an_error(change, message):
    saved = DiTConfig().to_dict()
    change(saved)
    with pytest.raises(ValueError) as error:
        DiTConfig.from_saved(saved)
    assert message in str(error.value)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DiTConfig().hidden = 128


# Millions of trained parameters as in Peebles & Xie 2023, table 1, and as LightningDiT's and JiT's
# own models have; for XL/2 exactly the number in its checkpoint, which includes the fixed position
# embedding.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("DiT-S/2", 33),
        ("DiT-B/2", 130),
        ("DiT-L/2", 458),
        ("DiT-XL/2", 675),
        ("SiT-S/2", 33),
        ("SiT-B/2", 130),
        ("SiT-L/2", 458),
        ("SiT-XL/2", 675),
        ("REPA-XL/2", 675),
        ("LightningDiT-B/1", 130),
        ("LightningDiT-XL/1", 675),
        ("JiT-B/16", 131),
        ("JiT-L/16", 459),
        ("JiT-H/16", 953),
        ("JiT-B/32", 133),
        ("JiT-L/32", 462),
        ("JiT-H/32", 956),
    ],
)
def test_presets_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        model = fastdit.DiT.from_config(PRESETS[name])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert round(trained / 1e6) == millions
    if name == "DiT-XL/2":
        assert trained + model.pos_embed.numel() == 675_129_632


def test_presets_cover_all_published_names():
    sizes = [f"{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)]
    published = {f"{project}-{size}" for project in ("DiT", "SiT") for size in sizes}
    published |= {f"REPA-{size}/2" for size in ("B", "L", "XL")}
    published |= {f"LightningDiT-{size}/1" for size in ("B", "XL", "1p0B", "1p6B")}
    published |= {f"JiT-{size}/{patch}" for size in ("B", "L", "H") for patch in (16, 32)}
    assert set(PRESETS) == published | {"toy"}


def test_a_preset_takes_an_image_size():
    with torch.device("meta"):
        assert fastdit.DiT.from_preset("DiT-XL/2").cfg.img_size == 32
        assert fastdit.DiT.from_preset("DiT-S/4", image_size=512).cfg.img_size == 64
        assert fastdit.DiT.from_preset("toy", image_size=24).cfg.img_size == 24
        wide = fastdit.DiT.from_preset("DiT-S/2", image_size=(256, 512))
        assert wide.cfg == replace(PRESETS["DiT-S/2"], img_size=(32, 64))
        assert wide.cfg.grid == (16, 32)
        assert fastdit.DiT.from_preset("DiT-S/2", image_size=[512, 512]).cfg.img_size == 64


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("DiT-XL/3", None, "did you mean 'DiT-XL/"),
        ("DiT-XL/2", 250, "image_size: expected a multiple of 16, got 250"),
        ("toy", 0, "image_size: expected a multiple of 4, got 0"),
        ("DiT-XL/2", (256, 250), "expected (height, width), each a multiple of 16, got (256, 250)"),
        ("DiT-XL/2", 256.0, "image_size: expected a multiple of 16, got 256.0"),
    ],
)
def test_a_bad_preset_or_image_size_is_an_error(name, size, message):
    with pytest.raises(ValueError) as error:
        fastdit.DiT.from_preset(name, size)
    assert message in str(error.value)
