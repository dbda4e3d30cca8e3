"""The shape of a DiT as the trajectory kernels take it, and the order of its weights."""

from __future__ import annotations

from typing import NamedTuple


def layer_weights(D: int) -> int:
    """Return the number of weights and biases of a layer of hidden size D."""
    return 12 * D * D + 9 * D


class Shape(NamedTuple):
    """Sizes and choices of a DiT, whose weights are these tensors, row-major. The kernel in Triton
    takes them one after another in one tensor, the one in C++ their addresses:

    embed [D, F], position [N, D];
    for each layer: qkv [3D, D], its bias, proj [D, D], its bias, fc1 [M, D], its bias,
    fc2 [D, M], its bias, where fc1 of a SwiGLU is [2M, D]; then, of those that the model has, the
    weights of the norms before attention and before the MLP, each [D], and the weights, then the
    biases, of the queries' norm and of the keys', each [D / heads];
    final [F_out, D], its bias; then, where there are such, the weight of the last norm [D], and
    the rotary table [2, N, D / heads / 2]
    """

    tokens: int  # N
    features: int  # F, of a token of the state
    out_features: int  # F_out, of a token of the model's output: F, or 2F with a learned range
    channels: int  # C: element e of the state belongs to channel e % C
    hidden: int  # D
    layers: int
    heads: int
    mlp_hidden: int  # M
    block_parts: int  # of a block's modulation: 6, or 4 without shifts
    rms: bool  # RMSNorms with weights instead of LayerNorms
    qk_norm: int  # of queries and keys; 0: none, 1: LayerNorm, 2: RMSNorm
    rope: bool  # queries and keys are rotated
    swiglu: bool  # instead of a GELU
    tanh_gelu: bool  # False: the exact GELU
    eps: float  # of the norms before attention and at the end
    mlp_eps: float  # of the norms before the MLPs
    qk_norm_eps: float

    @property
    def width(self) -> int:
        """The length of a row of modulation."""
        return (self.block_parts * self.layers + 2) * self.hidden

    @property
    def weights(self) -> int:
        """The number of packed weights of a model that the kernel in Triton takes."""
        D = self.hidden
        ends = (self.features + self.tokens) * D + self.out_features * (D + 1)
        return ends + self.layers * layer_weights(D)

    @property
    def learned(self) -> bool:
        """Whether the model predicts the variance's range beside the noise."""
        return self.out_features != self.features
