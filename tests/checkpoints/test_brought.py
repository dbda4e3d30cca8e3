"""Files that people bring: wrapped, nested, without a header, or of a project near to DiT."""

import argparse
import collections
import enum
import json
import pathlib
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastdit
from fastdit import DiffusionScheduler, DiTConfig
from fastdit.checkpoints import inspect, verify
from fastdit.checkpoints.native import write_tensors
from fastdit.checkpoints.translation import to_facebook
from fastdit.testing import randomize

TOY = DiTConfig(hidden=16, n_layers=2, n_heads=4, patch_size=4)
PUBLISHED = replace(
    fastdit.PRESETS["DiT-XL/2"], img_size=8, hidden=16, n_layers=2, n_heads=2, num_classes=10
)
ANSWERS = {"n_heads": 2, "null_class": True}

pytestmark = pytest.mark.filterwarnings("ignore:.*is assumed:UserWarning")


def made(cfg):
    """Return a model with random weights and its own positions."""
    model = fastdit.DiT.from_config(cfg)
    positions = model.pos_embed.detach().clone()
    randomize(model)
    if cfg.pos_embed == "sincos":
        with torch.no_grad():
            model.pos_embed.copy_(positions)
    return model


def published_state(cfg=PUBLISHED):
    return to_facebook(made(cfg).state_dict())


def same(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[n], state[n]) for n in state)


LAYOUTS = {
    "fastdit": (lambda: dict(made(TOY).state_dict()), {}),
    "facebookresearch/DiT": (published_state, ANSWERS),
}
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


