"""LoRA in a live module is merged as the module computes it, or is refused by name."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastdit
from fastdit.testing import randomize, relative_error

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

TARGETS = r".*(attn\d?\.to_(q|k|v|out\.0)|add_k_proj|to_add_out|ff\.net\.0\.proj|pos_embed\.proj)"


def theirs(kind):
    """Return a tiny transformer of diffusers with random weights."""
    torch.manual_seed(0)
    shared = dict(num_attention_heads=2, in_channels=4, num_layers=2, sample_size=8)
    if kind == "pixart":
        sizes = dict(attention_head_dim=12, cross_attention_dim=24, caption_channels=20)
        model = diffusers.PixArtTransformer2DModel(**shared, **sizes)
    elif kind == "sd3":
        sizes = dict(attention_head_dim=8, joint_attention_dim=20, caption_projection_dim=16)
        more = dict(pooled_projection_dim=12, pos_embed_max_size=8, out_channels=4)
        model = diffusers.SD3Transformer2DModel(**shared, **sizes, **more)
    else:
        model = diffusers.DiTTransformer2DModel(**shared, attention_head_dim=12)
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        model.transformer_blocks[1].norm1.emb.load_state_dict(first)
    randomize(model)
    return model.eval()


def config(**options):
    return peft.LoraConfig(**dict(r=3, lora_alpha=5, target_modules=TARGETS) | options)


def adapted(kind, *names):
    """Return a transformer with adapters of random weights."""
    module = theirs(kind)
    for i, name in enumerate(names):
        if kind == "sd3":
            module.add_adapter(config(), adapter_name=name)
        else:  # diffusers itself has no adapters for these
            peft.inject_adapter_in_model(config(), module, adapter_name=name)
        torch.manual_seed(10 + i)
        for weight_name, p in module.named_parameters():
            if f".{name}." in weight_name:
                torch.nn.init.normal_(p, std=0.3)
    return module.eval()


def activate(module, scales):
    """Make adapters active with given scales, and the others not; none disables all."""
    if hasattr(module, "set_adapters"):
        if scales:
            module.set_adapters(list(scales), list(scales.values()))
        else:
            module.disable_adapters()
        return
    for layer in module.modules():
        if hasattr(layer, "lora_A"):
            layer.enable_adapters(bool(scales))
            layer.set_adapter(list(scales))
            for name, scale in scales.items():
                layer.set_scale(name, scale)


@torch.no_grad()
def error(module, model):
    """Return how far fastdit's output is from the module's on the same inputs."""
    torch.manual_seed(5)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    if isinstance(model, fastdit.DiT):
        y = torch.tensor([1, 5])
        return relative_error(model(x, t, y), module(x, timestep=t, class_labels=y)[0])
    text = torch.randn(2, 5, 20)
    if isinstance(model, fastdit.PixArt):
        return relative_error(model(x, t, text), module(x, text, t, {}, return_dict=False)[0])
    pooled = torch.randn(2, 12)
    return relative_error(model(x, t, text, pooled), module(x, text, pooled, t)[0])


@pytest.mark.parametrize("kind", ["pixart", "sd3", "dit"])
def test_active_adapters_are_merged_by_their_scales(kind):
    module = adapted(kind, "one", "two")
    kept = {name: t.clone() for name, t in module.state_dict().items()}
    activate(module, {"one": 0.5, "two": -2.0})
    both = fastdit.load(module)
    assert error(module, both) < 1e-5
    activate(module, {"two": 0.7})
    one = fastdit.load(module)
    assert error(module, one) < 1e-5 and error(module, both) > 1e-3
    activate(module, {})
    plain = fastdit.load(module)
    assert error(module, plain) < 1e-5 and error(module, one) > 1e-3
    untouched = fastdit.load(theirs(kind)).state_dict()
    assert all(torch.equal(untouched[name], t) for name, t in plain.state_dict().items())
    assert all(torch.equal(kept[name], t) for name, t in module.state_dict().items())


def test_what_is_merged_already_is_counted_once():
    module = adapted("sd3", "one", "two")
    module.set_adapters("one", 0.5)
    before = fastdit.load(module)
    module.fuse_lora(adapter_names=["one"])
    module.set_adapters(["one", "two"])  # peft computes with the merged weights alone
    assert error(module, fastdit.load(module)) < 1e-5
    assert error(module, before) < 1e-5
    module.disable_adapters()
    plain = fastdit.load(module)  # before a forward takes the merged ones out
    assert error(module, plain) < 1e-5 and error(module, before) > 1e-3


def test_files_of_lora_load_through_diffusers_and_are_refused_alone(tmp_path):
    adapted("sd3", "one").save_lora_adapter(tmp_path, adapter_name="one")
    (file,) = tmp_path.glob("*.safetensors")
    module = theirs("sd3")
    module.load_lora_adapter(load_file(file), prefix=None)
    model = fastdit.load(module)
    assert error(module, model) < 1e-5 and error(theirs("sd3"), model) > 1e-3
    refused = "expected a model's weights, got those of LoRA"
    for source in (tmp_path, file, module.state_dict(), {"state_dict": module.state_dict()}):
        with pytest.raises(ValueError, match=refused):
            fastdit.load(source)
    kohya = {"lora_unet_blocks_0_attn.lora_down.weight": torch.zeros(3, 4)}
    save_file(kohya, tmp_path / "kohya.safetensors")
    with pytest.raises(ValueError, match=refused):
        fastdit.load(tmp_path / "kohya.safetensors")
    module.save_pretrained(tmp_path / "all")
    with pytest.raises(ValueError, match=refused):
        fastdit.load(tmp_path / "all")


def test_a_wrapped_model_half_precision_and_biases_are_merged():
    module = peft.get_peft_model(theirs("sd3"), config(lora_bias=True, use_rslora=True))
    for name, p in module.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    module.eval()
    model = fastdit.load(module)
    assert error(module, model) < 1e-5
    base = module.get_base_model()
    half = {n: p for n, p in base.named_parameters() if "lora_" not in n}
    for p in half.values():
        p.data = p.data.to(torch.bfloat16)
    base.pos_embed.pos_embed = base.pos_embed.pos_embed.to(torch.bfloat16)
    merged = fastdit.load(module).state_dict()
    for p in half.values():
        p.data = p.data.float()
    exact = fastdit.load(module).state_dict()
    name = "blocks.0.image.attn.proj.weight"
    assert torch.equal(merged[name], exact[name].to(torch.bfloat16))


def dora(module):
    peft.inject_adapter_in_model(config(use_dora=True, target_modules=["to_q"]), module)


def saved_modules(module):
    peft.inject_adapter_in_model(config(modules_to_save=["proj_out"]), module)


def embeddings(module):
    peft.inject_adapter_in_model(config(target_modules=["embedding_table"]), module)


def tokens(module):
    peft.inject_adapter_in_model(peft.LoHaConfig(r=2, target_modules=["to_q"]), module)


def scaled(module):
    names = dict(target_modules=["to_q"], feedforward_modules=[])
    peft.inject_adapter_in_model(peft.IA3Config(**names), module)


def parameters(module):
    names = dict(target_modules=[], target_parameters=["transformer_blocks.0.scale_shift_table"])
    peft.inject_adapter_in_model(config(**names), module)


REFUSED = [
    ("pixart", dora, r"to_q: expected plain LoRA, got Dora\w* \(adapter 'default'\)"),
    (
        "pixart",
        saved_modules,
        r"proj_out: expected plain LoRA, got ModulesToSave\w* \(modules_",
    ),
    ("dit", embeddings, r"embedding_table: expected LoRA of a linear or a .*, got lora.*Embedding"),
    ("pixart", tokens, r"to_q: expected LoRA of a linear or a convolution, got loha"),
    ("pixart", scaled, r"to_q: expected LoRA of a linear or a convolution, got ia3"),
    ("pixart", parameters, r"expected LoRA of a linear or a convolution, got lora.*ParamWrapper"),
]


@pytest.mark.parametrize("kind, inject, message", REFUSED, ids=lambda v: getattr(v, "__name__", ""))
def test_other_adapters_are_refused_by_name(kind, inject, message):
    module = theirs(kind)
    inject(module)
    with pytest.raises(ValueError, match=message):
        fastdit.load(module)


def test_an_adapter_of_prompts_is_refused():
    class Prompted(torch.nn.Module):
        """Stands for a PeftModel whose adapter adds tokens to a prompt."""

        active_peft_config = peft.PromptTuningConfig(num_virtual_tokens=2)

    Prompted.__name__, Prompted.__module__ = "PeftModel", "peft.peft_model"
    with pytest.raises(ValueError, match="expected LoRA, got an adapter of prompts, .*PROMPT_TUN"):
        fastdit.load(Prompted())
