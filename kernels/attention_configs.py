"""How the attention kernels are launched: head dims as pieces, tiles by architecture.

A launch is a pure function of shape, dtype and architecture, so that results have the same bits
in every process and nothing is timed inside a CUDA graph's capture; `benchmarks/report.py` times
every configuration listed here.
"""

from __future__ import annotations

from typing import NamedTuple

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


class Tile(NamedTuple):
    """What a program works on, and with."""

    own: int  # rows
    step: int  # rows of the other side at a time
    warps: int
    stages: int
    registers: int | None = None  # of a thread at most, where the compiler would take more


# The default comes first. NVIDIA warps own 16 rows and AMD's 32: fewer rows a warp repeat matrix
# work. All compile without spills at head dims to 128, lengths that divide nothing included, which
# the ahead-of-time gate holds.
#
# Which is the default follows from machine code at head dim 72, until measured figures decide,
# since none has been measured on a GPU yet. It is the one that keeps the most warps on a
# multiprocessor (`aot.Machine.resident_warps`), for a program's softmax has only other programs'
# products to hide behind, of those whose matrix instructions are not starved: on sm_90 one of
# 64 x 32 x 16 reads 3 KB of shared memory in the 16 cycles that it computes, at 128 bytes a cycle,
# so that a step has 64 rows where registers allow; on sm_100 one of 64 rows takes as long as one
# of 128. Of equals it is the one with smaller programs: at two rows of XL/2, which are 32 heads,
# tiles of 64 are 128 programs for the 132 multiprocessors of an H100, and tiles of 128 leave half
# of them idle; at 32 rows and more, both fill them whole four and sixteen times. Warps of the
# default, and in brackets of the alternative it was chosen from:
#
#           sm_80              sm_90              sm_100                gfx942
#   fwd     12 (128 x 64: 8)   16 (128 x 64: 8)   16 (128 x 128: 8)     8 (128 x 64: 4)
#   dq      12 (64 x 64: 8)    12 (128 x 64: 8)   8                     8
#   dk, dv  8                  12 (uncapped: 8)   8                     4
#
# (with Triton 3.7 sm_90's forward has 12, gfx942's dk and dv 8). A launch does not ask how many
# images there are: other tiles might order sums otherwise, and an image's bits must not depend on
# its batch.
_Sizes = list[Tile]
_FWD: dict[str, _Sizes] = {
    "sm_80": [Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(64, 32, 4, 3)],
    "sm_90": [
        *(Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)),
        *(Tile(128, 64, 8, 2), Tile(128, 128, 8, 2)),
    ],
    "sm_100": [Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(128, 128, 8, 3)],
    "gfx942": [Tile(64, 64, 2, 1), Tile(128, 64, 4, 1), Tile(128, 64, 4, 2), Tile(128, 32, 4, 1)],
}
_DQ: dict[str, _Sizes] = {
    "sm_80": [Tile(64, 32, 4, 2), Tile(64, 64, 4, 2), Tile(128, 32, 8, 2)],
    "sm_90": [Tile(64, 64, 4, 2), Tile(128, 64, 8, 1), Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)],
    "sm_100": [Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)],
    "gfx942": [Tile(64, 32, 2, 1), Tile(128, 32, 4, 1), Tile(64, 64, 2, 1)],
}
# By padded head dim where it matters: two accumulators take so many registers.
_DKV: dict[str, _Sizes] = {
    "sm_80": [Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)],
    "sm_80 d96": [Tile(64, 16, 4, 2), Tile(128, 16, 8, 2)],
    "sm_90": [Tile(64, 32, 4, 2, 168), Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)],
    "sm_90 d96": [Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)],
    "sm_90 d128": [Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)],
    "sm_100": [Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)],
    "gfx942": [Tile(64, 32, 2, 1), Tile(128, 32, 4, 1)],
}
# float32 runs on the plain cores, or where the caller allows it in TF32.
_FLOAT32: dict[str, _Sizes] = {
    "fwd": [Tile(16, 32, 4, 1), Tile(16, 16, 8, 1)],
    "fwd sm_100": [Tile(16, 16, 8, 1)],
    "dq": [Tile(16, 16, 8, 1)],
    "dkv": [Tile(16, 16, 4, 1)],
}


def attention_fwd_configs(N: int, dtype: torch.dtype, arch: str) -> list[triton.Config]:
    """Launch configurations, the default first; one that holds all N keys takes one pass."""
    rows = _padded(N)
    family = family_of(arch)
    if dtype == torch.float32:
        sizes = _FLOAT32.get(f"fwd {family}", _FLOAT32["fwd"])
        return _configs(sizes, rows, ("BM", "BN"))
    sizes = _FWD[family]
    if family == "sm_100" and N % 128:
        sizes = sizes[1:]  # with masks 128 x 64 keeps no more warps, and spills at head dim 64
    own = 32 if family == "gfx942" else 16
    if rows <= 128:
        sizes = [Tile(min(64, rows), rows, max(1, min(64, rows) // own), 1), *sizes]
    elif rows <= ONE_PASS and family != "sm_80":  # there its scores spill
        sizes = [*sizes, Tile(128, rows, 128 // own, 1)]
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
    if N % 64:  # masks need registers that the cap does not leave
        sizes = [tile._replace(registers=None) for tile in sizes]
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
        tile._replace(
            own=min(tile.own, rows),
            step=min(tile.step, rows),
            warps=max(1, tile.warps * min(tile.own, rows) // tile.own),
        )
        for tile in sizes
    )
    return [
        triton.Config(
            {names[0]: tile.own, names[1]: tile.step},
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers,
        )
        for tile in cut
    ]
