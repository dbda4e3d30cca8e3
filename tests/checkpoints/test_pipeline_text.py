"""A PipelineTransformer is at home in diffusers' pipelines for text."""

import copy
import json
import pickle

import diffusers
import peft
import pytest
import torch

import fastdit
from fastdit.pipeline import PipelineTransformer
from fastdit.testing import check_against_oracle, randomize, relative_error

WIDTH, TOKENS = 20, 7  # of the embeddings
SIZES = dict(num_attention_heads=2, in_channels=4, num_layers=2)


def make_pixart(**options):
    torch.manual_seed(0)
    sizes = dict(attention_head_dim=12, cross_attention_dim=24, caption_channels=WIDTH)
    model = diffusers.PixArtTransformer2DModel(**SIZES | sizes | options)
    randomize(model)
    return model.eval()


def make_sd3(**options):
    torch.manual_seed(0)
    sizes = dict(sample_size=8, attention_head_dim=8, out_channels=4, pos_embed_max_size=24)
    text = dict(joint_attention_dim=WIDTH, caption_projection_dim=16, pooled_projection_dim=12)
    model = diffusers.SD3Transformer2DModel(**SIZES | sizes | text | options)
    randomize(model)
    return model.eval()


@pytest.fixture(scope="module")
def alpha():
    """At the size of 1,024 pixels, for which alpha's pipeline passes conditions on the size."""
    return make_pixart(sample_size=128)


@pytest.fixture(scope="module")
def sd35():
    return make_sd3(num_layers=3, dual_attention_layers=(0, 1), qk_norm="rms_norm")


