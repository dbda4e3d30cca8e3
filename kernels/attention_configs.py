"""How the attention kernels are launched: head dims as pieces, tiles by architecture.

A launch is a pure function of shape, dtype and architecture, so that results have the same bits
in every process and nothing is timed inside a CUDA graph's capture; `benchmarks/report.py` times
every configuration listed here.
"""

from __future__ import annotations

import torch
import triton

ONE_PASS = 256  # tokens up to which a head's keys and values are held whole


def head_pieces(d: int) -> tuple[int, int]:
    """Powers of two, at least 16, that cover a head dim; the second is 0 where one is as good."""
    first = max(16, 1 << d.bit_length() - 1)
    if first >= d:
        return first, 0
    second = max(16, triton.next_power_of_2(d - first))
    return (2 * first, 0) if second == first else (first, second)


# (rows a program owns, rows it steps over, warps, stages), the default first. NVIDIA warps own 16
# rows and AMD's 32: fewer rows a warp repeat matrix work. All compile without spills at head dims
# to 128, lengths that divide nothing included, which the ahead-of-time gate holds; none of the
# defaults has been measured on a GPU yet.
_Sizes = list[tuple[int, int, int, int]]
_FWD: dict[str, _Sizes] = {
    "sm_80": [(128, 64, 8, 3), (64, 64, 4, 3), (128, 32, 8, 3), (64, 32, 4, 3)],
    "sm_90": [(128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 2)],
    "sm_100": [(128, 128, 8, 2), (128, 128, 8, 3)],
    "gfx942": [(128, 64, 4, 1), (128, 64, 4, 2), (128, 32, 4, 1), (64, 64, 2, 1)],
}
_DQ: dict[str, _Sizes] = {
    "sm_80": [(64, 64, 4, 2), (64, 32, 4, 2), (128, 32, 8, 2)],
    "sm_90": [(64, 64, 4, 2), (128, 64, 8, 1), (64, 32, 4, 2), (128, 32, 8, 2)],
    "sm_100": [(128, 64, 8, 2), (64, 64, 4, 2)],
    "gfx942": [(64, 32, 2, 1), (128, 32, 4, 1), (64, 64, 2, 1)],
}
_DKV: dict[str, _Sizes] = {
    "sm_80": [(64, 32, 4, 2), (128, 32, 8, 2)],
    "sm_80 d96": [(64, 16, 4, 2), (128, 16, 8, 2)],
    "sm_90": [(64, 32, 4, 2), (128, 32, 8, 2)],
    "sm_100": [(128, 64, 8, 2), (128, 32, 8, 2)],
    "gfx942": [(64, 32, 2, 1), (128, 32, 4, 1)],
}
# float32 runs on the plain cores, or where the caller allows it in TF32; every architecture alike.
_FLOAT32: dict[str, _Sizes] = {
    "fwd": [(16, 32, 4, 1), (16, 16, 8, 1)],
    "dq": [(16, 16, 8, 1)],
    "dkv": [(16, 16, 4, 1)],
}


def attention_fwd_configs(N: int, dtype: torch.dtype, arch: str) -> list[triton.Config]:
    """Launch configurations, the default first; one that holds all N keys takes one pass."""
    rows = _padded(N)
    if dtype == torch.float32:
        return _configs(_FLOAT32["fwd"], rows, ("BM", "BN"))
    family = family_of(arch)
    sizes = _FWD[family]
    own = 32 if family == "gfx942" else 16
    if rows <= 128:
        sizes = [(min(64, rows), rows, max(1, min(64, rows) // own), 1), *sizes]
    elif rows <= ONE_PASS and family != "sm_80":  # there its scores spill
        sizes = [*sizes, (128, rows, 128 // own, 1)]
    return _configs(sizes, rows, ("BM", "BN"))


def attention_dq_bwd_configs(N: int, dtype: torch.dtype, arch: str) -> list[triton.Config]:
    """Launch configurations, the default first."""
    sizes = _FLOAT32["dq"] if dtype == torch.float32 else _DQ[family_of(arch)]
    return _configs(sizes, _padded(N), ("BM", "BN"))


def attention_dkv_bwd_configs(N: int, d: int, dtype: torch.dtype, arch: str) -> list[triton.Config]:
    """Launch configurations, the default first."""
    family = family_of(arch)
    sizes = _DKV.get(f"{family} d{sum(head_pieces(d))}", _DKV[family])
    if family == "sm_100" and _padded(N) <= 64:
        sizes = sizes[1:]  # 64 x 64 spills
    sizes = _FLOAT32["dkv"] if dtype == torch.float32 else sizes
    return _configs(sizes, _padded(N), ("BN", "BM"))


def _padded(N: int) -> int:
    return max(16, triton.next_power_of_2(N))


def family_of(arch: str) -> str:
    """The tested architecture whose matrix instructions another one has."""
    if arch.startswith("gfx"):
        return "gfx942"
    if arch in ("sm_90", "interpreter"):
        return "sm_90"
    return "sm_100" if arch in ("sm_100", "sm_103") else "sm_80"


def _configs(sizes: _Sizes, rows: int, names: tuple[str, str]) -> list[triton.Config]:
    """Sizes cut to a head of `rows` padded rows, the warps with them."""
    cut = dict.fromkeys(
        (
            min(own, rows),
            min(step, rows),
            max(1, warps * min(own, rows) // own),
            stages,
        )
        for own, step, warps, stages in sizes
    )
    return [
        triton.Config({names[0]: own, names[1]: step}, num_warps=warps, num_stages=stages)
        for own, step, warps, stages in cut
    ]
