"""PixArt and MMDiT on disk: fastdit's own files, diffusers' folders, and bare tensors."""

import json

import pytest
import torch

import fastdit
from fastdit.checkpoints import inspect, verify
from fastdit.checkpoints.native import write_tensors
from fastdit.testing import randomize

TINY = dict(hidden=24, n_layers=2, n_heads=2, text_width=20, img_size=8)
KINDS = {
    "pixart": lambda **o: fastdit.PixArt(**TINY | dict(size_conditions=True) | o),
    "mmdit": lambda **o: fastdit.MMDiT(
        **TINY | dict(in_channels=4, pooled_width=12, position_size=6, qk_norm="rms") | o
    ),
}
ARTICLE = {"pixart": "a", "mmdit": "an"}
PIPELINES = {
    "PixArtAlphaPipeline": ("pixart", 120),
    "PixArtSigmaPipeline": ("pixart", 300),
    "StableDiffusion3Pipeline": ("mmdit", 589),
    "OwnPipeline": ("pixart", 300),
}
FLOW = fastdit.FlowMatching(clean_at=0, time_scale=1000)


def made(kind, **options):
    torch.manual_seed(0)
    model = KINDS[kind](**options)
    randomize(model)
    return model


def check_same(model, other):
    assert type(model) is type(other)
    assert model.cfg == other.cfg
    own, theirs = model.state_dict(), other.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[n], theirs[n]) and own[n].dtype == theirs[n].dtype for n in own)