def pipeline_of(name, transformer, vae):
    if name == "StableDiffusion3Pipeline":
        encoders = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in NUMBERS}
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        vae = copy.deepcopy(vae)
        vae.register_to_config(shift_factor=0.06)
    else:
        encoders = dict(text_encoder=None, tokenizer=None)
        scheduler = diffusers.DPMSolverMultistepScheduler()
    parts = dict(transformer=transformer, vae=vae, scheduler=scheduler)
    pipe = getattr(diffusers, name)(**encoders, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


NUMBERS = ("", "_2", "_3")


def prompts(name, batch, dtype=torch.float32):
    """Return the arguments that are embeddings, of prompts of different lengths."""
    generator = torch.Generator().manual_seed(7)

    def noise(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    given = dict(prompt_embeds=noise(batch, TOKENS, WIDTH))
    given["negative_prompt_embeds"] = noise(batch, TOKENS, WIDTH)
    if name == "StableDiffusion3Pipeline":
        pooled = dict(pooled_prompt_embeds=noise(batch, 12))
        return given | pooled | dict(negative_pooled_prompt_embeds=noise(batch, 12))
    lengths = torch.tensor([[TOKENS - 1], [2], [4]])[:batch]
    masks = dict(prompt_attention_mask=torch.arange(TOKENS) < lengths)
    masks["negative_prompt_attention_mask"] = (torch.arange(TOKENS) < 1).expand(batch, -1)
    other = dict(negative_prompt=None, use_resolution_binning=False)
    return given | {name: mask.long() for name, mask in masks.items()} | other


def images(pipe, batch=1, height=8, width=8, dtype=torch.float32, **options):
    name = type(pipe).__name__
    given = prompts(name, batch, dtype) | dict(num_inference_steps=8, output_type="latent")
    given |= dict(height=height, width=width, generator=torch.manual_seed(5)) | options
    made = pipe(**given).images
    return made if isinstance(made, torch.Tensor) else torch.from_numpy(made)


def exchanged(pipe):
    """Return the pipeline as users exchange its transformer."""
    pipe.transformer = PipelineTransformer(fastdit.load(pipe.transformer))
    return pipe


ALPHA, SIGMA, SD3 = "PixArtAlphaPipeline", "PixArtSigmaPipeline", "StableDiffusion3Pipeline"
CASES = {
    "alpha-sizes": (ALPHA, dict(sample_size=128), dict(batch=3, width=16)),
    "alpha-images": (ALPHA, dict(sample_size=32), dict(num_images_per_prompt=2)),
    "sigma": (SIGMA, dict(sample_size=64, interpolation_scale=2), dict(batch=3, height=16)),
    "sigma-one-output": (SIGMA, dict(out_channels=4, sample_size=32), dict(output_type="np")),
    "sigma-plain": (SIGMA, dict(sample_size=32), dict(guidance_scale=1.0)),
    "sd3": (SD3, {}, dict(batch=3, height=16)),
    "sd3-pixels": (SD3, {}, dict(output_type="np")),
    "sd3-plain": (SD3, dict(qk_norm="rms_norm"), dict(guidance_scale=1.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_pipelines_images_are_diffusers_own(case, vae):
    name, config, call = CASES[case]
    pipe = pipeline_of(name, (make_sd3 if name == SD3 else make_pixart)(**config), vae)
    theirs = images(pipe, **call)
    assert relative_error(images(exchanged(pipe), **call), theirs) < 1e-5


def test_skip_layer_guidance_leaves_out_the_same_blocks(sd35, vae):
    pipe = pipeline_of(SD3, sd35, vae)
    skip = dict(skip_guidance_layers=[1, 2], skip_layer_guidance_stop=0.6, width=16)
    theirs, plain = images(pipe, **skip), images(pipe, width=16)
    assert relative_error(theirs, plain) > 1e-3
    assert relative_error(images(exchanged(pipe), **skip), theirs) < 1e-5
    for skipped in ([-1], [3], [0, 1, 2]):
        with pytest.raises(ValueError, match="skip_layers: expected numbers of blocks from 0 to 2"):
            images(pipe, **skip | dict(skip_guidance_layers=skipped))


@pytest.mark.parametrize("name", [ALPHA, SD3])
def test_a_pipeline_in_bfloat16_is_as_exact_as_diffusers_own(name, alpha, sd35, vae):
    call = dict(batch=3, height=16, width=32)
    half = copy.deepcopy(sd35 if name == SD3 else alpha).bfloat16()
    exact = pipeline_of(name, copy.deepcopy(half).double(), vae)
    embeds = prompts(name, 3, torch.bfloat16)
    wide = {k: v.double() for k, v in embeds.items() if k.endswith("embeds")}
    oracle = images(exact, **call, latents=start(torch.float64), **wide).double()
    pipe = pipeline_of(name, half, vae)
    call |= dict(dtype=torch.bfloat16, latents=start(torch.bfloat16))
    plain, ours = images(pipe, **call), images(exchanged(pipe), **call)
    assert ours.dtype == torch.bfloat16
    check_against_oracle(ours, plain, oracle)


def start(dtype):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 4, 16, 32, generator=generator).bfloat16().to(dtype)


@pytest.mark.parametrize("name", [ALPHA, SD3])
def test_a_pipeline_is_saved_in_diffusers_own_layout(name, alpha, sd35, vae, tmp_path):
    own = sd35 if name == SD3 else alpha
    pipe = pipeline_of(name, own, vae)
    pipe.save_pretrained(tmp_path / "theirs")
    exchanged(pipe).save_pretrained(tmp_path / "ours")
    indexes = [json.loads((tmp_path / x / "model_index.json").read_text()) for x in FOLDERS]
    assert indexes[0] == indexes[1]
    assert indexes[0]["transformer"] == ["diffusers", type(own).__name__]
    configs = [json.loads((tmp_path / x / "transformer/config.json").read_text()) for x in FOLDERS]
    computed = {"interpolation_scale", "use_additional_conditions"}  # null stands for the default
    mine, theirs = ({k: v for k, v in c.items() if k[0] != "_"} for c in configs)
    assert {k: v for k, v in mine.items() if k not in computed} == {
        k: v for k, v in theirs.items() if k not in computed
    }
    absent = {part: None for part, value in pipe.components.items() if value is None}
    again = type(pipe).from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False, **absent)
    assert type(again.transformer) is type(own)
    for key, t in own.state_dict().items():
        assert torch.equal(again.transformer.state_dict()[key], t), key


FOLDERS = ("ours", "theirs")


@pytest.mark.parametrize("name", [ALPHA, SD3])
def test_a_pipeline_moves_copies_and_pickles_it(name, alpha, sd35, vae):
    pipe = exchanged(pipeline_of(name, sd35 if name == SD3 else alpha, vae))
    given = dict(latents=start(torch.float32)[:1, :, :8, :8], num_inference_steps=2)
    own, before = pipe.transformer, images(pipe, **given)
    for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert type(other) is type(own) and dict(other.config) == dict(own.config)
        pipe.transformer = other
        assert torch.equal(images(pipe, **given), before)
        assert other.model.final_linear.weight is not own.model.final_linear.weight
    pipe.to(torch.float64)
    assert other.dtype == torch.float64 and own.dtype == torch.float32
    wide = images(pipe, dtype=torch.float64, **given | dict(latents=given["latents"].double()))
    assert relative_error(wide, before) < 1e-4 and not torch.equal(wide.float(), before)
    pipe.to(torch.float32)
    assert torch.equal(images(pipe, **given), before)


@pytest.mark.parametrize("name", [ALPHA, SD3])
def test_a_pipeline_offloads_it(name, alpha, sd35, vae):
    pipe = exchanged(pipeline_of(name, sd35 if name == SD3 else alpha, vae))
    before = images(pipe, num_inference_steps=2)
    pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipe.transformer, "_hf_hook")
    assert torch.equal(images(pipe, num_inference_steps=2), before)


def test_sd3_refuses_what_it_does_not_compute(sd35):
    own = PipelineTransformer(fastdit.load(sd35))
    given = dict(
        hidden_states=torch.randn(2, 4, 8, 8),
        encoder_hidden_states=torch.randn(2, TOKENS, WIDTH),
        pooled_projections=torch.randn(2, 12),
        timestep=torch.tensor(500.0),
    )
    plain = own(**given).sample
    for options in (None, {}, {"scale": None}, {"scale": 1.0}):
        assert torch.equal(own(**given, joint_attention_kwargs=options).sample, plain)
    refused = {
        "joint_attention_kwargs['scale']: expected None or 1": {"scale": 0.5},
        "ip_adapter_image_embeds'].*takes no IP adapter": {"ip_adapter_image_embeds": plain},
        "'ip_hidden_states'].*takes no IP adapter": {"ip_hidden_states": plain},
        "'gate']: expected no option but 'scale'": {"gate": 1},
    }
    for message, options in refused.items():
        with pytest.raises(ValueError, match=message.replace("[", r"\[")):
            own(**given, joint_attention_kwargs=options)
    with pytest.raises(ValueError, match="block_controlnet_hidden_states: expected None, since"):
        own(**given, block_controlnet_hidden_states=[plain])
    for name in ("encoder_hidden_states", "pooled_projections", "timestep"):
        with pytest.raises(ValueError, match=f"{name}: expected a tensor, got None"):
            own(**given | {name: None})
    with pytest.raises(ValueError, match="encoder_hidden_states: expected shape.*got.*19"):
        own(**given | dict(encoder_hidden_states=torch.randn(2, TOKENS, 19)))


def test_adapters_before_the_exchange_are_merged(sd35, vae):
    adapted = copy.deepcopy(sd35)
    pipe = pipeline_of(SD3, adapted, vae)
    plain = images(pipe)
    layers = ["to_q", "to_v", "add_k_proj"]
    adapted.add_adapter(peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    theirs = images(pipe)
    assert relative_error(theirs, plain) > 1e-3
    assert relative_error(images(exchanged(pipe)), theirs) < 1e-5


def test_adapters_after_the_exchange_are_refused(sd35, vae):
    pipe = exchanged(pipeline_of(SD3, sd35, vae))
    at = "transformer.transformer_blocks.0.attn.to_q"
    down, up = torch.zeros(2, 16), torch.zeros(16, 2)
    lora = {f"{at}.lora_A.weight": down, f"{at}.lora_B.weight": up}
    own = pipe.transformer
    calls = {
        "load_lora_adapter": lambda: pipe.load_lora_weights(lora),
        "add_adapter": lambda: own.add_adapter(None),
        "set_adapters": lambda: own.set_adapters("style"),
        "fuse_lora": lambda: own.fuse_lora(),
        "delete_adapters": lambda: own.delete_adapters("style"),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name}: .*load LoRA before it, and fastdit.load"):
            call()
    with pytest.raises(ValueError, match="_load_ip_adapter_weights: .*takes no IP adapter"):
        own._load_ip_adapter_weights([])
    with pytest.raises(ValueError, match="set_attn_processor: .*computes attention itself"):
        own.set_attn_processor(None)


def test_a_text_is_encoded_once_for_all_steps(alpha, vae, monkeypatch):
    pipe = exchanged(pipeline_of(ALPHA, alpha, vae))
    model, encoded = pipe.transformer.model, []
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda *x: encoded.append(None) or encode(*x))
    images(pipe)
    assert len(encoded) == 1
    images(pipe)
    assert len(encoded) == 2  # of new tensors, though of equal values
    assert pipe.transformer._kept._entry is None  # nothing outlives the call