@LAYOUT
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.module."])
@pytest.mark.parametrize(
    "nested",
    [
        lambda state: state,
        lambda state: {"model": state, "opt": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        lambda state: {"state_dict": state, "pytorch-lightning_version": "2.0", "epoch": 3},
        lambda state: {"state": {"net": {"weights": state}}},
    ],
    ids=["bare", "model", "lightning", "deep"],
)
def test_prefixes_and_entries_are_removed_in_any_order(tmp_path, layout, prefix, nested):
    state, answers = LAYOUTS[layout][0](), LAYOUTS[layout][1]
    expected = fastdit.load(state, **answers).state_dict()
    torch.save(nested({prefix + name: t for name, t in state.items()}), tmp_path / "m.pt")
    assert same(fastdit.load(tmp_path / "m.pt", **answers), expected)


@LAYOUT
def test_prefixes_are_removed_in_safetensors_and_within_names(tmp_path, layout):
    state, answers = LAYOUTS[layout][0](), LAYOUTS[layout][1]
    expected = fastdit.load(state, **answers).state_dict()
    compiled = {f"net.{n.replace('blocks.0.', 'blocks.0._orig_mod.')}": t for n, t in state.items()}
    save_file(compiled | {"vae.weight": torch.ones(2)}, tmp_path / "m.safetensors")
    assert same(fastdit.load(tmp_path / "m.safetensors", **answers), expected)


@pytest.mark.parametrize("average", ["ema", "model_ema", "ema_state_dict"])
def test_averaged_weights_come_first_and_others_are_chosen_by_name(tmp_path, average):
    raw, averaged = published_state(), published_state()
    args = argparse.Namespace(model="DiT-S/2", num_classes=10)
    torch.save({"model": raw, average: averaged, "opt": {}, "args": args}, tmp_path / "m.pt")
    told = {"n_heads": 2}  # the arguments tell the classes, and so the null row
    assert same(
        fastdit.load(tmp_path / "m.pt", **told), fastdit.load(averaged, **ANSWERS).state_dict()
    )
    for wanted, state in (("model", raw), (average, averaged), ("ema", averaged)):
        expected = fastdit.load(state, **ANSWERS).state_dict()
        assert same(fastdit.load(tmp_path / "m.pt", weights=wanted, **told), expected), wanted
    with pytest.raises(ValueError, match=f"weights: expected one of model, {average}; got 'optim'"):
        fastdit.load(tmp_path / "m.pt", weights="optim", **told)


def test_a_choice_between_equals_is_a_question():
    state = published_state()
    both = {"model_ema1": state, "model_ema2": state}
    with pytest.raises(ValueError, match="pass weights= with one of model_ema1, model_ema2"):
        fastdit.load(both, **ANSWERS)
    assert fastdit.load(both, weights="model_ema2", **ANSWERS).cfg == PUBLISHED


@pytest.mark.parametrize("name", ["state", "generator", "anything"])
def test_an_entry_of_any_name_is_found_and_one_without_weights_is_described(tmp_path, name):
    torch.save({name: published_state(), "epoch": 1}, tmp_path / "m.pt")
    assert fastdit.load(tmp_path / "m.pt", **ANSWERS).cfg == PUBLISHED
    torch.save({"optimizer": {"lr": 1}, "epoch": 1}, tmp_path / "none.pt")
    message = r"none.pt: expected the weights of .* or an MMDiT; the keys \(optimizer, epoch\) are"
    with pytest.raises(ValueError, match=message):
        fastdit.load(tmp_path / "none.pt")


class Colour(enum.Enum):
    RED = 1


class Settings(dict):
    pass


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_what_lies_beside_the_weights_is_not_in_the_way(tmp_path, legacy):
    """Objects become placeholders, and no code of theirs is run."""
    beside = {
        "path": pathlib.Path("/data"),
        "best": np.float64(0.5),
        "curve": np.arange(3),
        "colour": Colour.RED,
        "settings": Settings(lr=1),
        "counts": collections.defaultdict(int, {"a": 1}),
        "names": {"a", "b"},
    }
    content = {**beside, "ema": Settings(published_state())}
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    expected = fastdit.load(content["ema"], **ANSWERS).state_dict()
    assert same(fastdit.load(tmp_path / "m.pt", **ANSWERS), expected)


@pytest.mark.parametrize("cfg", [TOY, PUBLISHED], ids=["toy", "published"])
def test_a_module_that_was_pickled_whole_is_read(tmp_path, cfg):
    model = made(cfg)
    torch.save(model, tmp_path / "m.pt")
    loaded = fastdit.load(tmp_path / "m.pt")
    assert loaded.cfg == cfg and same(loaded, model.state_dict())


def test_a_bare_state_dict_of_a_published_size_is_not_taken_for_a_toy():
    """Its activations leave no trace in the tensors, but its fixed positions do."""
    cfg = replace(fastdit.PRESETS["DiT-S/8"], img_size=(8, 32), patch_size=4)
    assert fastdit.load(dict(made(cfg).state_dict())).cfg == cfg
    small = replace(cfg, hidden=16, n_layers=1, n_heads=2, num_classes=5)
    with pytest.raises(ValueError, match="no published DiT has 1 layers of width 16"):
        fastdit.load(dict(made(small).state_dict()), null_class=True)
    assert fastdit.load(dict(made(small).state_dict()), **ANSWERS).cfg == small


def test_a_bare_state_dict_of_the_toy_is_loaded_and_says_what_it_assumed(tmp_path):
    model = made(DiTConfig())
    assert len(model.state_dict()) == 52
    torch.save(model.state_dict(), tmp_path / "toy.pt")
    message = (
        "toy.pt: what it does not tell is assumed: modulation_act none, gelu erf, t_embed_act "
        r"gelu, ln_eps 1e-05, null_class False, img_size 16, n_heads 4, diffusion \(200 linear "
        r"steps, epsilon\); pass what differs"
    )
    with pytest.warns(UserWarning, match=message):
        loaded = fastdit.load(tmp_path / "toy.pt")
    assert loaded.cfg == DiTConfig() and same(loaded, model.state_dict())
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([3, 9]), torch.tensor([0, 15])
    assert torch.equal(loaded(x, t, y), model(x, t, y))
    told = fastdit.load(tmp_path / "toy.pt", n_heads=8, null_class=True).cfg
    assert told == DiTConfig(n_heads=8, num_classes=15, null_class=True)
    assert inspect(tmp_path / "toy.pt").diffusion == DiffusionScheduler(200).options


def test_a_bare_state_dict_tells_what_shapes_tell():
    """No class conditioning, fixed positions, two output halves and another time embedding."""
    cfg = DiTConfig(
        img_size=(8, 32),
        patch_size=4,
        hidden=16,
        n_layers=1,
        in_channels=2,
        use_class_cond=False,
        t_embed_width=8,
        learn_sigma=True,
    )
    assert fastdit.load(dict(made(cfg).state_dict()), img_size=(8, 32)).cfg == cfg
    with pytest.raises(ValueError, match="n_heads: .*the toy's, does not divide the width 18"):
        fastdit.load(dict(made(DiTConfig(hidden=18, n_layers=1, n_heads=2)).state_dict()))


def test_class_dropout_of_zero_leaves_no_null_row():
    cfg = replace(PUBLISHED, num_classes=1000, null_class=False)
    state = published_state(cfg)
    assert fastdit.load(state, n_heads=2).cfg == cfg
    with_null = fastdit.load(published_state(replace(cfg, null_class=True)), n_heads=2).cfg
    assert with_null == replace(cfg, null_class=True)


def test_other_numbers_of_class_rows_are_a_question():
    state = published_state()
    with pytest.raises(ValueError, match="null_class: the class embedding has 11 rows.*pass null"):
        fastdit.load(state, n_heads=2)
    assert fastdit.load(state, n_heads=2, null_class=True).cfg.num_classes == 10
    without = fastdit.load(state, n_heads=2, null_class=False).cfg
    assert (without.num_classes, without.null_class) == (11, False)
    with pytest.raises(ValueError, match="null_class: expected True or False, got 'yes'"):
        fastdit.load(state, null_class="yes")


def test_what_fastdit_wrote_for_facebook_needs_no_answers(tmp_path):
    model = made(replace(PUBLISHED, img_size=(8, 32)))
    fastdit.save(model, tmp_path / "m.pt", layout="facebookresearch/DiT")
    loaded = fastdit.load(tmp_path / "m.pt")
    assert loaded.cfg == model.cfg and same(loaded, model.state_dict())
    back = torch.load(tmp_path / "m.pt", weights_only=True)
    assert all(map(torch.equal, back.values(), to_facebook(model.state_dict()).values()))


def test_projectors_are_left_out_and_named():
    """REPA trains projections to another network's features beside a SiT."""
    state = published_state()
    names = [f"projectors.0.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    extra = dict.fromkeys(names, torch.ones(3))
    with pytest.warns(UserWarning, match=r"left out 4 tensors .* \(projectors.0.0, projectors.0.2"):
        loaded = fastdit.load(state | extra, **ANSWERS)
    assert same(loaded, fastdit.load(state, **ANSWERS).state_dict())
    del state["final_layer.linear.bias"]
    with pytest.raises(ValueError, match="missing final_linear.bias"):
        fastdit.load(state | extra, **ANSWERS)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blocks.0.attn.q_norm.weight", 8, "missing blocks.0.attn.k_norm.weight"),
        ("blocks.0.attn.q_norm.weight", 3, "q_norm.weight: expected as many values as a head"),
        ("feat_rope.freqs_cos", (16, 8), "feat_rope.freqs_cos: expected the rotary positions"),
        ("blocks.0.norm1.weight", 16, "missing blocks.0.norm2.weight"),
        ("norm_final.weight", 3, "unexpected norm_final.weight"),
    ],
)
def test_extra_tensors_that_take_part_in_a_forward_are_an_error(name, shape, message):
    """A part of LightningDiT's normalised queries or rotary positions is another network."""
    extra = torch.ones(shape)
    with pytest.raises(ValueError, match=message):
        fastdit.load(published_state() | {name: extra}, **ANSWERS)


