"""Finding a model's tensors in what a file holds: nested entries, prefixes of wrappers.

A training checkpoint holds its weights under a name ("model", "state_dict"), often with averaged
ones beside them ("ema"). Wrappers of PyTorch add parts to every tensor's name ("module.", for
example), and frameworks a prefix ("model."). Both are removed here, in any order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit.checkpoints.pickles import Placeholder
from fastdit.checkpoints.projects import JIT, projects_of
from fastdit.errors import first_few

# Data parallelism, torch.compile, FSDP and activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# A part of a name that every model of one layout has, and none of another one.
_MARKERS = ("patch_embed", "x_embedder", "transformer_blocks")
_AVERAGED = ("ema", "average", "shadow")
_FIRST_AVERAGE = "model_ema1"  # of JiT's two the one that it evaluates
_PREFERRED = ("model", "state_dict", "")  # where several weights are not averaged
_SECTIONS = ("model", "data", "transport")  # of LightningDiT's arguments
OWN = "fastdit"  # the entry of a state dict's metadata that holds the config
_MAX_DEPTH = 5
_MAX_ENTRIES = 10_000  # which may be fewer dicts, each of them in many others
_MAX_REPEATS, _MAX_SMALL = 4, 2**28  # a weight may have several names; bytes
_SHOWN = 8


class Entry(NamedTuple):
    """The weights of one model."""

    names: tuple[str, ...]  # the entries and the prefix that lead to the tensors
    tensors: dict[str, Tensor]

    @property
    def averaged(self) -> bool:
        return any(word in name.lower() for name in self.names for word in _AVERAGED)

    @property
    def label(self) -> str:
        return ".".join(self.names)


def find_weights(content: Mapping[Any, Any] | Placeholder, wanted: str | None) -> dict[str, Tensor]:
    """Return the tensors of the model in a file's content, under the names that the model has.

    Args:
        content: what the file holds.
        wanted: the name of an entry or prefix, or several joined by dots; None prefers averaged
            weights, JiT's first ones, then "model", then "state_dict".

    Raises:
        ValueError: there is no model in the content, `wanted` is not in it, or the choice is open.
    """
    found = list(_entries(content, (), 0, itertools.count()))
    if not found:
        raise ValueError(
            f"expected the weights of a DiT, a PixArt or an MMDiT; {_describe(content)}"
        )
    labels = _listed([entry.label for entry in found])
    if wanted is not None:
        chosen = [e for e in found if wanted == e.label or wanted in e.names]
        if not chosen and wanted == "ema":
            chosen = [entry for entry in found if entry.averaged]
        if not chosen:
            raise ValueError(f"weights: expected one of {labels}; got {wanted!r}")
    else:
        chosen = [entry for entry in found if entry.averaged] or found
        by_name = ([e for e in chosen if name in (*e.names[-1:], e.label)] for name in _PREFERRED)
        if len(chosen) > 1 and not chosen[0].averaged:
            chosen = next((some for some in by_name if some), chosen)
    if len(chosen) > 1:
        firsts = [entry for entry in chosen if _FIRST_AVERAGE in entry.names]
        chosen = [entry for entry in firsts if JIT in projects_of(entry.tensors)] or chosen
    if len(chosen) > 1:
        these = _listed([entry.label for entry in chosen])
        raise ValueError(f"weights: several fit; pass weights= with one of {these}")
    check_plain(chosen[0].tensors)
    return chosen[0].tensors


def check_plain(tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless tensors are strided, with memory of about their own size."""
    named, stored = 0, {}
    for name, t in tensors.items():
        if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            how = "; pass its full_tensor()" if hasattr(t, "full_tensor") else ""
            raise ValueError(f"expected plain tensors, but {name} is a {type(t).__name__}{how}")
        if t.is_nested or t.is_quantized or t.layout != torch.strided:
            kind = "nested" if t.is_nested else f"{t.dtype}, {t.layout}"
            raise ValueError(f"expected plain tensors, but {name} is {kind}")
        if not t.is_meta:
            named += t.nbytes
            memory = t.untyped_storage()
            stored[memory.data_ptr()] = memory.nbytes()
    if named > _MAX_REPEATS * sum(stored.values()) + _MAX_SMALL:
        got = f"{named} bytes of them in {sum(stored.values())} bytes of memory"
        raise ValueError(f"expected tensors that do not repeat their values, got {got}")


