"""fastdit.PixArt and fastdit.MMDiT equal the transformers of diffusers, whose weights they take.

The translation is written out here, so that a fault of the loader's cannot hide one of the models'.
"""

import diffusers
import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel

import fastdit
from fastdit.solvers import DPMSolverPP, Euler
from fastdit.testing import check_against_oracle, randomize, relative_error

LENGTHS = torch.tensor([7, 1, 4])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def swapped(rows, parts):
    """Return modulation's rows in our order, (scale, shift, gate), from (shift, scale, gate)."""
    return rows.unflatten(0, (parts // 3, 3, -1))[:, [1, 0, 2]].flatten(0, 2)


class Translation:
    """Our state dict, filled from theirs."""

    def __init__(self, theirs):
        self.theirs, self.own = theirs, {}

    def put(self, name, *sources, change=None):
        """Take weight, and bias if there is one, of our `name` from theirs, one below the other."""
        for kind in ("weight", "bias"):
            found = [self.theirs.pop(f"{s}.{kind}", None) for s in sources]
            if found[0] is not None:
                together = torch.cat(found)
                self.own[f"{name}.{kind}"] = change(together) if change else together

    def embedder(self, name, source):
        for i, number in ((0, 1), (2, 2)):
            self.put(f"{name}.{i}", f"{source}.linear_{number}")

    def mlp(self, name, source):
        self.put(f"{name}.0", f"{source}.net.0.proj")
        self.put(f"{name}.2", f"{source}.net.2")

    def attention(self, name, source, linears="to_{}", out="to_out.0", norm="norm_{}"):
        self.put(f"{name}.qkv", *[f"{source}.{linears.format(c)}" for c in "qkv"])
        self.put(f"{name}.proj", f"{source}.{out}")
        for c in "qk":
            self.put(f"{name}.{c}_norm", f"{source}.{norm.format(c)}")

    def finish(self):
        assert not self.theirs, list(self.theirs)
        return self.own


def from_pixart(theirs):
    out = Translation(dict(theirs.state_dict()))
    out.put("patch_embed.proj", "pos_embed.proj")
    out.embedder("t_embed", "adaln_single.emb.timestep_embedder")
    out.embedder("size_embed", "adaln_single.emb.resolution_embedder")
    out.embedder("ratio_embed", "adaln_single.emb.aspect_ratio_embedder")
    out.put("modulation", "adaln_single.linear", change=lambda rows: swapped(rows, 6))
    out.embedder("text_embed", "caption_projection")
    out.put("final_linear", "proj_out")
    tables = []
    for i in range(len(theirs.transformer_blocks)):
        own, their = f"blocks.{i}", f"transformer_blocks.{i}"
        out.attention(f"{own}.attn", f"{their}.attn1")
        out.put(f"{own}.cross.q", f"{their}.attn2.to_q")
        out.put(f"{own}.cross.kv", f"{their}.attn2.to_k", f"{their}.attn2.to_v")
        out.put(f"{own}.cross.proj", f"{their}.attn2.to_out.0")
        out.mlp(f"{own}.mlp", f"{their}.ff")
        tables.append(swapped(out.theirs.pop(f"{their}.scale_shift_table"), 6))
    out.own["block_tables"] = torch.stack(tables)
    out.own["final_table"] = out.theirs.pop("scale_shift_table").flip(0)
    return out.finish()


def from_sd3(theirs):
    out = Translation(dict(theirs.state_dict()))
    out.own["pos_embed"] = out.theirs.pop("pos_embed.pos_embed")
    out.put("patch_embed.proj", "pos_embed.proj")
    out.embedder("t_embed", "time_text_embed.timestep_embedder")
    out.embedder("pooled_embed", "time_text_embed.text_embedder")
    out.put("text_embed", "context_embedder")
    out.put("final_mod", "norm_out.linear")
    out.put("final_linear", "proj_out")
    for i, block in enumerate(theirs.transformer_blocks):
        own, their = f"blocks.{i}", f"transformer_blocks.{i}"
        parts = 9 if block.use_dual_attention else 6
        order = dict(change=lambda rows, parts=parts: swapped(rows, parts))
        out.put(f"{own}.image.modulation", f"{their}.norm1.linear", **order)
        order = {} if block.context_pre_only else dict(change=lambda rows: swapped(rows, 6))
        out.put(f"{own}.text.modulation", f"{their}.norm1_context.linear", **order)
        out.attention(f"{own}.image.attn", f"{their}.attn")
        added = dict(linears="add_{}_proj", out="to_add_out", norm="norm_added_{}")
        out.attention(f"{own}.text.attn", f"{their}.attn", **added)
        out.attention(f"{own}.image.dual", f"{their}.attn2")
        out.mlp(f"{own}.image.mlp", f"{their}.ff")
        out.mlp(f"{own}.text.mlp", f"{their}.ff_context")
    return out.finish()


PIXART = dict(
    num_attention_heads=2,
    attention_head_dim=12,
    out_channels=8,
    num_layers=2,
    cross_attention_dim=24,
    sample_size=16,
    caption_channels=20,
)
ALPHA = PIXART | dict(use_additional_conditions=False)
OWN_PIXART = dict(img_size=16, hidden=24, n_layers=2, n_heads=2, text_width=20)
SD3 = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=20,
    caption_projection_dim=16,
    pooled_projection_dim=12,
    pos_embed_max_size=12,
)
OWN_MMDIT = dict(
    img_size=8,
    in_channels=4,
    hidden=16,
    n_layers=3,
    n_heads=2,
    text_width=20,
    pooled_width=12,
    position_size=12,
)
# Their options, and the same in our words.
CASES = {
    "alpha": (ALPHA, OWN_PIXART),
    "alpha-1024": (
        PIXART | dict(use_additional_conditions=True, interpolation_scale=2),
        OWN_PIXART | dict(size_conditions=True, position_scale=2.0),
    ),
    "sigma": (
        ALPHA | dict(interpolation_scale=2),
        OWN_PIXART | dict(position_scale=2.0),
    ),
    "no-projection": (
        PIXART
        | dict(caption_channels=None, cross_attention_dim=20, use_additional_conditions=False),
        OWN_PIXART | dict(text_projection=False),
    ),
    "pixart-options": (
        ALPHA | dict(attention_bias=False, activation_fn="gelu", out_channels=4, norm_eps=1e-3),
        OWN_PIXART | dict(qkv_bias=False, gelu="erf", learn_sigma=False, ln_eps=1e-3),
    ),
    "sd3": (SD3, OWN_MMDIT),
    "sd3.5-large": (SD3 | dict(qk_norm="rms_norm"), OWN_MMDIT | dict(qk_norm="rms")),
    "sd3.5-medium": (
        SD3 | dict(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
        OWN_MMDIT | dict(qk_norm="rms", dual_blocks=(0, 1)),
    ),
}
by_case = pytest.mark.parametrize(("options", "own"), CASES.values(), ids=CASES.keys())


def make_pair(options, own):
    sd3 = "pos_embed_max_size" in options
    theirs = (SD3Transformer2DModel if sd3 else PixArtTransformer2DModel)(**options).eval()
    randomize(theirs)
    model = (fastdit.MMDiT if sd3 else fastdit.PixArt)(**own)
    if sd3:  # a fresh model's table of positions, of which theirs has a rounding of its own
        assert (model.pos_embed - theirs.pos_embed.pos_embed).abs().max() < 1e-5
    model.load_state_dict((from_sd3 if sd3 else from_pixart)(theirs))
    return theirs, model


def make_inputs(cfg, dtype=torch.float32):
    """Return arguments of our forward."""
    named = dict(x=torch.randn(3, 4, 12, 20), t=torch.tensor([3, 500, 999]))
    named["text"] = torch.randn(3, 7, cfg.text_width)
    if isinstance(cfg, fastdit.MMDiTConfig):
        named["pooled"] = torch.randn(3, cfg.pooled_width)
    elif cfg.size_conditions:
        named["resolution"] = torch.tensor([[96.0, 160.0]]).expand(3, 2)
        named["aspect_ratio"] = torch.tensor([[0.6]]).expand(3, 1)
    return {k: v.to(dtype) if k in ("x", "text", "pooled") else v for k, v in named.items()}


def call_theirs(theirs, x, t, text, lengths=None, pooled=None, **sizes):
    own = next(theirs.parameters()).dtype
    x, text = x.to(own), text.to(own)
    if pooled is not None:
        skip = sizes.get("skip_layers")
        return theirs(x, text, pooled.to(own), t, skip_layers=skip, return_dict=False)[0]
    sizes = sizes or dict(resolution=None, aspect_ratio=None)
    mask = None
    if lengths is not None:
        mask = (torch.arange(text.shape[1]) < lengths[:, None]).to(own)
    return theirs(x, text, t, sizes, encoder_attention_mask=mask, return_dict=False)[0]


@by_case
@torch.no_grad()
def test_a_forward_equals_theirs(options, own):
    """In float32. Their Stable Diffusion 3 has no mask, so that it gets ragged prompts alone."""
    theirs, model = make_pair(options, own)
    given = make_inputs(model.cfg)
    assert relative_error(model(**given), call_theirs(theirs, **given)) < 1e-5
    ragged = model(**given, lengths=LENGTHS)
    if "pooled" not in given:
        assert relative_error(ragged, call_theirs(theirs, **given, lengths=LENGTHS)) < 1e-5
        return
    for i, length in enumerate(LENGTHS):
        alone = {k: v[i : i + 1] for k, v in given.items()}
        alone["text"] = alone["text"][:, :length]
        assert relative_error(ragged[i : i + 1], call_theirs(theirs, **alone)) < 1e-5


@pytest.mark.parametrize("case", ["alpha-1024", "sd3.5-medium"])
@torch.no_grad()
def test_a_bfloat16_forward_meets_the_error_rule(case):
    theirs, model = make_pair(*CASES[case])
    models = theirs.double(), theirs.__class__(**CASES[case][0]).eval(), model.bfloat16()
    models[1].load_state_dict(theirs.state_dict())
    models[1].bfloat16()
    outs = []
    for _ in range(2):  # draws
        given = make_inputs(model.cfg, torch.bfloat16)
        outs.append([call_theirs(m, **given) for m in models[:2]] + [model(**given)])
    oracle, plain, actual = (torch.cat(of_one) for of_one in zip(*outs, strict=True))
    check_against_oracle(actual, plain, oracle)


@pytest.mark.parametrize("skip", [[0], [1, 2], [0, 1, 2]], ids=str)
@torch.no_grad()
def test_skipped_blocks_are_left_out_as_theirs(skip):
    theirs, model = make_pair(*CASES["sd3.5-medium"])
    given = make_inputs(model.cfg) | dict(skip_layers=skip)
    assert relative_error(model(**given), call_theirs(theirs, **given)) < 1e-5


PIPELINES = {
    "alpha-1024": diffusers.PixArtAlphaPipeline,
    "sigma": diffusers.PixArtSigmaPipeline,
    "no-projection": diffusers.PixArtAlphaPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
    "sd3.5-medium": diffusers.StableDiffusion3Pipeline,
}


def embeddings(cfg):
    """Return embeddings, and the pooled ones or the attention masks beside them, by `NAMES`."""
    text = {name: torch.randn(3, 7, cfg.text_width) for name in NAMES}
    if isinstance(cfg, fastdit.MMDiTConfig):
        return text, {name: torch.randn(3, cfg.pooled_width) for name in NAMES}
    lengths = {"prompt_embeds": LENGTHS, "negative_prompt_embeds": LENGTHS.flip(0)}
    return text, {name: (torch.arange(7) < n[:, None]).long() for name, n in lengths.items()}


NAMES = ("prompt_embeds", "negative_prompt_embeds")


@pytest.mark.parametrize("case", PIPELINES)
def test_a_sampler_makes_the_latents_of_diffusers_pipeline(case):
    """Eight guided steps with the published solver, of an image that is not square."""
    theirs, model = make_pair(*CASES[case])
    start, (text, other) = torch.randn(3, 4, 12, 20), embeddings(model.cfg)
    given = dict(transformer=theirs, vae=None, text_encoder=None, tokenizer=None)
    if case.startswith("sd3"):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        given |= {f"{x}_{n}": None for x in ("text_encoder", "tokenizer") for n in (2, 3)}
        process = fastdit.FlowMatching(clean_at=0, time_scale=1000)
        solver = Euler.from_diffusers(shift=3.0)
        call = {n.replace("prompt", "pooled_prompt"): other[n] for n in NAMES}
        prompts = [fastdit.Prompts(text[n], other[n]) for n in NAMES]
    else:
        if model.cfg.size_conditions:
            theirs.register_to_config(sample_size=128)  # at which the pipeline passes them
        scheduler = diffusers.DPMSolverMultistepScheduler()
        process, solver = fastdit.DiffusionScheduler(1000), DPMSolverPP(last_timestep="stride")
        call = {n.replace("embeds", "attention_mask"): other[n] for n in NAMES}
        call |= dict(negative_prompt=None, use_resolution_binning=False)
        prompts = [fastdit.Prompts(text[n], mask=other[n]) for n in NAMES]
    pipe = PIPELINES[case](scheduler=scheduler, **given)
    pipe.set_progress_bar_config(disable=True)
    call |= dict(height=96, width=160, num_inference_steps=8, guidance_scale=4.5)
    expected = pipe(**text, **call, latents=start, output_type="latent").images
    guidance = fastdit.Guidance(4.5)
    sampler = fastdit.Sampler(
        model, process, solver, 8, guidance=guidance, sample_shape=start.shape[1:]
    )
    latents = sampler(prompt_embeds=prompts[0], negative_prompt_embeds=prompts[1], x_T=start)
    assert relative_error(latents, expected) < 1e-5
