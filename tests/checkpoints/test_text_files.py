"""PixArt and MMDiT on disk: fastdit's own files, diffusers' folders, and the original layouts."""

import json

import pytest
import torch
from safetensors.torch import save_file

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
        with pytest.warns(UserWarning, match="assumed: text_tokens 300; .* build fastdit.PixArt"):
            check_same(fastdit.load(tmp_path), model)
    else:
        check_same(fastdit.load(tmp_path), model)
        with pytest.raises(ValueError, match="weights: expected one of"):
            fastdit.load(tmp_path, weights="ema")


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


def original_pixart(model):
    """Return the tensors of a PixArt as its project stores them."""
    own = model.state_dict()

    def swapped(t, parts):
        pieces = list(t.chunk(parts))
        for i in range(0, parts, 3):
            pieces[i], pieces[i + 1] = pieces[i + 1], pieces[i]
        return torch.cat(pieces)

    names = {
        "patch_embed.": "x_embedder.",
        "t_embed.": "t_embedder.mlp.",
        "size_embed.": "csize_embedder.mlp.",
        "ratio_embed.": "ar_embedder.mlp.",
        "text_embed.0.": "y_embedder.y_proj.fc1.",
        "text_embed.2.": "y_embedder.y_proj.fc2.",
        ".cross.q.": ".cross_attn.q_linear.",
        ".cross.kv.": ".cross_attn.kv_linear.",
        ".cross.": ".cross_attn.",
        ".mlp.0.": ".mlp.fc1.",
        ".mlp.2.": ".mlp.fc2.",
        "final_linear.": "final_layer.linear.",
    }
    out = {}
    for name, t in own.items():
        if name == "block_tables":
            for i, table in enumerate(t):
                out[f"blocks.{i}.scale_shift_table"] = swapped(table, 6)
        elif name == "final_table":
            out["final_layer.scale_shift_table"] = t.flip(0)
        elif name.startswith("modulation."):
            out[f"t_block.1.{name[11:]}"] = swapped(t, 6)
        else:
            start = "" if name.startswith("blocks") else "^"
            for old, new in names.items():
                if name.startswith(old) if start and old[0] != "." else old in name:
                    name = name.replace(old, new, 1)
                    break
            out[name] = t
    cfg = model.cfg
    side = cfg.img_size // cfg.patch_size
    out["pos_embed"] = model.positions((side, side)).clone()
    out["y_embedder.y_embedding"] = torch.randn(cfg.text_tokens, cfg.text_width)
    return out


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("sizes", [False, True], ids=["sigma", "alpha"])
def test_the_original_layout_of_pixart_is_read(sizes, scale, tmp_path):
    options = dict(size_conditions=sizes, position_scale=scale, text_tokens=7)
    model = made("pixart", **options)
    tensors = original_pixart(model)
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "m.pth")
    with pytest.warns(UserWarning, match=r"1 tensors that a PixArt does not have \(null_p"):
        read = fastdit.load(tmp_path / "m.pth", n_heads=2)
    check_same(read, model)
    assert read.diffusion == {"T": 1000, "schedule": "linear", "prediction": "epsilon"}
    info = inspect(tmp_path / "m.pth", n_heads=2)
    assert info.config == model.cfg and info.assumed == ()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_the_original_layout_leaves_open_is_a_question():
    model = made("pixart", text_tokens=7)
    tensors = original_pixart(model)
    with pytest.raises(ValueError, match="n_heads: shapes do not tell it, and no published PixArt"):
        fastdit.load(tensors)
    bare = {n: t for n, t in tensors.items() if n not in ("pos_embed", "y_embedder.y_embedding")}
    with pytest.raises(ValueError, match="img_size: the tensors do not tell it; pass img_size="):
        fastdit.load(bare, n_heads=2)
    with pytest.warns(UserWarning, match="assumed: .*position_scale 1.0, text_tokens 300"):
        read = fastdit.load(bare, n_heads=2, img_size=8)
    assert all(map(torch.equal, read.state_dict().values(), model.state_dict().values()))
    moved = tensors | {"pos_embed": tensors["pos_embed"] + 1}
    with pytest.raises(ValueError, match="pos_embed: expected those of a square of patches"):
        fastdit.load(moved, n_heads=2)
    for name, message in (
        ("blocks.0.attn.sr.weight", "a PixArt without key-value compression, got blocks.0.attn.s"),
        ("blocks.1.attn.q_norm.weight", "a PixArt without qk-norm, got blocks.1.attn.q_norm.we"),
        ("blocks.1.attn.other.weight", "unexpected blocks.1.attn.other.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            fastdit.load(tensors | {name: torch.zeros(3)}, n_heads=2)
    for name in ("x_embedder.proj.weight", "final_layer.linear.weight", "blocks.1.mlp.fc1.bias"):
        with pytest.raises(ValueError, match="missing"):
            fastdit.load({n: t for n, t in tensors.items() if n != name}, n_heads=2)
    table = torch.zeros(6, 25)
    with pytest.raises(ValueError, match="blocks.0.scale_shift_table and .* of one shape"):
        fastdit.load(tensors | {"blocks.0.scale_shift_table": table}, n_heads=2)


def original_sd3(model):
    """Return the tensors of an MMDiT as Stable Diffusion 3's single file stores them."""
    names = {
        ".image.": ".x_block.",
        ".text.": ".context_block.",
        ".dual.": ".attn2.",
        ".q_norm.": ".ln_q.",
        ".k_norm.": ".ln_k.",
        ".mlp.0.": ".mlp.fc1.",
        ".mlp.2.": ".mlp.fc2.",
        ".modulation.": ".adaLN_modulation.1.",
    }
    starts = {
        "patch_embed.": "x_embedder.",
        "t_embed.": "t_embedder.mlp.",
        "pooled_embed.": "y_embedder.mlp.",
        "text_embed.": "context_embedder.",
        "final_linear.": "final_layer.linear.",
        "final_mod.": "final_layer.adaLN_modulation.1.",
        "blocks.": "joint_blocks.",
    }
    out = {}
    for name, t in model.state_dict().items():
        if ".modulation." in name or name.startswith("final_mod."):
            pieces = list(t.chunk(len(t) // model.cfg.hidden))
            for i in range(0, len(pieces), 3):
                pieces[i], pieces[i + 1] = pieces[i + 1], pieces[i]
            t = torch.cat(pieces)
        for old, new in starts.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        if name.startswith("joint_blocks."):
            for old, new in names.items():
                name = name.replace(old, new)
        out[f"model.diffusion_model.{name}"] = t
    return out


SD3_KINDS = {
    "medium": dict(qk_norm="none", n_heads=1, hidden=64),
    "3.5 large": {},
    "3.5 medium": dict(dual_blocks=(0,)),
}


@pytest.mark.parametrize("kind", SD3_KINDS)
def test_the_single_file_of_stable_diffusion_3_is_read(kind, tmp_path):
    model = made("mmdit", **SD3_KINDS[kind])
    tensors = original_sd3(model)
    others = {"first_stage_model.encoder.conv_in.weight": torch.zeros(3)}
    save_file({n: t.contiguous() for n, t in (tensors | others).items()}, tmp_path / "sd3.st")
    read = fastdit.load(tmp_path / "sd3.st")
    check_same(read, model)
    assert read.diffusion == FLOW.options
    assert inspect(tmp_path / "sd3.st").assumed == ()


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