@pytest.mark.parametrize("kind", KINDS)
def test_fastdits_own_file_keeps_everything(kind, tmp_path):
    model = made(kind, text_tokens=77).to(torch.bfloat16)
    fastdit.save(model, tmp_path / "m.safetensors", FLOW)
    again = fastdit.load(tmp_path / "m.safetensors")
    check_same(again, model)
    assert again.diffusion == FLOW.options and verify(tmp_path / "m.safetensors")
    info = inspect(tmp_path / "m.safetensors")
    assert (info.config, info.assumed, info.labels) == (model.cfg, (), None)
    check_same(fastdit.load(model), model)  # a live module, whose weights are copied
    again.patch_embed.proj.bias.data.add_(1)
    assert not torch.equal(again.patch_embed.proj.bias, model.patch_embed.proj.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_short_changed_or_of_another_class_is_an_error(kind, tmp_path):
    path, model = tmp_path / "m.safetensors", made(kind)
    fastdit.save(model, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        fastdit.load(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged since it was written"):
        fastdit.load(path)
    config, state = model.cfg.to_dict(), model.state_dict()
    name = type(model).__name__
    for header, message in (
        ({"config": config, "class": "UNet"}, "class: expected one of DiT, PixArt, MMDiT; got 'UN"),
        ({"config": config, "class": ["PixArt"]}, "class: expected one of"),
        ({"config": config}, "DiTConfig"),
        ({"config": config | {"n_layers": 10**9}, "class": name}, "expected tensors of 1000000000"),
        (
            {"config": config | {"hidden": 3 * 2**40}, "class": name},
            "do not fit the config|cannot be",
        ),
        ({"config": config | {"text_width": 2**62}, "class": name}, "do not fit|cannot be built"),
        ({"config": {"hidden": 24}, "class": name}, "expected every option"),
        (
            {"config": config, "class": name, "labels": ["a"]},
            f"labels: expected None, as {ARTICLE[kind]} {name}",
        ),
    ):
        write_tensors(path, state, header)
        with pytest.raises(ValueError, match=message):
            fastdit.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_options_that_make_no_sense_are_refused_by_name(kind, tmp_path):
    path, model = tmp_path / "m.safetensors", made(kind)
    fastdit.save(model, path)
    for option, value, message in (
        ("null_class", True, "null_class: expected None, since .* which is not conditioned on cla"),
        ("num_classes", 5, "num_classes: expected None, since .* which is not conditioned on cla"),
        ("in_channels", 4, "in_channels: expected None, since .* which is not fitted to other da"),
        ("img_size", 16, "img_size: expected 8, as .* a Sampler takes other sizes; got 16"),
        ("n_heads", 3, "n_heads: .* says 2, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            fastdit.load(path, **{option: value})
    check_same(fastdit.load(path, img_size=(8, 8), n_heads=2), model)
    for layout in ("facebookresearch/DiT", "willisma/SiT"):
        with pytest.raises(ValueError, match=f"diffusers for {ARTICLE[kind]} "):
            fastdit.save(model, tmp_path / "m.pt", layout=layout)
    with pytest.raises(ValueError, match=f"labels: expected None, as {ARTICLE[kind]} "):
        fastdit.save(model, path, labels=["cat"])
    with pytest.raises(ValueError, match="square images only, got img_size .4, 8"):
        fastdit.save(made(kind, img_size=(4, 8)), tmp_path / "m", layout="diffusers")


def write_pipeline(folder, name, model, scheduler=None):
    """Write a pipeline's folder as diffusers does, with nothing but a transformer."""
    folder.mkdir(exist_ok=True)
    fastdit.save(model, folder / "transformer", layout="diffusers")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    if scheduler is not None:
        (folder / "scheduler").mkdir(exist_ok=True)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipelines_folder_tells_the_length_of_its_prompts(name, tmp_path):
    kind, tokens = PIPELINES[name]
    model = made(kind, text_tokens=tokens)
    write_pipeline(tmp_path, name, model)
    assumed = ("text_tokens",) if name == "OwnPipeline" else ()
    assert inspect(tmp_path).assumed == assumed
    if assumed:
        with pytest.warns(UserWarning, match="assumed: text_tokens 300; pass what differs to load"):
            check_same(fastdit.load(tmp_path), model)
    else:
        check_same(fastdit.load(tmp_path), model)
        assert inspect(tmp_path / "transformer") == inspect(tmp_path)
        with pytest.raises(ValueError, match="weights: expected one of"):
            fastdit.load(tmp_path, weights="ema")


@pytest.mark.parametrize("kind", KINDS)
def test_the_length_of_prompts_is_taken_where_nothing_tells_it(kind, tmp_path, recwarn):
    """Of a transformer's folder and of a live module, and once it is told it is kept."""
    folder, path, model = tmp_path / "bare", tmp_path / "m.safetensors", made(kind)
    fastdit.save(model, folder, layout="diffusers")
    loaded = fastdit.load(folder, text_tokens=120)
    assert loaded.cfg.text_tokens == 120 and not recwarn.list
    assert inspect(folder, text_tokens=120).assumed == ()
    fastdit.save(loaded, path)
    for source in (path, loaded):
        with pytest.raises(ValueError, match="text_tokens: .* says 120, got 300"):
            fastdit.load(source, text_tokens=300)
    assert fastdit.load(path, text_tokens=120).cfg == loaded.cfg
    fastdit.save(loaded, path, assumed=("text_tokens",))
    assert fastdit.load(path, text_tokens=7).cfg.text_tokens == 7
    with pytest.raises(ValueError, match="text_tokens: expected .*got 0"):
        fastdit.load(path, text_tokens=0)
    dit = fastdit.DiT(hidden=8, n_layers=1, n_heads=2)
    with pytest.raises(ValueError, match="text_tokens: expected None, since DiT is a DiT, which"):
        fastdit.load(dit, text_tokens=120)


def test_a_pipelines_scheduler_tells_the_diffusion_or_the_flow(tmp_path):
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    betas = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    dpm = {"_class_name": "DPMSolverMultistepScheduler", **betas}
    write_pipeline(tmp_path, "StableDiffusion3Pipeline", made("mmdit"), flow)
    assert fastdit.load(tmp_path).diffusion == FLOW.options
    source = tmp_path / "scheduler" / "scheduler_config.json"
    source.write_text(json.dumps(flow | {"num_train_timesteps": 500}))
    assert fastdit.load(tmp_path).diffusion == FLOW.options | {"time_scale": 500.0}
    source.write_text(json.dumps(flow | {"invert_sigmas": True}))
    with pytest.raises(ValueError, match="scheduler: expected no invert_sigmas"):
        inspect(tmp_path)
    with pytest.warns(UserWarning, match="the weights are loaded without it"):
        assert fastdit.load(tmp_path).diffusion is None
    assert fastdit.load(tmp_path, diffusion="flow").diffusion == FLOW.options
    alpha = tmp_path / "alpha"
    write_pipeline(
        alpha, "PixArtAlphaPipeline", made("pixart"), dpm | {"prediction_type": "sample"}
    )
    expected = {"T": 1000, "schedule": "linear", "prediction": "sample"}
    assert fastdit.load(alpha).diffusion == expected
    assert fastdit.load(alpha / "transformer").diffusion == expected


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_shards_and_variants_are_read(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = made("pixart", text_tokens=300)
    fastdit.save(model, tmp_path / "whole", layout="diffusers")
    theirs = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "whole")
    shards = tmp_path / "shards"
    theirs.save_pretrained(shards, max_shard_size=20_000, variant="fp16")
    assert len(list(shards.glob("*.safetensors"))) > 2
    check_same(fastdit.load(shards), model)
    theirs.save_pretrained(shards, variant="ema")
    with pytest.raises(ValueError, match="expected weights of one variant, got ema, fp16"):
        fastdit.load(shards)


def test_the_oldest_config_of_a_pixart_is_read(tmp_path):
    """Published folders say Transformer2DModel, which is also the class of the first DiTs."""
    model = made("pixart", text_tokens=120, img_size=128)
    write_pipeline(tmp_path, "PixArtAlphaPipeline", model)
    path = tmp_path / "transformer" / "config.json"
    config = json.loads(path.read_text()) | {"_class_name": "Transformer2DModel"}
    for option in ("use_additional_conditions", "attention_type"):
        del config[option]
    config |= {
        "interpolation_scale": None,
        "num_vector_embeds": None,
        "double_self_attention": False,
    }
    path.write_text(json.dumps(config))
    read = fastdit.load(tmp_path)
    assert read.cfg.size_conditions and read.cfg.position_scale == 2
    assert all(map(torch.equal, read.state_dict().values(), model.state_dict().values()))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_bare_state_dict_is_read_as_far_as_it_tells():
    model = made("mmdit", dual_blocks=(1,))
    check_same(fastdit.load(model.state_dict()), model)
    with torch.no_grad():
        model.pos_embed.add_(1)
    with pytest.warns(UserWarning, match="assumed: img_size 12"):
        assert fastdit.load(model.state_dict()).cfg.img_size == 12
    check_same(fastdit.load(model.state_dict(), img_size=8), model)
    pixart = made("pixart", text_tokens=300)
    with pytest.warns(UserWarning, match="assumed: gelu tanh, ln_eps 1e-06, position_scale 1.0"):
        check_same(fastdit.load(pixart.state_dict(), img_size=8, n_heads=2), pixart)
    for name in ("pos_embed", "text_embed.weight", "patch_embed.proj.weight"):
        state = {n: t for n, t in model.state_dict().items() if n != name}
        with pytest.raises(ValueError, match="missing|not of a known layout"):
            fastdit.load(state)
        for odd in (torch.zeros(()), torch.zeros(0, 0, 0, 0), torch.zeros(1, 0, 2)):
            with pytest.raises(ValueError, match="expected|unexpected|are empty"):
                fastdit.load(state | {name: odd})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_was_pickled_whole_is_read_and_runs_no_code(kind, tmp_path):
    model = made(kind, text_tokens=77, img_size=(4, 8))
    if kind == "pixart":
        model.positions((2, 4))  # which it keeps
    torch.save(model, tmp_path / "m.pt")
    check_same(fastdit.load(tmp_path / "m.pt"), model)


def test_a_wrapped_or_compiled_module_of_diffusers_is_read():
    module = pytest.importorskip("diffusers").SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=20,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=6,
    )
    live = fastdit.load(module)
    check_same(fastdit.load(torch.nn.DataParallel(module)), live)
    check_same(fastdit.load(torch.compile(module)), live)
    module.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unexpected transformer_blocks.0.attn.to_qkv.weight"):
        fastdit.load(module)
    with pytest.raises(ValueError, match="live module|keys look like those of diffusers"):
        fastdit.load(module.state_dict())