def test_the_diffusion_of_a_sits_and_a_dits_tensors_is_open_and_answered(tmp_path):
    """A SiT has a DiT's tensors, and its samples by a DDPM's steps are noise."""
    torch.save(published_state(), tmp_path / "m.pt")
    info = inspect(tmp_path / "m.pt", **ANSWERS)
    assert info.diffusion is None and info.assumed == () and info.by_name == ()
    assert fastdit.load(tmp_path / "m.pt", **ANSWERS).diffusion is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = fastdit.load(tmp_path / "m.pt", **ANSWERS, diffusion={"schedule": "cosine"})
    assert model.diffusion == DiffusionScheduler(1000, schedule="cosine").options
    fastdit.save(model, tmp_path / "own.safetensors")
    own = inspect(tmp_path / "own.safetensors")
    assert own.diffusion == model.diffusion and own.assumed == ()
    for bad in ({"steps": 3}, {"T": 0}, {"schedule": "sine"}, {"prediction": "x"}, "sit"):
        with pytest.raises(ValueError, match="diffusion"):
            fastdit.load(tmp_path / "m.pt", **ANSWERS, diffusion=bad)


@pytest.mark.parametrize("size", [(4, 16), (16, 4), (2, 32), 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_grid_is_read_from_sine_cosine_positions(size, dtype):
    cfg = replace(PUBLISHED, img_size=size)
    state = {name: t.to(dtype) for name, t in published_state(cfg).items()}
    assert fastdit.load(state, **ANSWERS).cfg == cfg


def test_the_grid_of_other_positions_is_assumed_or_asked_for():
    square = published_state() | {"pos_embed": torch.randn(1, 16, 16)}
    assert fastdit.load(square, **ANSWERS).cfg.img_size == 8
    assert fastdit.load(square, **ANSWERS, img_size=(4, 16)).cfg.img_size == (4, 16)
    oblong = published_state() | {"pos_embed": torch.randn(1, 8, 16)}
    with pytest.raises(ValueError, match="img_size: .*8 patches are no square; pass img_size="):
        fastdit.load(oblong, **ANSWERS)
    assert fastdit.load(oblong, **ANSWERS, img_size=(8, 4)).cfg.img_size == (8, 4)


def test_damage_is_noticed_by_digests(tmp_path):
    path = tmp_path / "m.safetensors"
    fastdit.save(made(TOY), path, DiffusionScheduler(50, schedule="cosine"))
    assert verify(path)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in (start + 5, (start + len(whole)) // 2, len(whole) - 1):
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged since it was written \(the tensor "):
            fastdit.load(path)
        with pytest.raises(ValueError, match="damaged since it was written"):
            verify(path)
    path.write_bytes(whole.replace(b'\\"T\\": 50', b'\\"T\\": 60'))
    with pytest.raises(ValueError, match=r"damaged since it was written \(the header"):
        fastdit.load(path)


def test_files_without_digests_are_read(tmp_path):
    model = made(TOY)
    header = {"config": TOY.to_dict(), "diffusion": None, "labels": None}
    save_file(dict(model.state_dict()), tmp_path / "m", {"fastdit": json.dumps(header)})
    assert same(fastdit.load(tmp_path / "m"), model.state_dict()) and not verify(tmp_path / "m")


def test_a_run_and_its_checkpoints_are_read(tmp_path):
    raw, averaged = made(TOY), made(TOY)
    recipe = {"T": 50, "schedule": "cosine"}
    header = {"step": 3, "config": TOY.to_dict(), "recipe": recipe}
    tensors = {f"model.{n}": t for n, t in raw.state_dict().items()}
    trained = {n: t for n, t in averaged.named_parameters()}
    tensors |= {f"ema.{n}": t.detach() for n, t in trained.items()}
    tensors["history"] = torch.zeros(2, 3)
    for step in (3, 7):
        write_tensors(tmp_path / f"checkpoints/step-{step:08d}.safetensors", tensors, header)
    file = tmp_path / "checkpoints/step-00000003.safetensors"
    assert same(fastdit.load(file), averaged.state_dict())
    assert same(fastdit.load(file, weights="model"), raw.state_dict())
    assert inspect(file).diffusion == DiffusionScheduler(50, schedule="cosine").options
    # A folder stands for its newest checkpoint that is whole.
    (tmp_path / "checkpoints/step-00000007.safetensors").write_bytes(b"cut")
    assert same(fastdit.load(tmp_path, weights="model"), raw.state_dict())
    fastdit.save(averaged, tmp_path / "model.safetensors")
    assert same(fastdit.load(tmp_path), averaged.state_dict())
    with pytest.raises(ValueError, match="holds one set of weights, got 'ema'"):
        fastdit.load(tmp_path / "model.safetensors", weights="ema")
    with pytest.raises(ValueError, match="expected model or ema, which .* has, got 'optimizer'"):
        fastdit.load(file, weights="optimizer")


def test_a_model_is_fitted_to_other_data_as_it_is_loaded(tmp_path):
    model = made(PUBLISHED)
    fastdit.save(model, tmp_path / "m.pt", layout="facebookresearch/DiT")
    message = "made anew for other data: the 5 class rows, the positions of 2 x 8 patches"
    with pytest.warns(UserWarning, match=message):
        fitted = fastdit.load(tmp_path / "m.pt", num_classes=5, img_size=(4, 16))
    assert fitted.cfg == replace(PUBLISHED, num_classes=5, img_size=(4, 16))
    assert torch.equal(fitted.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
    assert torch.equal(fitted.y_embed.weight[5], model.y_embed.weight[10])  # the null row
    with torch.no_grad():
        out = fitted(torch.randn(2, 4, 4, 16), torch.tensor([1, 2]), torch.tensor([0, 4]))
    assert out.shape == (2, 8, 4, 16) and out.isfinite().all()
    with pytest.raises(ValueError, match=r"img_size: .* says 8, got \(4, 16\)"):
        inspect(tmp_path / "m.pt", img_size=(4, 16))
