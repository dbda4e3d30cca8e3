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
    for each layer: qkv [3D, D], its bias, proj [D, D], its bias, fc1 [4D, D], its bias,
    fc2 [D, 4D], its bias;
    final [F_out, D], its bias
    """

    tokens: int  # N
    features: int  # F, of a token of the state
    out_features: int  # F_out, of a token of the model's output: F, or 2F with a learned range
    channels: int  # C: element e of the state belongs to channel e % C
    hidden: int  # D
    layers: int
    heads: int
    tanh_gelu: bool  # False: the exact GELU
    eps: float  # of the LayerNorms before attention and at the end
    mlp_eps: float  # of the LayerNorms before the MLPs

    @property
    def width(self) -> int:
        """The length of a row of modulation."""
        return (6 * self.layers + 2) * self.hidden

    @property
    def weights(self) -> int:
        """The number of packed weights."""
        D = self.hidden
        ends = (self.features + self.tokens) * D + self.out_features * (D + 1)
        return ends + self.layers * layer_weights(D)

    @property
    def learned(self) -> bool:
        """Whether the model predicts the variance's range beside the noise."""
        return self.out_features != self.features
