"""Launch configurations of the attention kernels: the pieces of a head dim, tiles by architecture.

A launch is a pure function of shape, dtype and architecture, so that results have the same bits
in every process and nothing is timed while a CUDA graph is captured. `benchmarks/report.py` times
every configuration listed here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

ONE_PASS = 256  # the most tokens of which one program holds all keys and values


def head_pieces(d: int) -> tuple[int, int]:
    """Return powers of two >= 16 that cover a head dim; the second is 0 if one piece is as good."""
    first = max(16, 1 << d.bit_length() - 1)
    if first >= d:
        return first, 0
    second = max(16, triton.next_power_of_2(d - first))
    return (2 * first, 0) if second == first else (first, second)


class Tile(NamedTuple):
    """The size of a program's work, and the options it is compiled with."""

    own: int  # rows that the program computes
    step: int  # rows of the other side at a time
    warps: int
    stages: int
    registers: int | None = None  # the most per thread, where the compiler would take more


# The default comes first. An NVIDIA warp owns 16 rows and an AMD wave 32, since with fewer rows
# warps repeat matrix work. Every tile compiles without spills at head dims up to 128 and at lengths
# that no tile divides; the ahead-of-time gate checks that.
#
# No tile has been timed on a GPU yet. Until then the default follows from machine code at head dim
# 72: it is the tile that keeps the most warps on a multiprocessor (`aot.Machine.resident_warps`),
# because a program's softmax can only be hidden behind other programs' products. Tiles that starve
# the matrix instructions are left out. On sm_90 an instruction of 64 x 32 x 16 reads 3 KB of shared
# memory at 128 bytes a cycle but computes for 16 cycles only, so that a step has 64 rows where
# registers allow; on sm_100 an instruction of 64 rows takes as long as one of 128. Among equals the
# default has the smaller programs: two rows of XL/2 are 32 heads, for which tiles of 64 make 128
# programs for the 132 multiprocessors of an H100, and tiles of 128 leave half of them idle; from 32
# rows on both fill the multiprocessors, four and sixteen times. These are the resident warps of the
# default and, in brackets, of the alternative:
#
#           sm_80              sm_90              sm_100                gfx942
#   fwd     12 (128 x 64: 8)   16 (128 x 64: 8)   16 (128 x 128: 8)     8 (128 x 64: 4)
#   dq      12 (64 x 64: 8)    12 (128 x 64: 8)   8                     8
#   dk, dv  8                  12 (uncapped: 8)   8                     4
#
# (With Triton 3.7, sm_90's forward has 12, and gfx942's dk and dv have 8.) The tile does not depend
# on the batch: another tile may add in another order, and an image's bits must not depend on the
# images beside it.
_Sizes = list[Tile]
_FWD: dict[str, _Sizes] = {
    "sm_80": [Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(64, 32, 4, 3)],
    "sm_90": [
        Tile(64, 64, 4, 2),
        Tile(64, 64, 4, 3),
        Tile(128, 64, 8, 3),
        Tile(128, 64, 8, 2),
        Tile(128, 128, 8, 2),
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
# By padded head dim where it matters, since two accumulators take many registers.
_DKV: dict[str, _Sizes] = {
    "sm_80": [Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)],
    "sm_80 d96": [Tile(64, 16, 4, 2), Tile(128, 16, 8, 2)],
    "sm_90": [Tile(64, 32, 4, 2, 168), Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)],
    "sm_90 d96": [Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)],
    "sm_90 d128": [Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)],
    "sm_100": [Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)],
    "gfx942": [Tile(64, 32, 2, 1), Tile(128, 32, 4, 1)],
}
# A text's keys always have masks, and joint attention's two loops share their tiles. They are by
# padded head dim where it matters. A cap of 255 registers takes nothing away, but it keeps NVIDIA's
# assembler from aiming at a rounder number and spilling a few registers for it.
_TEXT_FWD: dict[str, _Sizes] = {
    "sm_80": [Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)],
    "sm_80 d128": [Tile(64, 32, 4, 2)],
    "sm_90": [Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)],
    "sm_90 d128": [Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)],
    # with 64 keys, masks and norms spill
    "sm_100": [Tile(128, 32, 8, 2, 255), Tile(64, 32, 4, 2, 255)],
    "gfx942": [Tile(64, 64, 2, 1), Tile(128, 64, 4, 1)],
}
_TEXT_DQ: dict[str, _Sizes] = {
    "sm_80": [Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)],
    "sm_90": [Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)],
    "sm_100": [Tile(128, 64, 8, 2)],
    "gfx942": [Tile(64, 32, 2, 1), Tile(128, 32, 4, 1)],
}
_TEXT_DKV: dict[str, _Sizes] = {
    "sm_80": [Tile(64, 32, 4, 2)],
    "sm_80 d96": [Tile(64, 16, 4, 2)],
    "sm_90": [Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)],
    "sm_100": [Tile(128, 32, 8, 2, 168)],
    "gfx942": [Tile(64, 32, 2, 1), Tile(128, 32, 4, 1)],
    "gfx942 d128": [Tile(64, 16, 2, 1)],
}
_TEXT_FLOAT32 = {
    "fwd": Tile(16, 16, 4, 1, 255),
    "fwd sm_100": Tile(16, 16, 8, 1, 255),
    "dq": Tile(16, 16, 8, 1, 255),
    "dkv": Tile(16, 16, 4, 1, 255),
}
# float32 runs on the plain cores, or in TF32 where the caller allows it.
_FLOAT32: dict[str, _Sizes] = {
    "fwd": [Tile(16, 32, 4, 1), Tile(16, 16, 8, 1)],
    "fwd sm_100": [Tile(16, 16, 8, 1)],
    "dq": [Tile(16, 16, 8, 1)],
    "dkv": [Tile(16, 16, 4, 1)],
}


