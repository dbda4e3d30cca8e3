"""Files of SiT, LightningDiT, REPA and JiT: which project's they are, and what they tell."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastdit
from fastdit import FlowMatching
from fastdit.checkpoints import inspect
from fastdit.checkpoints.projects import DIT, JIT, LIGHTNING, REPA, SIT
from fastdit.checkpoints.translation import layout_of
from fastdit.testing import randomize

FOLDER = Path(__file__).parents[1] / "golden"
LAYOUTS = {
    "sit": DIT,
    "lightningdit": LIGHTNING,
    "lightningdit_qknorm": LIGHTNING,
    "lightningdit_wo_shift": LIGHTNING,
    "repa": REPA,
    "jit": JIT,
}
STATES = {
    name: {
        n.removeprefix("model/"): t
        for n, t in load_file(FOLDER / f"{name}.safetensors").items()
        if n.startswith("model/")
    }
    for name in LAYOUTS
}
PUBLISHED = replace(
    fastdit.PRESETS["SiT-XL/2"], img_size=8, hidden=32, n_layers=2, n_heads=2, num_classes=10
)
ON_LATENTS = replace(
    fastdit.PRESETS["LightningDiT-XL/1"],
    img_size=4,
    in_channels=16,
    hidden=32,
    n_layers=2,
    n_heads=2,
    num_classes=10,
)
CONFIGS = {
    "sit": PUBLISHED,
    "lightningdit": ON_LATENTS,
    "lightningdit_qknorm": replace(ON_LATENTS, qk_norm="rms"),
    "lightningdit_wo_shift": replace(ON_LATENTS, qk_norm="rms", modulation_shift=False),
    "repa": replace(
        PUBLISHED, num_classes=1000, qk_norm="layer", qk_norm_eps=1e-5, learn_sigma=False
    ),
    "jit": replace(
        fastdit.PRESETS["JiT-B/16"],
        img_size=16,
        patch_size=4,
        hidden=32,
        n_layers=3,
        n_heads=2,
        num_classes=10,
        patch_bottleneck=8,
        context_tokens=4,
        context_start=1,
    ),
}
FLOWS = {
    "sit": None,
    "lightningdit": FlowMatching(),
    "lightningdit_qknorm": FlowMatching(),
    "lightningdit_wo_shift": FlowMatching(),
    "repa": FlowMatching(clean_at=0),
    "jit": FlowMatching(prediction="sample", min_noise=0.05),
}
# No tensor of SiT tells its heads, and of eleven class rows only JiT's last one is null for sure.
ANSWERS = {name: {"null_class": True} for name in LAYOUTS} | {"repa": {}, "jit": {}}
ANSWERS["sit"] = {"null_class": True, "n_heads": 2}

of_each = pytest.mark.parametrize("name", LAYOUTS)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*left out 12 tensors:UserWarning", "ignore:.*assumed. context_start 1:UserWarning"
)


def options(flow):
    return None if flow is None else flow.options


@of_each
def test_keys_tell_the_project_its_config_and_its_flow(name):
    bare = [n.removeprefix("net.") for n in STATES[name]]
    assert layout_of(bare) == LAYOUTS[name]
    model = fastdit.load(STATES[name], **ANSWERS[name])
    assert model.cfg == CONFIGS[name]
    assert model.diffusion == options(FLOWS[name])


@of_each
def test_a_round_trip_keeps_every_bit(name, tmp_path):
    """What the project's code loads is what it stored, without REPA's projectors."""
    model = fastdit.load(STATES[name], **ANSWERS[name])
    fastdit.save(model, tmp_path / "m.pt", layout=LAYOUTS[name])
    stored = torch.load(tmp_path / "m.pt", weights_only=True)
    inner = {"repa": "ema", "jit": "model_ema1"}.get(name)
    theirs = stored if inner is None else stored[inner]
    wanted = {n: t for n, t in STATES[name].items() if not n.startswith("projectors.")}
    assert theirs.keys() == wanted.keys()
    for key, t in wanted.items():
        if key.startswith("feat_rope."):  # fastdit computes it in higher precision
            assert (theirs[key] - t).abs().max() < 1e-6
        else:
            assert torch.equal(theirs[key], t), key
    if name == "jit":
        assert stored.keys() == {"model", "model_ema1", "model_ema2"}
    again = fastdit.load(tmp_path / "m.pt")
    assert again.cfg == model.cfg and again.diffusion == model.diffusion
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_a_sit_keeps_its_flow_in_each_layout(tmp_path):
    model = fastdit.load(STATES["sit"], **ANSWERS["sit"], diffusion="flow")
    for layout in ("fastdit", DIT, SIT):
        fastdit.save(model, tmp_path / "m", layout=layout)
        assert fastdit.load(tmp_path / "m").diffusion == FlowMatching().options


def test_repas_projectors_are_left_out_and_named():
    with pytest.warns(UserWarning, match=r"left out 12 tensors .* \(projectors.0.0, projectors"):
        fastdit.load(STATES["repa"])


def test_the_older_names_of_repas_last_blocks_are_read():
    names = {n: n.replace("blocks.1.", "decoder_blocks.0.") for n in STATES["repa"]}
    legacy = {names[n]: t for n, t in STATES["repa"].items()}
    assert len([n for n in legacy if n.startswith("decoder_blocks.0.")]) == 14
    own, expected = fastdit.load(legacy).state_dict(), fastdit.load(STATES["repa"]).state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[n], t) for n, t in expected.items())


def as_jit(path, **arguments):
    """Write what JiT's training writes: raw weights, two averages and its arguments."""
    raw = {n: torch.zeros_like(t) for n, t in STATES["jit"].items()}
    args = argparse.Namespace(model="JiT-B/16", img_size=16, class_num=10, **arguments)
    averages = {"model_ema1": STATES["jit"], "model_ema2": raw}
    torch.save({"model": raw, "optimizer": {}, "epoch": 3, "args": args, **averages}, path)


