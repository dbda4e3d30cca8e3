"""The oracle: DiT and its sampling loop in plain PyTorch, in any float dtype up to float64.

Fast paths are tested against it. It is written to be read beside the paper (Peebles & Xie,
"Scalable Diffusion Models with Transformers", 2023), and not to be fast. `fastdit.DiT` shares no
module with its model; in float64 the ops of `fastdit.functional` are the functions of `ops`, and
tests/test_reference.py holds both to formulas written out there.

Shapes: B images, N tokens, D hidden, h heads, d head dim, p patch size, C channels.
"""

from fastdit.reference.model import DiT
from fastdit.reference.ops import (
    attention,
    cross_attention,
    gated_residual_layer_norm_modulate,
    gated_residual_rms_norm_modulate,
    joint_attention,
    layer_norm_modulate,
    qk_norm_rope,
    rms_norm_modulate,
    rope_table,
    swiglu,
)
from fastdit.reference.sampling import sample, sampler_update

__all__ = [
    "DiT",
    "attention",
    "cross_attention",
    "gated_residual_layer_norm_modulate",
    "gated_residual_rms_norm_modulate",
    "joint_attention",
    "layer_norm_modulate",
    "qk_norm_rope",
    "rms_norm_modulate",
    "rope_table",
    "sample",
    "sampler_update",
    "swiglu",
]
