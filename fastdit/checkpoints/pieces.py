"""Renaming, joining and reordering of tensors by a table, which is read in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# The order of fastdit's (scale, shift, gate) in parts that are (shift, scale, gate).
TRIPLES = (1, 0, 2, 4, 3, 5, 7, 6, 8)


class Piece(NamedTuple):
    """One of fastdit's tensors, and those of another project that it is made of.

    Attributes:
        own: fastdit's name.
        theirs: the project's names, whose rows follow each other in fastdit's tensor.
        order: the project's number of each of fastdit's parts of a modulation's rows; () for all
            other tensors.
        stacked: whether theirs have a dimension of their own, the first.
    """

    own: str
    theirs: tuple[str, ...]
    order: tuple[int, ...] = ()
    stacked: bool = False


def gathered(pieces: Iterable[Piece], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return fastdit's tensors; those that a table does not know keep their names.

    A piece that lacks a tensor is left out, and is found missing where names are compared.

    Raises:
        ValueError: tensors that belong together differ in shape.
    """
    left, state = dict(tensors), {}
    for own, theirs, order, stacked in pieces:
        if not all(name in left for name in theirs):
            continue
        parts = [_ordered(left.pop(name), order) for name in theirs]
        shapes = {tuple(t.shape) for t in parts}
        if len(shapes) > 1 or (len(parts) > 1 and () in shapes):
            got = ", ".join(str(list(shape)) for shape in sorted(shapes))
            raise ValueError(f"expected {theirs[0]} and {theirs[-1]} of one shape, got {got}")
        state[own] = torch.stack(parts) if stacked else torch.cat(parts) if parts[1:] else parts[0]
    if twice := [name for name in left if name in state]:
        raise ValueError(f"two tensors have the name {twice[0]}")
    return state | left


def scattered(pieces: Iterable[Piece], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the project's tensors, each with memory of its own; the inverse of `gathered`."""
    out: dict[str, Tensor] = {}
    for own, theirs, order, stacked in pieces:
        t = state[own]
        parts = t.unbind() if stacked else t.chunk(len(theirs))
        back = tuple(order.index(i) for i in range(len(order)))
        for name, part in zip(theirs, parts, strict=True):
            out[name] = _ordered(part, back).clone()
    return out


def _ordered(rows: Tensor, order: tuple[int, ...]) -> Tensor:
    # A wrong shape is reported where shapes are compared.
    if not order or not rows.dim() or len(rows) % len(order):
        return rows
    pieces = rows.chunk(len(order))
    return torch.cat([pieces[i] for i in order])
