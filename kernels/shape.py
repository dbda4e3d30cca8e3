"""The shape of a DiT, as the kernels of a whole sampling loop are told it."""

from __future__ import annotations

from typing import NamedTuple


def layer_weights(D: int) -> int:
    """Return how many weights and biases a layer of hidden size D has."""
    return 12 * D * D + 9 * D


class Shape(NamedTuple):
    """Sizes and choices of a DiT. Its packed weights are one after another, row-major:

    embed [D, F], position [N, D],
    of each layer qkv [3D, D], its bias, proj [D, D], its bias, fc1 [4D, D], its bias,
    fc2 [D, 4D], its bias,
    final [F_out, D], its bias
    """

    tokens: int  # N
    features: int  # F of a token, in
    out_features: int  # F_out: F, or 2F with a learned range
    channels: int  # C: element e of the state is channel e % C
    hidden: int  # D
    layers: int
    heads: int
    tanh_gelu: bool  # else the exact one
    eps: float  # of all LayerNorms
    mlp_eps: float  # but those before the MLPs

    @property
    def width(self) -> int:
        """Of a row of modulation."""
        return (6 * self.layers + 2) * self.hidden

    @property
    def weights(self) -> int:
        """How many there are, packed."""
        D = self.hidden
        ends = (self.features + self.tokens) * D + self.out_features * (D + 1)
        return ends + self.layers * layer_weights(D)

    @property
    def learned(self) -> bool:
        return self.out_features != self.features
