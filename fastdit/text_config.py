"""The shapes and choices of text-to-image transformers: PixArt and MMDiT (Stable Diffusion 3)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from fastdit.errors import check_fields, from_options, height_and_width

MLP_RATIO = 4


@dataclass(frozen=True)
class _TextConfig:
    """What both families share: the image's side of the model."""

    img_size: int | tuple[int, int]
    patch_size: int
    in_channels: int
    hidden: int
    n_layers: int
    n_heads: int

    def __post_init__(self) -> None:
        check_fields(self, *self._checked)
        height, width = height_and_width("img_size", self.img_size, self.patch_size)
        # One form for each size, so that equal configs compare equal and can be hashed.
        object.__setattr__(self, "img_size", height if height == width else (height, width))
        if self.hidden % self.n_heads:
            expected = f"a divisor of hidden={self.hidden}"
            raise ValueError(f"n_heads: expected {expected}, got {self.n_heads}")
        if self.hidden % 4:
            expected = "a multiple of 4, which sine-cosine positions need"
            raise ValueError(f"hidden: expected {expected}, got {self.hidden}")

    @property
    def _checked(self) -> list[str]:
        return list(self.to_dict())

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Any:
        """Return a config with some fields set; an unknown field is a ValueError."""
        return from_options(cls, options)

    @classmethod
    def from_saved(cls, options: dict[str, Any]) -> Any:
        """Return the config that a file holds; a missing field is a ValueError too."""
        return from_options(cls, options, complete=True)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def head_dim(self) -> int:
        return self.hidden // self.n_heads

    @property
    def mlp_hidden(self) -> int:
        """Width of the MLPs between their linears."""
        return MLP_RATIO * self.hidden

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of one image at the size that the model was trained at."""
        size = self.img_size
        height, width = size if isinstance(size, tuple) else (size, size)
        return self.in_channels, height, width

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Return the (rows, columns) of patches of an image.

        Raises:
            ValueError: a side is not a positive multiple of the patch.
        """
        height, width = height_and_width("size", (height, width), self.patch_size)
        return height // self.patch_size, width // self.patch_size


@dataclass(frozen=True)
class PixArtConfig(_TextConfig):
    """The shape and choices of a PixArt-alpha or PixArt-Sigma; the defaults are XL/2 at 512.

    Attributes:
        img_size: height and width of the latents that the model was trained at: an integer for a
            square, else (height, width). It takes any size that is a multiple of the patch.
        patch_size: side p of a patch.
        in_channels: channels C of the latents.
        hidden: width D of the residual stream; must be a multiple of n_heads and of 4.
        n_layers: number of transformer blocks.
        n_heads: number of attention heads.
        text_width: width of the text encoder's embeddings.
        text_tokens: the most tokens of a prompt: 120 for alpha, 300 for Sigma.
        text_projection: whether an MLP brings the embeddings to the width of the stream; without it
            the blocks' linears for keys and values take them as they are.
        size_conditions: whether the size of the image in pixels and its aspect ratio are embedded
            beside the timestep, as in alpha at 1024.
        position_scale: what positions are divided by: 1 at 512 pixels, 2 at 1024, 4 at 2048; at 256
            it is 1 in alpha and 0.5 in Sigma.
        qkv_bias: whether the linears for queries, keys and values have biases.
        gelu: "tanh" (approximation) or "erf" (exact) in the blocks' MLPs.
        ln_eps: epsilon of the blocks' norms; that of the final norm is 1e-6.
        learn_sigma: whether the model returns 2C channels, the last C for the variance. It was
            trained so, and the solver "ddpm" uses them; other solvers take the first C.

    Raises:
        ValueError: a value is out of range or contradicts another; the message names both.

    Source: Chen et al. 2023 (PixArt-alpha), section 2.3; Chen et al. 2024 (PixArt-Sigma).
    """

    img_size: int | tuple[int, int] = 64
    patch_size: int = 2
    in_channels: int = 4
    hidden: int = 1152
    n_layers: int = 28
    n_heads: int = 16
    text_width: int = 4096
    text_tokens: int = 120
    text_projection: bool = True
    size_conditions: bool = False
    position_scale: float = 1.0
    qkv_bias: bool = True
    gelu: Literal["tanh", "erf"] = "tanh"
    ln_eps: float = 1e-6
    learn_sigma: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size_conditions and self.hidden % 3:
            expected = "a multiple of 3, which the three conditions on the size share"
            raise ValueError(f"hidden: expected {expected}, got {self.hidden}")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def modulation_width(self) -> int:
        """Columns of `PixArt.modulation_of`: six parts for all blocks, and the conditioning."""
        return 7 * self.hidden


