"""PixArt and Stable Diffusion 3 in the files of their own projects."""

import pytest
import torch
from safetensors.torch import save_file

import fastdit
from fastdit.checkpoints import inspect
from fastdit.testing import randomize

TINY = dict(hidden=24, n_layers=2, n_heads=2, text_width=20, img_size=8)
MMDIT = TINY | dict(in_channels=4, pooled_width=12, position_size=6, qk_norm="rms")


def randomized(model):
    torch.manual_seed(0)
    randomize(model)
    return model


def check_same(model, other):
    assert type(model) is type(other) and model.cfg == other.cfg
    own, theirs = model.state_dict(), other.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[n], theirs[n]) and own[n].dtype == theirs[n].dtype for n in own)


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
    model = randomized(fastdit.PixArt(**TINY, **options))
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
    model = randomized(fastdit.PixArt(**TINY, size_conditions=True, text_tokens=7))
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
    model = randomized(fastdit.MMDiT(**MMDIT | SD3_KINDS[kind]))
    tensors = original_sd3(model)
    others = {"first_stage_model.encoder.conv_in.weight": torch.zeros(3)}
    save_file({n: t.contiguous() for n, t in (tensors | others).items()}, tmp_path / "sd3.st")
    read = fastdit.load(tmp_path / "sd3.st")
    check_same(read, model)
    assert read.diffusion == fastdit.FlowMatching(clean_at=0, time_scale=1000).options
    assert inspect(tmp_path / "sd3.st").assumed == ()
