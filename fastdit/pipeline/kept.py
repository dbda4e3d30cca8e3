"""What was computed of a text, kept for the next steps of a loop."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit.text import Text


class _Entry(NamedTuple):
    sources: list[weakref.ref[Tensor]]
    state: tuple[Any, ...]
    text: Text


class KeptText:
    """The last encoded text, until one of the tensors that it was made of changes or is gone.

    Tensors are known again by their identity, for which they are referred to weakly: an identity
    is used again only once its tensor is gone, and the end of a pipeline's call, with which its
    embeddings go, frees what was made of them. Changes in place show in a tensor's version;
    tensors of `torch.inference_mode` have none, and nothing that was made of them is kept.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def get(self, sources: list[Tensor], weights: list[Tensor]) -> Text | None:
        """Return what was made of these tensors as they are now, or None."""
        entry = self._entry
        if entry is None or len(sources) != len(entry.sources):
            return None
        known = all(ref() is t for ref, t in zip(entry.sources, sources, strict=True))
        return entry.text if known and entry.state == _state(sources, weights) else None

    def put(self, sources: list[Tensor], weights: list[Tensor], text: Text) -> None:
        """Keep the text that was made of `sources` with `weights` instead of the last one."""
        own = weakref.ref(self)

        def forget(ref: weakref.ref[Tensor]) -> None:
            kept = own()
            if kept is not None and kept._entry and any(ref is r for r in kept._entry.sources):
                kept._entry = None

        refs = [weakref.ref(t, forget) for t in sources]
        self._entry = _Entry(refs, _state(sources, weights), text)

    def clear(self) -> None:
        self._entry = None

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptText, ()  # a copy, or what is pickled, keeps nothing


def can_be_kept(tensors: Iterable[Tensor]) -> bool:
    """Return whether what is made of these tensors may be kept, as `KeptText` keeps it."""
    return not (torch.is_grad_enabled() or any(t.is_inference() for t in tensors))


def _state(sources: list[Tensor], weights: list[Tensor]) -> tuple[Any, ...]:
    """Return what differs once a tensor was changed, moved or converted, or autocast was."""
    kind = sources[0].device.type
    # "meta" has no autocast.
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    versions = [t._version for t in sources]
    of_weights = [(id(w), w.data_ptr(), w.dtype, w._version) for w in weights]
    return autocast and torch.get_autocast_dtype(kind), versions, of_weights
