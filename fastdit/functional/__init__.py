"""The ops of a DiT and of its sampling.

Norms and softmax are computed in at least float32. With mixed dtypes a residual keeps x's
dtype, and a modulated output takes scale's.

Those that kernels exist for take a `backend`, which runs the op or raises:

- "triton": fused kernels on CUDA or ROCm, or on the CPU if TRITON_INTERPRET=1 was set before the
  import. They take no float64, no heads wider than 128, and no NVIDIA GPU before Ampere.
- "cpp": C++ for float32 on a CPU; attention of all kinds, `qk_norm_rope` and `swiglu` have none,
  and `normal` has no "triton".
- "reference": plain PyTorch, which torch.compile can fuse.
- None: the first of these that can run and suits. "cpp" does not suit while torch.compile traces,
  for norms of fewer than 100,000 elements, and for updates that need a gradient.
"""

from fastdit.functional.attention import (
    attention,
    cross_attention,
    joint_attention,
    qk_attention,
    qk_norm_rope,
)
from fastdit.functional.mlp import linear, linear_gelu, swiglu
from fastdit.functional.norms import (
    gated_residual_layer_norm_modulate,
    gated_residual_rms_norm_modulate,
    layer_norm_modulate,
    rms_norm_modulate,
)
from fastdit.functional.patches import patchify, unpatchify
from fastdit.functional.positions import rope_table, sincos_pos_embed
from fastdit.functional.steps import normal, sampler_update, trajectory

__all__ = [
    "attention",
    "cross_attention",
    "gated_residual_layer_norm_modulate",
    "gated_residual_rms_norm_modulate",
    "joint_attention",
    "layer_norm_modulate",
    "linear",
    "linear_gelu",
    "normal",
    "patchify",
    "qk_attention",
    "qk_norm_rope",
    "rms_norm_modulate",
    "rope_table",
    "sampler_update",
    "sincos_pos_embed",
    "swiglu",
    "trajectory",
    "unpatchify",
]
