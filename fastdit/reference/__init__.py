"""The oracle: the models and the sampling loop in plain PyTorch, in any float dtype up to float64.

Fast paths are tested against it. It is written to be read beside the papers (Peebles & Xie,
"Scalable Diffusion Models with Transformers", 2023; those of PixArt and Stable Diffusion 3), and
not to be fast. `fastdit.DiT`, `fastdit.PixArt` and `fastdit.MMDiT` share no module with its models;
in float64 the ops of `fastdit.functional` are the functions of `ops`, and tests/test_reference.py
holds both to formulas written out there. tests/text holds PixArt and MMDiT to diffusers' models.

Shapes: B images, N tokens, D hidden, h heads, d head dim, p patch size, C channels.
"""

from fastdit.reference.mmdit import MMDiT
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
from fastdit.reference.pixart import PixArt
from fastdit.reference.sampling import sample, sampler_update

__all__ = [
    "DiT",
    "MMDiT",
    "PixArt",
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