def test_of_jits_averages_the_first_is_taken_as_jit_itself_does(tmp_path):
    as_jit(tmp_path / "m.pth")
    first = STATES["jit"]["net.final_layer.linear.bias"]
    assert torch.equal(fastdit.load(tmp_path / "m.pth").final_linear.bias, first)
    assert torch.equal(fastdit.load(tmp_path / "m.pth", weights="ema").final_linear.bias, first)
    for weights in ("model", "model_ema2"):
        assert not fastdit.load(tmp_path / "m.pth", weights=weights).final_linear.bias.any()


def test_jits_arguments_tell_its_noise(tmp_path):
    as_jit(tmp_path / "m.pth", noise_scale=2.0, t_eps=0.02)
    told = fastdit.load(tmp_path / "m.pth").diffusion
    assert told == FlowMatching(prediction="sample", min_noise=0.02, noise_scale=2.0).options


@pytest.mark.parametrize("start", [-1, "1", True, [1], 0.5])
def test_an_argument_that_is_no_number_of_blocks_tells_nothing(start, tmp_path):
    as_jit(tmp_path / "m.pth", context_start=start)
    assert fastdit.load(tmp_path / "m.pth").cfg == CONFIGS["jit"]


def test_where_jits_context_tokens_begin_is_assumed_and_said():
    with pytest.warns(UserWarning, match="is assumed: context_start 1; .*fastdit.save"):
        fastdit.load(STATES["jit"])


SIT_ARGUMENTS = dict(model="SiT-XL/2", num_classes=10)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (SIT_ARGUMENTS, FlowMatching()),
        (
            SIT_ARGUMENTS | dict(path_type="GVP", prediction="noise"),
            FlowMatching("gvp", "epsilon"),
        ),
        (SIT_ARGUMENTS | dict(path_type="VP", prediction="score"), FlowMatching("vp", "score")),
        (SIT_ARGUMENTS | dict(path_type="EDM"), None),
        (
            SIT_ARGUMENTS | dict(encoder_depth=8, path_type="cosine", prediction="v"),
            FlowMatching("gvp", clean_at=0),
        ),
        (dict(model="DiT-XL/2", num_classes=10), fastdit.DiffusionScheduler(1000)),
        (dict(model="UViT", num_classes=10), None),
    ],
)
def test_training_arguments_tell_a_sit_from_a_dit(tmp_path, arguments, expected):
    """REPA trains a SiT whose time runs the other way, and names its encoder's depth."""
    args = argparse.Namespace(**arguments)
    torch.save({"ema": STATES["sit"], "args": args}, tmp_path / "m.pt")
    info = inspect(tmp_path / "m.pt", n_heads=2)
    assert info.diffusion == options(expected) and info.assumed == info.by_name == ()


def test_lightningdits_settings_in_sections_are_read(tmp_path):
    transport = {"path_type": "GVP", "prediction": "velocity"}
    config = {"data": {"num_classes": 10}, "model": {"model_type": "X"}, "transport": transport}
    torch.save({"ema": STATES["lightningdit"], "config": config}, tmp_path / "m.pt")
    model = fastdit.load(tmp_path / "m.pt")
    assert model.cfg == ON_LATENTS and model.diffusion == FlowMatching("gvp").options


