"""Launch configurations of the norms' kernels; `attention_configs.py` says how they are chosen."""

from __future__ import annotations

import triton

from fastdit.kernels.attention_configs import family_of
from fastdit.kernels.common import power_of_two_pieces

TOKENS = 32  # per program of the backward: its three partial sums are 1/32 of a pass over the rows


def norm_modulate_fwd_configs(D: int) -> list[triton.Config]:
    """Return the configurations for D channels, the default first; RMSNorm takes no other."""
    width = sum(power_of_two_pieces(D))
    warps = min(16, _power_of_two_below(width // 2048))
    # A warp owns whole rows, so that no sum crosses warps; 2048 channels are 64 registers a thread.
    rows = _power_of_two_below(min(16, 2048 // width))
    sizes = [(rows, warps), (max(1, rows // 2), warps), (4 * rows, 4 * warps)]
    # With two warps to a row ptxas rounds the registers down to 48 and spills (Triton 3.6).
    if rows * power_of_two_pieces(D)[0] >= 8 * 32 * 4 * warps:  # a thread loads 8 channels at once
        sizes.append((rows, 4 * warps))
    return _configs([(own, count) for own, count in sizes if count <= 16])


def norm_modulate_bwd_configs(D: int, rms_on: str | None = None) -> list[triton.Config]:
    """Return the launch configurations for D channels, the default first.

    Args:
        rms_on: the architecture that runs RMSNorm, which has the default alone; None for LayerNorm.
    """
    width = sum(power_of_two_pieces(D))
    warps = 4 if width <= 2048 else 8 if width <= 4096 else 16
    # A thread holds three sums and four inputs of its part of a tile; up to 18 channels fit.
    rows = _power_of_two_below(min(TOKENS, 18 * 32 * warps // width))
    half = rows // 2
    wide = half * power_of_two_pieces(D)[0] >= 8 * 32 * warps  # a thread loads 8 at once
    if rms_on is None:
        return _configs([(rows, warps), (half, warps)] if wide else [(rows, warps)])
    # Without a cap ptxas rounds the registers down on sm_100, and spills two of them or three.
    capped = family_of(rms_on) == "sm_100" and warps <= 8
    return _configs([(rows, warps)], 224 if capped else None)


def _power_of_two_below(n: int) -> int:
    return 1 << max(1, n).bit_length() - 1


def _configs(sizes: list[tuple[int, int]], registers: int | None = None) -> list[triton.Config]:
    return [
        triton.Config({"ROWS": rows}, num_warps=warps, num_stages=1, maxnreg=registers)
        for rows, warps in dict.fromkeys(sizes)
    ]
