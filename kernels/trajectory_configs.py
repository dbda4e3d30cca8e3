"""Launch configurations of the trajectory: a pure function of shape, dtype and architecture."""

from __future__ import annotations

import torch
import triton

from fastdit.kernels.attention_configs import family_of
from fastdit.kernels.shape import Shape

# By (tokens, hidden), the default first: (hidden features of an MLP at a time, warps, stages of the
# inner loops, stages of the loop over layers). With two stages of layers the next layer's weights
# are prefetched, which takes more shared memory than two programs find on a multiprocessor.
_Sizes = dict[tuple[int, int], list[tuple[int, int, int, int]]]
_SIZES: dict[str, _Sizes] = {
    "sm_80": {
        (16, 64): [(64, 4, 2, 1), (64, 4, 1, 1)],
        (64, 64): [(32, 4, 2, 1), (32, 4, 1, 1)],
        (16, 128): [(64, 8, 2, 1), (64, 8, 1, 1)],
        (64, 128): [(32, 8, 2, 1)],
    },
    "sm_90": {
        (16, 64): [(64, 4, 2, 2), (64, 4, 2, 1), (64, 4, 1, 1)],
        (64, 64): [(64, 4, 2, 1), (64, 4, 1, 1)],
        (16, 128): [(64, 8, 2, 1), (64, 8, 1, 1)],
        (64, 128): [(32, 8, 2, 1)],
    },
    "sm_100": {
        (16, 64): [(64, 4, 2, 1), (64, 8, 2, 2)],
        (64, 64): [(32, 8, 1, 1)],
        (16, 128): [(64, 8, 2, 1)],
        (64, 128): [(32, 4, 1, 1)],
    },
    "gfx942": {
        (16, 64): [(64, 4, 1, 1), (64, 4, 2, 1)],
        (64, 64): [(32, 4, 1, 1), (64, 4, 1, 1)],
        (16, 128): [(64, 4, 1, 1)],
        (64, 128): [(32, 4, 1, 1)],
    },
}


def trajectory_configs(shape: Shape, dtype: torch.dtype, arch: str) -> list[triton.Config]:
    """Return the launch configurations, the default first.

    Args:
        shape: one that `fastdit.kernels.trajectory.obstacle` does not refuse.
        dtype: of the weights.
        arch: as `fastdit.kernels.common.arch` names it.
    """
    family = family_of(arch)
    sizes = _SIZES[family][shape.tokens, shape.hidden]
    # One head's scores of 16 tokens are too small a product for four warps.
    heads = shape.heads if shape.tokens == 16 else 1
    if dtype == torch.float32:  # plain cores hold all operands of a product in registers
        sizes, heads = [(32, 8, 1, 1)], 1
    # Without a limit ptxas may spill to fit one more program on a multiprocessor.
    registers = None if family == "gfx942" else 255
    return [
        triton.Config(
            {"HEADS": heads, "CHUNK": chunk, "STAGES": layers},
            num_warps=warps,
            num_stages=stages,
            maxnreg=registers,
        )
        for chunk, warps, stages, layers in sizes
    ]