@dataclass(frozen=True)
class MMDiTConfig(_TextConfig):
    """The shape and choices of an MMDiT; the defaults are those of Stable Diffusion 3 medium.

    Attributes:
        img_size: height and width of the latents that the model was trained at: an integer for a
            square, else (height, width). It takes any multiple of the patch that fits into its
            positions.
        patch_size: side p of a patch.
        in_channels: channels C of the latents.
        hidden: width D of both streams; must be a multiple of n_heads and of 4.
        n_layers: number of transformer blocks.
        n_heads: number of attention heads.
        text_width: width of the text embeddings.
        pooled_width: width of the pooled text embedding.
        text_tokens: the most tokens of a prompt; diffusers' pipeline makes 77 of CLIP and up to 512
            of T5.
        position_size: rows, and columns, of the table of positions, of which an image takes the
            middle.
        qk_norm: norm of each head's queries and keys: "none", or "rms" (Stable Diffusion 3.5).
        dual_blocks: numbers of the blocks in which the image attends to itself a second time.

    Raises:
        ValueError: a value is out of range or contradicts another; the message names both.

    Source: Esser et al. 2024 (Stable Diffusion 3), section 4 and figure 2; the later options are
    those of Stable Diffusion 3.5's published configs.
    """

    img_size: int | tuple[int, int] = 128
    patch_size: int = 2
    in_channels: int = 16
    hidden: int = 1536
    n_layers: int = 24
    n_heads: int = 24
    text_width: int = 4096
    pooled_width: int = 2048
    text_tokens: int = 589
    position_size: int = 192
    qk_norm: Literal["none", "rms"] = "none"
    dual_blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        dual = self.dual_blocks
        if not isinstance(dual, tuple | list) or not all(type(i) is int for i in dual):
            raise ValueError(f"dual_blocks: expected numbers of blocks, got {dual!r}")
        if not all(0 <= i < self.n_layers for i in dual):
            expected = f"numbers from 0 to {self.n_layers - 1}, as n_layers={self.n_layers}"
            raise ValueError(f"dual_blocks: expected {expected}, got {dual!r}")
        object.__setattr__(self, "dual_blocks", tuple(sorted(set(dual))))
        self.grid_of(*self.sample_shape[1:])

    @property
    def _checked(self) -> list[str]:
        return [name for name in self.to_dict() if name != "dual_blocks"]

    @property
    def out_channels(self) -> int:
        return self.in_channels

    @property
    def block_parts(self) -> list[tuple[int, int]]:
        """Parts of the modulation of the image's and of the text's stream, for each block.

        The last block's text needs a scale and a shift only, since its stream ends there.
        """
        last = self.n_layers - 1
        return [
            (9 if i in self.dual_blocks else 6, 2 if i == last else 6) for i in range(self.n_layers)
        ]

    @property
    def modulation_width(self) -> int:
        """Columns of `MMDiT.modulation_of`: those of both streams of each block, and the final."""
        return (sum(image + text for image, text in self.block_parts) + 2) * self.hidden

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = super().grid_of(height, width)
        if max(rows, columns) > self.position_size:
            most = self.position_size * self.patch_size
            expected = f"at most {most} x {most}, as position_size={self.position_size}"
            raise ValueError(f"size: expected {expected}, got {height} x {width}")
        return rows, columns


TextConfig = PixArtConfig | MMDiTConfig

_SIGMA = PixArtConfig(text_tokens=300)
_SD35 = MMDiTConfig(qk_norm="rms")

# Chen et al. 2023, 2024; Esser et al. 2024; and the config.json of each published model.
TEXT_PRESETS: dict[str, TextConfig] = {
    "PixArt-alpha-XL/2-256": PixArtConfig(img_size=32),
    "PixArt-alpha-XL/2-512": PixArtConfig(),
    "PixArt-alpha-XL/2-1024": PixArtConfig(img_size=128, position_scale=2.0, size_conditions=True),
    "PixArt-Sigma-XL/2-256": replace(_SIGMA, img_size=32, position_scale=0.5),
    "PixArt-Sigma-XL/2-512": _SIGMA,
    "PixArt-Sigma-XL/2-1024": replace(_SIGMA, img_size=128, position_scale=2.0),
    "SD3-medium": MMDiTConfig(),
    "SD3.5-medium": replace(_SD35, position_size=384, dual_blocks=tuple(range(13))),
    "SD3.5-large": replace(_SD35, hidden=2432, n_layers=38, n_heads=38),
}