def attention_fwd_configs(N: int, dtype: torch.dtype, arch: str) -> list[triton.Config]:
    """Return the configurations, the default first; one that holds all N keys takes one pass."""
    rows = _padded(N)
    family = family_of(arch)
    if dtype == torch.float32:
        sizes = _FLOAT32.get(f"fwd {family}", _FLOAT32["fwd"])
        return _configs(sizes, rows, ("BM", "BN"))
    sizes = _FWD[family]
    if family == "sm_100" and N % 128:
        sizes = sizes[1:]  # masked, 128 x 64 keeps no more warps, and it spills at head dim 64
    own = 32 if family == "gfx942" else 16
    if rows <= 128:
        sizes = [Tile(min(64, rows), rows, max(1, min(64, rows) // own), 1), *sizes]
    elif rows <= ONE_PASS and family != "sm_80":  # where the scores would spill
        sizes = [*sizes, Tile(128, rows, 128 // own, 1)]
    return _configs(sizes, rows, ("BM", "BN"))


def attention_dq_bwd_configs(N: int, dtype: torch.dtype, arch: str) -> list[triton.Config]:
    """Return the launch configurations, the default first."""
    sizes = _FLOAT32["dq"] if dtype == torch.float32 else _DQ[family_of(arch)]
    return _configs(sizes, _padded(N), ("BM", "BN"))


def attention_dkv_bwd_configs(N: int, d: int, dtype: torch.dtype, arch: str) -> list[triton.Config]:
    """Return the launch configurations, the default first."""
    family = family_of(arch)
    sizes = _DKV.get(f"{family} d{sum(head_pieces(d))}", _DKV[family])
    if family == "sm_100" and _padded(N) <= 64:
        sizes = sizes[1:]  # 64 x 64 spills
    if N % 64:  # masks need registers that the cap does not leave
        sizes = [tile._replace(registers=None) for tile in sizes]
    sizes = _FLOAT32["dkv"] if dtype == torch.float32 else sizes
    return _configs(sizes, _padded(N), ("BN", "BM"))


def text_attention_fwd_configs(
    N: int, d: int, dtype: torch.dtype, arch: str
) -> list[triton.Config]:
    """Return the configurations, the default first, for streams of at most N tokens."""
    sizes = _text_sizes("fwd", _TEXT_FWD, d, dtype, family_of(arch))
    return _configs(sizes, _padded(N), ("BM", "BN"))


def text_attention_dq_bwd_configs(
    N: int, d: int, dtype: torch.dtype, arch: str
) -> list[triton.Config]:
    """Return the launch configurations, the default first."""
    sizes = _text_sizes("dq", _TEXT_DQ, d, dtype, family_of(arch))
    return _configs(sizes, _padded(N), ("BM", "BN"))


def text_attention_dkv_bwd_configs(
    N: int, d: int, dtype: torch.dtype, arch: str
) -> list[triton.Config]:
    """Return the launch configurations, the default first."""
    sizes = _text_sizes("dkv", _TEXT_DKV, d, dtype, family_of(arch))
    return _configs(sizes, _padded(N), ("BN", "BM"))


def _text_sizes(
    launch: str, sizes: dict[str, _Sizes], d: int, dtype: torch.dtype, family: str
) -> _Sizes:
    if dtype == torch.float32:
        tile = _TEXT_FLOAT32.get(f"{launch} {family}", _TEXT_FLOAT32[launch])
        return [tile._replace(registers=None) if family == "gfx942" else tile]
    return sizes.get(f"{family} d{sum(head_pieces(d))}", sizes[family])


def _padded(N: int) -> int:
    return max(16, triton.next_power_of_2(N))


def family_of(arch: str) -> str:
    """Return the tested architecture that has the same matrix instructions."""
    if arch.startswith("gfx"):
        return "gfx942"
    if arch in ("sm_90", "interpreter"):
        return "sm_90"
    return "sm_100" if arch in ("sm_100", "sm_103") else "sm_80"


def _configs(sizes: _Sizes, rows: int, names: tuple[str, str]) -> list[triton.Config]:
    """Return the tiles cut to a head of `rows` padded rows, with proportionally fewer warps."""
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
