"""The structs that the C++ library takes, declared once for ctypes and for the C++ compiler.

`header` returns the declarations in C++. `build.py` writes them as `structs.h` into the folder in
which it builds, and `problem.h` includes that file and adds methods.
"""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdit.kernels.columns import COLUMNS

_CTYPES = {"int64_t": ctypes.c_int64, "float": ctypes.c_float}


class Struct(ctypes.Structure):
    """A struct of the library; tensors become pointers, and `threads` is PyTorch's number of them.

    Attributes:
        declarations: (C++ type, names of fields, comment) for each line of the C++ struct.
    """

    declarations: ClassVar[list[tuple[str, list[str], str]]]

    def __init__(self, **fields: Any) -> None:
        fields |= dict(threads=torch.get_num_threads())
        if differing := fields.keys() ^ {name for name, _ in self._fields_}:
            raise TypeError(f"{type(self).__name__}: {sorted(differing)} missing or not its fields")
        self._kept = fields  # so that tensors live as long as pointers to them
        super().__init__(
            **{k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in fields.items()}
        )


def _struct(name: str, comment: str, *lines: tuple[str, str, str]) -> type[Struct]:
    declarations = [(kind, names.split(), remark) for kind, names, remark in lines]
    fields = [
        (field, _CTYPES.get(kind, ctypes.c_void_p))
        for kind, names, _ in declarations
        for field in names
    ]
    members = {"__doc__": comment, "_fields_": fields, "declarations": declarations}
    return type(name, (Struct,), members)


Problem = _struct(
    "Problem",
    "Some steps of the sampling loop of a batch of images under one model.",
    (
        "int64_t",
        "tokens features out_features channels hidden layers heads",
        "kernels/shape.py",
    ),
    ("int64_t", "tanh_gelu", "1: GELU by tanh; 0: the exact one"),
    ("int64_t", "images steps", ""),
    ("int64_t", "first", "the number of steps that were taken before these"),
    ("int64_t", "step_rows", "rows of by_step at one step: 1, or one for each label"),
    ("int64_t", "guided", "guidance acts on channels below this one; 0: there is no guidance"),
    ("int64_t", "threads", ""),
    ("float", "eps mlp_eps", "of the LayerNorms before attention and at the end; before the MLPs"),
    ("float", "scale", "of guidance"),
    ("const float*", "weights", "packed as kernels/shape.py says"),
    ("const float*", "by_step", "[steps][step_rows][width]"),
    ("const float*", "by_label", "[labels][width], or null"),
    (
        "const int64_t*",
        "rows",
        "[images]; guided: [2 * images], the null label's last",
    ),
    ("const float*", "coefficients", "[steps][column::count]"),
    ("const int64_t*", "seeds", "[images][2] (key, stream), or null"),
    ("const float*", "noise", "[steps][images][tokens * features], or null"),
    ("float*", "x x0", "[images][tokens * features], in and out"),
)

Update = _struct(
    "Update",
    "One step's update of states in any layout.",
    ("int64_t", "images elements channels", "elements: of an image"),
    ("int64_t", "space", "elements from one channel to the next: 1 for tokens, H * W for images"),
    ("int64_t", "learned", "1: each group of channels * space of eps is followed by one of range"),
    ("int64_t", "guided", "guidance acts on channels below this one; 0: there is no guidance"),
    ("int64_t", "step threads", ""),
    ("float", "scale", "of guidance"),
    ("const float*", "x", "[images][elements]"),
    (
        "const float*",
        "model_out",
        "[images][elements]; guided: 2 * images; learned: 2 * elements",
    ),
    ("const float*", "coefficients", "[column::count], of this step"),
    ("const float*", "x0_prev noise", "[images][elements], or null"),
    ("const int64_t*", "seeds", "[images][2] (key, stream), or null"),
    ("float*", "x_next x0", "[images][elements], out"),
)

Linear = _struct(
    "Linear",
    "y = x weight^T + bias.",
    ("int64_t", "rows in_features out_features threads", ""),
    ("const float*", "x", "[rows][in_features]"),
    ("const float*", "weight", "[out_features][in_features]"),
    ("const float*", "bias", "[out_features], or null"),
    ("float*", "y", "[rows][out_features], out"),
)

AdaLN = _struct(
    "AdaLN",
    "r = x + gate * y and h = LN(r) * (1 + scale) + shift. Without a gate r is x, and not written.",
    ("int64_t", "images tokens hidden", ""),
    ("int64_t", "gate_stride scale_stride shift_stride", "from one image's row to the next"),
    ("int64_t", "threads", ""),
    ("float", "eps", ""),
    ("const float*", "x y", "[images][tokens][hidden]; y: or null"),
    ("const float*", "gate scale shift", "[images][hidden]; gate: or null"),
    ("float*", "r h", "[images][tokens][hidden], out"),
    ("float*", "mean rstd", "[images][tokens], out"),
)

AdaLNBackward = _struct(
    "AdaLNBackward",
    "The gradients of AdaLN; the modulation's are sums over each chunk of an image's tokens.",
    ("int64_t", "images tokens hidden", ""),
    ("int64_t", "gate_stride scale_stride", "from one image's row to the next"),
    ("int64_t", "chunk_tokens threads", ""),
    ("const float*", "dr dh r y", "[images][tokens][hidden]; dr, y: or null"),
    ("const float*", "gate scale", "[images][hidden]; gate: or null"),
    ("const float*", "mean rstd", "[images][tokens]"),
    ("float*", "dx dy", "[images][tokens][hidden], out; dy: or null"),
    ("float*", "partial", "[images][chunks][dscale, dshift, dgate][hidden], out"),
)

STRUCTS = (Problem, Update, Linear, AdaLN, AdaLNBackward)


def header() -> str:
    """Return the C++ declarations of the columns of coefficients, the structs, and their sizes."""
    parts = [
        "// Generated from kernels/cpu/structs.py and kernels/columns.py: change those.",
        "#pragma once\n#include <cstdint>\n\nnamespace fastdit {\n",
        f"namespace column {{\nenum : int {{ {', '.join(COLUMNS)}, count }};\n}}\n",
        "namespace generated {\n",
    ]
    for struct in STRUCTS:
        parts += [f"// {struct.__doc__}", f"struct {struct.__name__} {{"]
        for kind, names, comment in struct.declarations:
            separator = ", *" if kind.endswith("*") else ", "
            line = f"  {kind} {separator.join(names)};"
            parts.append(f"{line}  // {comment}" if comment else line)
        parts.append("};\n")
    sizes = "".join(f'    {{"{s.__name__}", sizeof({s.__name__})}},\n' for s in STRUCTS)
    parts += [
        "struct Size {\n  const char* name;\n  int64_t bytes;\n};",
        f"inline constexpr Size sizes[] = {{\n{sizes}}};\n",
        "}  // namespace generated\n}  // namespace fastdit\n",
    ]
    return "\n".join(parts)
