"""The shape and choices of a DiT: one frozen dataclass, and the published sizes as presets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from fastdit.errors import check_fields, from_options, height_and_width

MLP_RATIO = 4


# Fields that files from earlier releases lack, with the values that those releases computed with.
_LATER_OPTIONS: dict[str, Any] = {
    # for diffusers' checkpoints
    "mlp_ln_eps": None,
    "t_freq_shift": 0,
    "embedders": "shared",
    # for LightningDiT, REPA and JiT
    "norm": "layer",
    "modulation_shift": True,
    "qk_norm": "none",
    "qk_norm_eps": 1e-6,
    "rope": False,
    "mlp": "gelu",
    "patch_bottleneck": None,
    "context_tokens": None,
    "context_start": None,
}


@dataclass(frozen=True)
class DiTConfig:
    """The shape and choices of a DiT. The defaults are the 323,696-parameter toy.

    Attributes:
        img_size: height and width of the input, in pixels or latent cells: an integer for a
            square, which it stays, else (height, width).
        patch_size: side p of a patch; must divide height and width.
        in_channels: channels C of the input.
        hidden: width D of the residual stream; must be a multiple of n_heads.
        n_layers: number of transformer blocks.
        n_heads: number of attention heads.
        num_classes: number of class labels, 0 to num_classes - 1.
        use_class_cond: whether the model has a class embedding at all.
        null_class: whether the class embedding has one more row, number `num_classes`, for "no
            label"; classifier-free guidance needs it, and it is used where y is None.
        modulation_act: activation of the conditioning before every modulation linear.
        gelu: "erf" (exact) or "tanh" (approximation) in the blocks' MLPs.
        ln_eps: epsilon of every norm of the residual stream.
        mlp_ln_eps: epsilon of the norms before the MLPs; None means ln_eps.
        pos_embed: "learned", or "sincos": a fixed two-dimensional sine-cosine embedding, which is
            stored with the weights.
        t_embed_width: width of the sinusoidal timestep embedding; None means hidden.
        t_freq_shift: as `freq_shift` of `fastdit.timestep_embedding`: 0, or 1 as in diffusers.
        t_embed_act: activation inside the timestep MLP; "gelu" is the exact one.
        embedders: "shared": one timestep MLP and one class embedding for all modulations; or
            "block": each block has its own, as diffusers trains them, and the final layer takes
            those of the first block.
        learn_sigma: whether the model returns 2C channels, the noise and the interpolation of the
            variance, instead of C.
        norm: "layer": LayerNorms without weights; or "rms": RMSNorms with a learned weight, in the
            blocks and before the final layer.
        modulation_shift: whether the blocks' modulation has shifts: six parts for each block, or
            without them four (scale1, gate1, scale2, gate2). The final layer has a shift in any
            case.
        qk_norm: norm of each head's queries and keys before their product, with learned weights:
            "none", "layer" (with biases too) or "rms".
        qk_norm_eps: epsilon of these norms.
        rope: whether queries and keys are rotated by their patch's row and column
            (`fastdit.functional.rope_table`); the head dim must be a multiple of 4.
        mlp: "gelu": Linear, GELU, Linear, four times as wide as the stream; or "swiglu":
            `w3(silu(a) * b)` with a and b the halves of `w12(x)`, each `8 hidden // 3` wide.
        patch_bottleneck: width of a linear without bias that patches pass before they are
            embedded; None has no such layer.
        context_tokens: number of tokens, made of the class embedding and of learned positions,
            that are put before the patches from block `context_start` on; None has none.
        context_start: the number of blocks before the first one with context tokens; None is 0.
        init: how fresh weights are drawn. "torch" is each layer's own default; "xavier" is the
            published DiT's: Xavier-uniform linears and patches, zero biases, normal(0.02)
            embeddings. Modulation and final layers start at zero either way.

    Raises:
        ValueError: a value is out of range or contradicts another; the message names both.
    """

    img_size: int | tuple[int, int] = 16
    patch_size: int = 4
    in_channels: int = 3
    hidden: int = 64
    n_layers: int = 4
    n_heads: int = 4
    num_classes: int = 16
    use_class_cond: bool = True
    null_class: bool = False
    modulation_act: Literal["none", "silu"] = "none"
    gelu: Literal["erf", "tanh"] = "erf"
    ln_eps: float = 1e-5
    mlp_ln_eps: float | None = None
    pos_embed: Literal["learned", "sincos"] = "learned"
    t_embed_width: int | None = None
    t_freq_shift: Literal[0, 1] = 0
    t_embed_act: Literal["gelu", "silu"] = "gelu"
    embedders: Literal["shared", "block"] = "shared"
    learn_sigma: bool = False
    init: Literal["torch", "xavier"] = "torch"
    norm: Literal["layer", "rms"] = "layer"
    modulation_shift: bool = True
    qk_norm: Literal["none", "layer", "rms"] = "none"
    qk_norm_eps: float = 1e-6
    rope: bool = False
    mlp: Literal["gelu", "swiglu"] = "gelu"
    patch_bottleneck: int | None = None
    context_tokens: int | None = None
    context_start: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        height, width = height_and_width("img_size", self.img_size)
        # One form for each size, so that equal configs compare equal and can be hashed.
        object.__setattr__(self, "img_size", height if height == width else (height, width))
        for part, whole in (("patch_size", "img_size"), ("n_heads", "hidden")):
            divisor, size = getattr(self, part), getattr(self, whole)
            if any(n % divisor for n in (size if isinstance(size, tuple) else (size,))):
                raise ValueError(f"{part}: expected a divisor of {whole}={size}, got {divisor}")
        if self.pos_embed == "sincos" and self.hidden % 4:
            raise ValueError(f"hidden: pos_embed='sincos' needs a multiple of 4, got {self.hidden}")
        if self.null_class and not self.use_class_cond:
            raise ValueError("null_class: expected False where use_class_cond=False, got True")
        if self.rope and self.head_dim % 4:
            raise ValueError(f"rope: needs a head dim that 4 divides, got {self.head_dim}")
        if self.context_tokens and not self.use_class_cond:
            raise ValueError("context_tokens: expected None where use_class_cond=False")
        if self.context_tokens and self.embedders == "block":
            raise ValueError("context_tokens: expected None where embedders='block'")
        if self.context_start and not (self.context_tokens and self.context_start < self.n_layers):
            expected = f"fewer than n_layers={self.n_layers} and context_tokens beside it"
            raise ValueError(f"context_start: expected {expected}, got {self.context_start}")

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> DiTConfig:
        """Return a config with some fields set; an unknown field is a ValueError."""
        return from_options(cls, options)

    @classmethod
    def from_saved(cls, options: dict[str, Any]) -> DiTConfig:
        """Return the config that a file holds, which an earlier release may have written.

        Raises:
            ValueError: a field is unknown or out of range, or one that its release had is missing.
        """
        if isinstance(options, dict):
            options = _LATER_OPTIONS | options
        return from_options(cls, options, complete=True)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches: (rows, columns)."""
        _, height, width = self.sample_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def n_tokens(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @property
    def head_dim(self) -> int:
        return self.hidden // self.n_heads

    @property
    def mlp_hidden(self) -> int:
        """Width of the MLPs between their linears."""
        return MLP_RATIO * self.hidden * 2 // 3 if self.mlp == "swiglu" else MLP_RATIO * self.hidden

    @property
    def block_parts(self) -> int:
        """Number of parts, each as wide as the stream, of a block's modulation."""
        return 6 if self.modulation_shift else 4

    @property
    def modulation_width(self) -> int:
        """Number of columns of a row of modulation, as `fastdit.DiT.modulation` lays it out."""
        parts = self.block_parts * self.n_layers + 2 + bool(self.context_tokens)
        return parts * self.hidden

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def class_rows(self) -> int:
        """Number of rows of the class embedding, including the null row."""
        return self.num_classes + int(self.null_class) if self.use_class_cond else 0

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of one image."""
        size = self.img_size
        height, width = size if isinstance(size, tuple) else (size, size)
        return self.in_channels, height, width


# Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), table 1; each size comes with
# three patch sizes, and 32 x 32 x 4 is the latent of a 256 x 256 image.
_PUBLISHED = DiTConfig(
    img_size=32,
    in_channels=4,
    num_classes=1000,
    null_class=True,
    modulation_act="silu",
    gelu="tanh",
    ln_eps=1e-6,
    pos_embed="sincos",
    t_embed_width=256,
    t_embed_act="silu",
    learn_sigma=True,
    init="xavier",
)
_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def _sized(base: DiTConfig, sizes: tuple[int, int, int], **options: Any) -> DiTConfig:
    depth, width, heads = sizes
    return replace(base, n_layers=depth, hidden=width, n_heads=heads, **options)


# Yao et al., "Reconstruction vs. Generation" (2025), and `configs/` of their code: 16 x 16 x 32 is
# VA-VAE's latent of a 256 x 256 image.
_LIGHTNING = replace(
    _PUBLISHED,
    img_size=16,
    patch_size=1,
    in_channels=32,
    norm="rms",
    rope=True,
    mlp="swiglu",
    learn_sigma=False,
)
_LIGHTNING_SIZES = {
    "B": (12, 768, 12),
    "XL": (28, 1152, 16),
    "1p0B": (24, 1536, 24),
    "1p6B": (28, 1792, 28),
}

# Li & He, "Back to Basics: Let Denoising Generative Models Denoise" (2025), and `model_jit.py`: the
# patch grows with the image, so that 256 tokens stay.
_JIT = replace(
    _LIGHTNING, img_size=256, patch_size=16, in_channels=3, qk_norm="rms", context_tokens=32
)
_JIT_SIZES = {  # size, width of the bottleneck, and blocks before the context tokens
    "B": ((12, 768, 12), 128, 4),
    "L": ((24, 1024, 16), 128, 8),
    "H": ((32, 1280, 16), 256, 10),
}

PRESETS: dict[str, DiTConfig] = (
    {"toy": DiTConfig()}
    # Ma et al., "SiT" (2024), kept DiT's network.
    | {
        f"{project}-{size}/{patch}": _sized(_PUBLISHED, sizes, patch_size=patch)
        for project in ("DiT", "SiT")
        for size, sizes in _SIZES.items()
        for patch in (2, 4, 8)
    }
    # Yu et al., "Representation Alignment for Generation" (2025): a SiT without variance.
    | {
        f"REPA-{size}/2": _sized(_PUBLISHED, _SIZES[size], patch_size=2, learn_sigma=False)
        for size in ("B", "L", "XL")
    }
    | {
        f"LightningDiT-{size}/1": _sized(_LIGHTNING, sizes)
        for size, sizes in _LIGHTNING_SIZES.items()
    }
    | {
        f"JiT-{size}/{patch}": _sized(
            _JIT,
            sizes,
            patch_size=patch,
            img_size=16 * patch,
            patch_bottleneck=bottleneck,
            context_start=start,
        )
        for size, (sizes, bottleneck, start) in _JIT_SIZES.items()
        for patch in (16, 32)
    }
)