def arguments_of(content: Any) -> dict[str, Any]:
    """Return what a file says of its model besides the tensors, if anything.

    This is the config that `fastdit.save` writes to other layouts, or the command line or the
    hyperparameters of a training run. Those in LightningDiT's sections are returned beside them.
    """
    if not isinstance(content, Mapping):
        return {}
    metadata = getattr(content, "_metadata", None)
    if isinstance(metadata, Mapping) and isinstance(metadata.get(OWN), Mapping):
        return dict(metadata[OWN])
    for key in ("args", "hyper_parameters", "config", "cfg"):
        value = content.get(key)
        if isinstance(value, Placeholder):
            value = getattr(value, "state", None)
        if not isinstance(value, Mapping):
            value = getattr(value, "__dict__", None)
        if isinstance(value, Mapping):
            own = {str(name): setting for name, setting in value.items()}
            sections = (own[name] for name in _SECTIONS if isinstance(own.get(name), Mapping))
            return {str(name): v for section in sections for name, v in section.items()} | own
    return {}


def pickled_attribute(content: Any, name: str) -> dict[str, Any] | None:
    """Return an attribute of a module that was pickled whole, as a dict of its own attributes."""
    state = getattr(content, "state", None) if isinstance(content, Placeholder) else None
    value = state.get(name) if isinstance(state, Mapping) else None
    own = getattr(value, "state", None) if isinstance(value, Placeholder) else None
    return {str(key): v for key, v in own.items()} if isinstance(own, Mapping) else None


def _entries(
    content: Any, path: tuple[str, ...], depth: int, visits: Iterator[int]
) -> Iterator[Entry]:
    """Yield the models in a content and in the entries below it."""
    if isinstance(content, Placeholder):
        content = _module_state(content)
    if not isinstance(content, Mapping) or depth > _MAX_DEPTH:
        return
    if next(visits) >= _MAX_ENTRIES:
        raise ValueError(f"expected at most {_MAX_ENTRIES} entries that hold others")
    by_prefix: dict[str, None] = {}
    renamed: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str):
            continue
        if not isinstance(value, Tensor):
            yield from _entries(value, (*path, key), depth + 1, visits)
            continue
        parts = [part for part in key.split(".") if part not in _WRAPPERS]
        name = ".".join(parts)
        if name in renamed:
            raise ValueError(f"two tensors have the name {name}")
        renamed[name] = value
        marks = [i for i, part in enumerate(parts[:-1]) if part in _MARKERS]
        if marks:
            by_prefix[".".join(parts[: marks[0]])] = None
    for prefix in by_prefix:
        start = prefix + "." if prefix else ""
        own = {n.removeprefix(start): t for n, t in renamed.items() if n.startswith(start)}
        yield Entry((*path, prefix) if prefix else path, own)


def _module_state(module: Placeholder) -> dict[str, Tensor]:
    """Return the state dict of a module that was pickled whole, or an empty dict."""
    state = getattr(module, "state", None)
    if not isinstance(state, Mapping):
        return {}
    tensors: dict[str, Tensor] = {}
    for kind in ("_parameters", "_buffers"):
        own = state.get(kind)
        if isinstance(own, Mapping):
            tensors |= {str(n): t for n, t in own.items() if isinstance(t, Tensor)}
    children = state.get("_modules")
    if isinstance(children, Mapping):
        for child, inner in children.items():
            if isinstance(inner, Placeholder):
                below = _module_state(inner)
                tensors |= {f"{child}.{name}": tensor for name, tensor in below.items()}
    return tensors


def _listed(labels: list[str]) -> str:
    """Return different labels of entries as text, the first few of them."""
    return first_few([label or "(the file itself)" for label in dict.fromkeys(labels)], _SHOWN)


def _describe(content: Any) -> str:
    """Say what a file holds in which no DiT was found."""
    if isinstance(content, Placeholder):
        content = _module_state(content)
    if not isinstance(content, Mapping):
        return f"expected tensors by name, got {type(content).__name__}"
    # A name that is no string may be anything, such as a tuple that is too deep to be shown.
    names = [n[:80] if isinstance(n, str) else type(n).__name__ for n in content]
    return f"the keys ({first_few(names, _SHOWN)}) are not of a known layout"
