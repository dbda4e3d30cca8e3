"""The kernels as PyTorch ops, and the choice of how each op runs.

`definitions` gives every op its schema, shapes and gradients; `registration` says how an op is
registered and called; `dispatch` decides which backend runs it; `checks` looks at arguments.
`fastdit.functional` is the public door to all of it.
"""

from fastdit.ops.definitions import (
    attention,
    gated_residual_layer_norm_modulate,
    layer_norm_modulate,
    linear,
    normal,
    sampler_update,
    sampler_update_out,
    trajectory,
)

__all__ = [
    "attention",
    "gated_residual_layer_norm_modulate",
    "layer_norm_modulate",
    "linear",
    "normal",
    "sampler_update",
    "sampler_update_out",
    "trajectory",
]
