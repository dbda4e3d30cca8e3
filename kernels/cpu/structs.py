"""The structs of `structs.h` as ctypes classes, so that C++ alone declares their fields."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CTYPES = {"int64_t": ctypes.c_int64, "float": ctypes.c_float}
# The members of one line, as in "  const float *x, *y;  // a comment".
_MEMBERS = re.compile(r"  (?:const )?(int64_t|float) (\*?\w+(?:, \*?\w+)*);(?: +// .*)?")


class Struct(ctypes.Structure):
    """A struct of the library: tensors become pointers, `threads` is `torch.get_num_threads()`."""

    names: frozenset[str]  # of the fields

    def __init__(self, **fields: Any) -> None:
        fields["threads"] = torch.get_num_threads()
        if fields.keys() != self.names:
            differing = sorted(fields.keys() ^ self.names)
            raise TypeError(f"{type(self).__name__}: {differing} missing or not its fields")
        self._kept = fields  # so that tensors live as long as pointers to them
        for name, value in fields.items():
            setattr(self, name, value.data_ptr() if isinstance(value, Tensor) else value)


def parse(header: str) -> dict[str, type[Struct]]:
    """Return the structs of a header by name.

    Raises:
        ValueError: a line of a struct declares no members of type int64_t or float, or pointers.
    """
    declared: dict[str, list[tuple[str, Any]]] = {}
    fields = None
    for line in header.splitlines():
        if fields is None:
            if start := re.fullmatch(r"struct (\w+) \{", line):
                fields = declared[start[1]] = []
        elif line == "};":
            fields = None
        elif members := _MEMBERS.fullmatch(line):
            for name in members[2].split(", "):
                kind = ctypes.c_void_p if name.startswith("*") else _CTYPES[members[1]]
                fields.append((name.lstrip("*"), kind))
        else:
            raise ValueError(f"structs.h: expected members of a struct, got {line!r}")
    return {
        name: type(name, (Struct,), {"_fields_": own, "names": frozenset(dict(own))})
        for name, own in declared.items()
    }


STRUCTS = parse(Path(__file__).with_name("structs.h").read_text())
Problem, Update, Linear = (STRUCTS[name] for name in ("Problem", "Update", "Linear"))
AdaLN, AdaLNBackward = STRUCTS["AdaLN"], STRUCTS["AdaLNBackward"]
