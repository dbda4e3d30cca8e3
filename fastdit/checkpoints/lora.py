"""LoRA of the package peft: the layers of a live module are merged into its weights.

diffusers loads LoRA weights into such layers too. What a module computes with them depends on which
adapters are active and on their scales, so that a live module tells all of it, and a file that
holds nothing but LoRA weights does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_LAYERS = ("Linear", "Conv2d")  # of peft's LoRA, to which a product of two matrices is added
# Parts of names of tensors that belong to adapters, of peft's, diffusers' and Kohya's files.
_MARKS = ("lora_A.", "lora_B.", "lora_down.", "lora_up.", ".lora.down.", ".lora.up.")
_MORE_MARKS = ("lora_magnitude_vector", "hada_w1_", "lokr_w", "dora_scale", ".base_layer.")
# Files of an adapter in a folder, as diffusers and peft name them.
ADAPTER_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_ADVICE = "load them by diffusers or peft into the model, and pass that live module to fastdit.load"


def check_no_adapter(names: Iterable[Any]) -> None:
    """Raise a ValueError if some names of tensors are those of an adapter's, such as LoRA."""
    marks = (*_MARKS, *_MORE_MARKS)
    found = next((n for n in names if isinstance(n, str) and any(m in n for m in marks)), None)
    if found is not None:
        raise adapter_error(found)


def adapter_error(found: str) -> ValueError:
    """Return the error for weights of an adapter in place of a model's; `found` shows them."""
    return ValueError(f"expected a model's weights, got those of LoRA ({found:.80}); {_ADVICE}")


def without_wrapper(module: nn.Module) -> nn.Module:
    """Return the model inside peft's own, which has the adapters' layers in it.

    Raises:
        ValueError: the adapter changes what the model is given, and not its weights.
    """
    while _is_a(module, "PeftModel", "PeftMixedModel", "BaseTuner"):
        active = getattr(module, "active_peft_config", None)
        if getattr(active, "is_prompt_learning", False):
            kind = getattr(active, "peft_type", type(active).__name__)
            raise ValueError(f"expected LoRA, got an adapter of prompts, {kind}")
        get_base = getattr(module, "get_base_model", None)
        module = module.get_submodule("model") if get_base is None else get_base()
    return module


@torch.no_grad()
def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state dict as it would be without LoRA, with what LoRA adds in the weights.

    What is added is that of the active adapters, by their scales, in float32; the sum is rounded
    once, to the weight's dtype. What peft has merged already is in the weights, and is taken out
    again where adapters are disabled. The module is left as it is.

    Raises:
        ValueError: a layer is no plain LoRA, such as DoRA or `modules_to_save`; the message names
            the layer and the kind.
    """
    state, done = module.state_dict(), ""
    for path, layer in module.named_modules():
        if done and path.startswith(done):
            continue  # the matrices of the layer before
        if _is_a(layer, "BaseTunerLayer"):
            done = f"{path}."
            _merge(path, layer, state)
        elif _is_a(layer, "AuxiliaryTrainingWrapper"):
            kind = type(layer).__name__
            raise ValueError(f"{path}: expected plain LoRA, got {kind} (modules_to_save)")
        elif type(layer).__module__.startswith("peft."):
            raise ValueError(f"{path}: expected plain LoRA, got {type(layer).__name__}")
    return state


def _is_a(module: nn.Module, *names: str) -> bool:
    """Return whether a module is of one of peft's classes; importing peft takes seconds."""
    bases = type(module).__mro__
    return any(base.__name__ in names and base.__module__.startswith("peft.") for base in bases)


def _merge(path: str, layer: Any, state: dict[str, Tensor]) -> None:
    """Replace the tensors of a layer of LoRA by those of the plain layer that it stands for."""
    kind = f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"
    plain = kind.startswith("lora.layer.") and type(layer).__name__ in _LAYERS
    base = getattr(layer, "base_layer", None)
    if not plain or type(base).__module__.startswith("peft."):
        raise ValueError(f"{path}: expected LoRA of a linear or a convolution, got {kind}")
    start = f"{path}."
    own = [name for name in state if name.startswith(start)]
    tensors = {name.removeprefix(start): state.pop(name) for name in own}
    weights = {
        name.removeprefix("base_layer."): t
        for name, t in tensors.items()
        if name.startswith("base_layer.")
    }
    for adapter, sign in _changes(layer):
        _check_plain_adapter(path, layer, adapter)
        scale = sign * float(layer.scaling[adapter])
        added = _product(layer, adapter)
        if added.numel() != weights["weight"].numel():
            got = f"{list(added.shape)} for a weight of {list(weights['weight'].shape)}"
            raise ValueError(f"{path}: expected LoRA as large as the weight, got {got}")
        _add(weights, "weight", added.reshape(weights["weight"].shape), scale)
        if (bias := layer.lora_B[adapter].bias) is not None:
            if "bias" not in weights:
                raise ValueError(f"{path}: LoRA has a bias ({adapter!r}), but the layer has none")
            _add(weights, "bias", bias, scale)
    dtypes = {name: tensors[f"base_layer.{name}"].dtype for name in weights}
    state |= {f"{path}.{name}": t.to(dtypes[name]) for name, t in weights.items()}


def _changes(layer: Any) -> list[tuple[str, int]]:
    """Return the adapters that the weights lack, with 1, or have too much, with -1."""
    merged = list(layer.merged_adapters)
    if layer.disable_adapters:
        return [(name, -1) for name in merged if name in layer.lora_A]
    if merged:  # peft then computes with the weights alone, whatever is active
        return []
    return [(name, 1) for name in layer.active_adapters if name in layer.lora_A]


def _check_plain_adapter(path: str, layer: Any, adapter: str) -> None:
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    name = None if variant is None else type(variant).__name__
    if name is None and getattr(layer, "use_dora", {}).get(adapter):
        name = "DoRA"
    if name is not None:
        raise ValueError(f"{path}: expected plain LoRA, got {name} (adapter {adapter!r})")


def _product(layer: Any, adapter: str) -> Tensor:
    """Return what an adapter adds to a weight at a scale of one, in float32, [rows, the rest]."""
    down, up = (part[adapter].weight.detach().float() for part in (layer.lora_A, layer.lora_B))
    product = up.flatten(1) @ down.flatten(1)
    return product.T if getattr(layer, "fan_in_fan_out", False) else product


def _add(weights: dict[str, Tensor], name: str, added: Tensor, scale: float) -> None:
    own = weights[name].detach()
    wide = torch.promote_types(own.dtype, torch.float32)
    weights[name] = own.to(wide) + scale * added.to(own.device, wide)


def adapters_of(content: Any) -> Iterable[Any]:
    """Yield the names in a file's content, and in its entries, among which an adapter's may be."""
    if isinstance(content, Mapping):
        yield from content
        for value in content.values():
            if isinstance(value, Mapping):
                yield from value
