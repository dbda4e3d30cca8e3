"""What the kernels of cross-attention and joint attention share: sizes, rows, prepared launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels.attention_common import Kind
from fastdit.kernels.attention_configs import head_pieces
from fastdit.kernels.common import dot_dtype
from fastdit.kernels.launch import PreparedLaunch

Norms = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Sizes(NamedTuple):
    """What launches depend on, besides the kind of tensors."""

    B: int
    N: int  # tokens of an image
    M: int  # tokens of a text, with its padding
    n_heads: int
    d: int
    joint: bool  # whether both streams have queries and keys, or the image queries, the text keys
    ragged: bool  # whether texts have lengths
    normed: bool = False

    @classmethod
    def of(
        cls,
        image: Tensor,
        text: Tensor,
        n_heads: int,
        lengths: Tensor | None,
        normed: bool = False,
    ) -> Sizes:
        (B, N, width), (_, M, text_width) = image.shape, text.shape
        joint = width == text_width
        d = width // (3 if joint else 1) // n_heads
        return cls(B, N, M, n_heads, d, joint, lengths is not None, normed)

    @property
    def queries(self) -> int:
        """The number of queries of an image with its text."""
        return self.N + self.M if self.joint else self.N


@triton.jit
def length_of(p_lengths, i_b, M, RAGGED: tl.constexpr):
    """Load how many of its M tokens a text has; a greater length reads nothing past them."""
    if RAGGED:
        return tl.minimum(tl.load(p_lengths + i_b), M).to(tl.int32)
    return M


def prepare(
    kernel: Any, own: str, sizes: Sizes, kind: Kind, config: triton.Config, **constants: bool
) -> PreparedLaunch:
    """Prepare a kernel whose programs own "BM" queries or "BN" keys of a head."""
    (dtype, _, precision), tile = kind, config.kwargs[own]
    tiles = triton.cdiv(sizes.M, tile) if sizes.joint or own == "BN" else 0
    if sizes.joint or own == "BM":
        tiles += triton.cdiv(sizes.N, tile)
    D0, D1 = head_pieces(sizes.d)
    step = config.kwargs["BN" if own == "BM" else "BM"]
    constants |= dict(EVEN=sizes.N % step == 0, JOINT=sizes.joint, RAGGED=sizes.ragged)
    return PreparedLaunch(
        kernel,
        (sizes.B * sizes.n_heads * tiles,),
        **dict(D=sizes.d, D0=D0, D1=D1, DOT=dot_dtype(dtype), PRECISION=precision),
        **constants,
        **config.all_kwargs(),
    )


def without_padding(text: Tensor, lengths: Tensor | None) -> Tensor:
    """Return text [B, M, C] with zeros past its lengths, for kernels that take no lengths."""
    if lengths is None:
        return text
    own = torch.arange(text.shape[1], device=text.device) < lengths[:, None]
    return torch.where(own[:, :, None], text, 0.0)


def empty_lse(image: Tensor, sizes: Sizes) -> Tensor:
    return image.new_empty((sizes.B, sizes.n_heads, sizes.queries), dtype=torch.float32)