@pytest.mark.parametrize("change", [{"modulation_shift": False}, {"qk_norm": "layer"}, {}])
def test_a_lightningdit_of_few_options_is_told_by_what_is_left(tmp_path, change):
    """Without shifts it is no other's; with normed queries alone, or none, its arguments tell."""
    eps = 1e-5 if "qk_norm" in change else 1e-6
    cfg = replace(PUBLISHED, learn_sigma=False, qk_norm_eps=eps, **change)
    fastdit.save(fastdit.DiT.from_config(cfg), tmp_path / "m.pt", layout=LIGHTNING)
    state = dict(torch.load(tmp_path / "m.pt", weights_only=True))
    flow = FlowMatching().options
    bare = fastdit.load(state, **ANSWERS["sit"])
    assert bare.cfg == cfg and bare.diffusion == (flow if "modulation_shift" in change else None)
    config = {"data": {"num_classes": 10}, "model": {"model_type": "LightningDiT-XL/2"}}
    told = fastdit.load({"ema": state, "config": config}, n_heads=2)
    assert told.cfg == cfg and told.diffusion == flow


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("SiT-XL-2-256x256.pt", FlowMatching()),
        ("DiT-XL-2-256x256.pt", fastdit.DiffusionScheduler(1000)),
        ("my-SiT.pt", None),
        ("DiTs.pt", None),
    ],
)
def test_the_published_name_of_a_file_tells_and_is_said_to(tmp_path, file, expected):
    torch.save(STATES["sit"], tmp_path / file)
    info = inspect(tmp_path / file, **ANSWERS["sit"])
    assert info.diffusion == options(expected)
    assert info.by_name == (("diffusion",) if expected else ())
    given = inspect(tmp_path / file, **ANSWERS["sit"], diffusion="ddpm")
    assert given.diffusion == fastdit.DiffusionScheduler(1000).options and given.by_name == ()
    torch.save(STATES["repa"], tmp_path / file)  # its name does not say that its time runs back
    assert inspect(tmp_path / file).diffusion == FlowMatching(clean_at=0).options


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("flow", FlowMatching()),
        ("ddpm", fastdit.DiffusionScheduler(1000)),
        ({"path": "gvp"}, FlowMatching("gvp")),
        ({"clean_at": 0, "time_scale": 1000}, FlowMatching(clean_at=0, time_scale=1000.0)),
        (
            {"prediction": "sample", "min_noise": 0.1},
            FlowMatching("linear", "sample", min_noise=0.1),
        ),
        ({"prediction": "sample"}, fastdit.DiffusionScheduler(1000, prediction="sample")),
        ({"schedule": "cosine"}, fastdit.DiffusionScheduler(1000, schedule="cosine")),
    ],
)
def test_an_open_diffusion_is_answered(given, expected):
    model = fastdit.load(STATES["sit"], **ANSWERS["sit"], diffusion=given)
    assert model.diffusion == expected.options


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("flow", FlowMatching(prediction="sample", min_noise=0.05)),
        ({"noise_scale": 2}, FlowMatching(prediction="sample", min_noise=0.05, noise_scale=2.0)),
        ({"prediction": "velocity"}, FlowMatching()),
        ({"path": "gvp"}, FlowMatching("gvp", "sample")),
        ("ddpm", fastdit.DiffusionScheduler(1000)),
    ],
)
def test_given_options_replace_those_that_are_told(given, expected):
    assert fastdit.load(STATES["jit"], diffusion=given).diffusion == expected.options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": "linear", "T": 50}, "path is a flow's and T a discrete diffusion's"),
        ({"path": "straight"}, "diffusion: path: expected one of linear, gvp, vp"),
        ({"clean_at": 2}, "diffusion: clean_at: expected the model's time at the data"),
        ({"steps": 3}, "diffusion: expected one of T, schedule, prediction, path, clean_at"),
    ],
)
def test_options_that_cannot_be_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        fastdit.load(STATES["sit"], **ANSWERS["sit"], diffusion=given)


