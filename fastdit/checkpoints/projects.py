"""The projects whose networks and names extend those of facebookresearch/DiT.

SiT has the same tensors. REPA adds projectors that only its training uses, LightningDiT adds
options of the block and stores the table of its rotary positions, and JiT embeds patches through a
bottleneck and adds context tokens. Which of them a file is of shows in names that the others lack.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastdit.config import DiTConfig
from fastdit.functional import rope_table

DIT, SIT = "facebookresearch/DiT", "willisma/SiT"
REPA, LIGHTNING, JIT = "sihyun-yu/REPA", "hustvl/LightningDiT", "LTH14/JiT"
PROJECTS = (DIT, SIT, LIGHTNING, REPA, JIT)

ROPE = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")  # LightningDiT's table, each [N, head dim]

# Beginnings of names, of which a project's files have one and no others do.
_MARKS = {
    JIT: ("x_embedder.proj1.", "in_context_posemb"),
    LIGHTNING: ("feat_rope.", "blocks.0.norm1.", "blocks.0.mlp.w12."),
    REPA: ("projectors.", "decoder_blocks."),
}
# The options of a project's model, with what they may be; the others are as the published DiT's.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "norm": ("layer",),
    "modulation_shift": (True,),
    "qk_norm": ("none",),
    "rope": (False,),
    "mlp": ("gelu",),
}
_FREE: dict[str, dict[str, tuple[Any, ...]]] = {
    DIT: {},
    SIT: {},
    REPA: {"qk_norm": ("none", "layer"), "learn_sigma": (False,)},
    LIGHTNING: {
        "norm": ("layer", "rms"),
        "modulation_shift": (True, False),
        "qk_norm": ("none", "layer", "rms"),
        "rope": (False, True),
        "mlp": ("gelu", "swiglu"),
    },
    JIT: {
        "norm": ("rms",),
        "qk_norm": ("rms",),
        "rope": (True,),
        "mlp": ("swiglu",),
        "learn_sigma": (False,),
        "null_class": (True,),
    },
}
_TABLE_ERROR = {torch.float32: 1e-5, torch.float64: 1e-5}  # cosines of float32 angles up to 64
_LOW_TABLE_ERROR = 0.01  # bfloat16 rounds a value near 1 by up to 0.004


def projects_of(names: Iterable[str]) -> list[str]:
    """Return the projects whose marks are among the names of tensors, in the order of `_MARKS`.

    JiT's blocks have LightningDiT's names, so that its own marks count alone.
    """
    names = list(names)
    found = [
        project for project, marks in _MARKS.items() if any(n.startswith(marks) for n in names)
    ]
    return found[:1] if JIT in found else found


def without_legacy_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in which REPA's `decoder_blocks`, its older name for its last blocks, follow.

    Source: `load_legacy_checkpoints` of REPA's `utils.py`.
    """
    first = len({m[0] for m in (re.match(r"blocks\.\d+\.", name) for name in tensors) if m})

    def renamed(match: re.Match[str]) -> str:
        return f"blocks.{first + int(match[1])}."

    return {re.sub(r"^decoder_blocks\.(\d+)\.", renamed, n): t for n, t in tensors.items()}


def take_rope(state: dict[str, Tensor], cfg: DiTConfig) -> None:
    """Remove the stored tables of rotary positions, once they are those that fastdit computes.

    Raises:
        ValueError: a table is missing, or has other positions.
    """
    stored = {name: state.pop(name) for name in ROPE if name in state}
    if not stored:
        return
    for name, own in rope_tensors(cfg).items():
        if name not in stored:
            raise ValueError(f"{name}: expected it beside {next(iter(stored))}")
        t = stored[name]
        if t.shape != own.shape:
            raise ValueError(f"{name}: expected shape {list(own.shape)}, got {list(t.shape)}")
        if t.is_meta or t.layout != torch.strided:
            raise ValueError(f"{name}: expected plain values, got {t.layout} on {t.device}")
        error = (t.detach().to("cpu", torch.float64) - own).abs().max().item()
        if not error <= _TABLE_ERROR.get(t.dtype, _LOW_TABLE_ERROR):
            rows, columns = cfg.grid
            expected = f"the rotary positions of {rows} x {columns} patches"
            raise ValueError(f"{name}: expected {expected}, got others, off by up to {error:.2g}")


def rope_tensors(cfg: DiTConfig) -> dict[str, Tensor]:
    """Return LightningDiT's tables for a config: each angle twice, for both parts of a pair."""
    tables = rope_table(cfg.head_dim, cfg.grid).repeat_interleave(2, dim=-1)
    return dict(zip(ROPE, tables, strict=True))


def check_expressible(project: str, cfg: DiTConfig) -> None:
    """Raise a ValueError that names an option which a project's model does not have as it is."""
    for name, known in (_PLAIN | _FREE[project]).items():
        if (value := getattr(cfg, name)) not in known:
            expected = " or ".join(repr(choice) for choice in known)
            raise ValueError(f"layout: {project} has {name} {expected}, got {value!r}")
    if project == LIGHTNING and cfg.qk_norm not in ("none", cfg.norm):
        got = f"{cfg.qk_norm!r} with norm {cfg.norm!r}"
        raise ValueError(f"layout: {project} has qk_norm of the kind of its norms, got {got}")
    if (cfg.patch_bottleneck is not None) != (project == JIT):
        expected = "a patch_bottleneck" if project == JIT else "no patch_bottleneck"
        raise ValueError(f"layout: {project} has {expected}, got {cfg.patch_bottleneck}")
    if cfg.context_tokens is not None and project != JIT:
        raise ValueError(f"layout: {project} has no context_tokens, got {cfg.context_tokens}")


def wrapped(project: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return a file's content as a project's own code reads it."""
    if project == REPA:
        return {"ema": tensors}
    if project == JIT:
        named = {f"net.{name}": t for name, t in tensors.items()}
        return {"model": named, "model_ema1": named, "model_ema2": named}
    return tensors