def test_a_network_of_two_projects_leaves_its_flow_open():
    """Projectors beside LightningDiT's network: nothing tells which way its time runs."""
    extra = {"projectors.0.0.weight": torch.ones(2, 2)}
    with pytest.warns(UserWarning, match="left out 1 tensors"):
        model = fastdit.load(STATES["lightningdit"] | extra, null_class=True)
    assert model.cfg == ON_LATENTS and model.diffusion is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t + 1e-3, "feat_rope.freqs_cos: expected the rotary positions of 4 x 4 patches"),
        (lambda t: t[:8], r"feat_rope.freqs_cos: expected shape \[16, 16\], got \[8, 16\]"),
        (lambda t: t.to("meta"), "feat_rope.freqs_cos: expected plain values"),
        (lambda t: t.fill_(torch.nan), "off by up to nan"),
    ],
)
def test_other_rotary_positions_are_an_error(change, message):
    table = {"feat_rope.freqs_cos": change(STATES["lightningdit"]["feat_rope.freqs_cos"].clone())}
    with pytest.raises(ValueError, match=message):
        fastdit.load(STATES["lightningdit"] | table, null_class=True)


def test_16_bit_files_are_read():
    state = {n: t.bfloat16() for n, t in STATES["lightningdit_qknorm"].items()}
    model = fastdit.load(state, null_class=True)
    assert model.cfg == CONFIGS["lightningdit_qknorm"] and model.rope.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("lightningdit", DIT, "facebookresearch/DiT has norm 'layer', got 'rms'"),
        ("lightningdit", SIT, "willisma/SiT has norm 'layer', got 'rms'"),
        ("sit", REPA, "sihyun-yu/REPA has learn_sigma False, got True"),
        ("repa", DIT, "facebookresearch/DiT has qk_norm 'none', got 'layer'"),
        ("jit", LIGHTNING, "hustvl/LightningDiT has no patch_bottleneck, got 8"),
        ("lightningdit_qknorm", JIT, "LTH14/JiT has a patch_bottleneck, got None"),
    ],
)
def test_a_layout_refuses_what_its_project_cannot_express(name, layout, message, tmp_path):
    model = fastdit.load(STATES[name], **ANSWERS[name])
    with pytest.raises(ValueError, match=f"layout: {message}"):
        fastdit.save(model, tmp_path / "m.pt", layout=layout)
    assert not list(tmp_path.iterdir())


def test_a_layout_refuses_other_epsilons(tmp_path):
    model = fastdit.DiT.from_config(replace(CONFIGS["repa"], qk_norm_eps=1e-6))
    got = "'sihyun-yu/REPA' can store such a DiT only as qk_norm_eps=1e-05; got qk_norm_eps=1e-06$"
    with pytest.raises(ValueError, match=got):
        fastdit.save(model, tmp_path / "m.pt", layout=REPA)


def test_a_file_of_fastdit_keeps_a_flow(tmp_path):
    model = fastdit.load(STATES["repa"])
    fastdit.save(model, tmp_path / "m")
    assert inspect(tmp_path / "m").diffusion == FlowMatching(clean_at=0).options
    given = FlowMatching("gvp", time_scale=1000)
    fastdit.save(model, tmp_path / "m", given)
    assert fastdit.load(tmp_path / "m").diffusion == given.options


@of_each
def test_a_model_of_a_project_is_fitted_to_other_data(name):
    size = 2 * CONFIGS[name].sample_shape[1]
    fresh = dict(num_classes=4, img_size=size, in_channels=5)
    with pytest.warns(UserWarning, match="made anew for other data: the 4 class rows"):
        model = fastdit.load(STATES[name], **ANSWERS[name], **fresh)
    randomize(model)
    x = torch.randn(2, 5, size, size)
    assert model(x, torch.tensor([0.1, 0.7]), torch.tensor([3, 4])).isfinite().all()


def test_presets_know_their_flow():
    with torch.device("meta"):
        known = {name: fastdit.DiT.from_preset(name).diffusion for name in fastdit.PRESETS}
        small = fastdit.DiT.from_preset("LightningDiT-XL/1", image_size=128)
        pixels = fastdit.DiT.from_preset("JiT-B/16", image_size=512)
    assert known["DiT-XL/2"] is known["toy"] is None
    assert known["SiT-S/4"] == known["LightningDiT-XL/1"] == FlowMatching().options
    assert known["REPA-XL/2"] == FlowMatching(clean_at=0).options
    of_jit = FlowMatching(prediction="sample", min_noise=0.05)
    assert known["JiT-H/16"] == of_jit.options
    assert known["JiT-H/32"] == pixels.diffusion == replace(of_jit, noise_scale=2.0).options
    assert small.cfg.img_size == 8 and pixels.cfg.img_size == 512
