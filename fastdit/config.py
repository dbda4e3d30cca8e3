"""What a DiT is made of: one frozen dataclass, and the published sizes as presets."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from fastdit.errors import from_options, unknown_name

MLP_RATIO = 4

InitName = Literal["torch", "xavier"]

# Fields that files from earlier releases lack, with the values that those releases computed with.
# mlp_ln_eps and t_freq_shift came with the support for diffusers' checkpoints.
_LATER_OPTIONS: dict[str, Any] = {"mlp_ln_eps": None, "t_freq_shift": 0}


@dataclass(frozen=True)
class DiTConfig:
    """Shape and choices of a DiT. The defaults are the 323,696-parameter toy.

    Attributes:
        img_size: height and width of the input, in pixels (or latent cells).
        patch_size: side p of a patch; must divide img_size.
        in_channels: channels C of the input.
        hidden: width D of the residual stream; must be a multiple of n_heads.
        n_layers: number of transformer blocks.
        n_heads: attention heads.
        num_classes: number of class labels, 0 to num_classes - 1.
        use_class_cond: whether the model has a class embedding at all.
        null_class: one more embedding row, `num_classes`, that stands for "no label"
            (classifier-free guidance); used where y is None.
        modulation_act: activation of the conditioning before every modulation linear.
        gelu: "erf" (exact) or "tanh" (approximation) in the blocks' MLPs.
        ln_eps: epsilon of every LayerNorm.
        mlp_ln_eps: epsilon of the LayerNorms before the MLPs, where it is another one.
        pos_embed: "learned", or "sincos": fixed two-dimensional sine-cosine, stored.
        t_embed_width: width of the sinusoidal timestep embedding; None means hidden.
        t_freq_shift: the timestep embedding's slowest frequencies: exponents are divided by half
            its width less this (0, or 1 as diffusers has it).
        t_embed_act: activation inside the timestep MLP; "gelu" is the exact one.
        learn_sigma: the model returns 2C channels: the noise and the variance's interpolation.
        init: how fresh weights are drawn. "torch" is each layer's own default; "xavier" is the
            published DiT's: Xavier-uniform linears and patches, zero biases, normal(0.02)
            embeddings. Modulation and final layers start at zero either way.

    Raises:
        ValueError: a value is out of range or contradicts another; the message names both.
    """

    img_size: int = 16
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
    learn_sigma: bool = False
    init: InitName = "torch"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            _check_value(field.name, getattr(self, field.name), hints[field.name])
        if self.img_size % self.patch_size:
            raise ValueError(
                f"patch_size: expected a divisor of img_size={self.img_size}, got {self.patch_size}"
            )
        if self.hidden % self.n_heads:
            raise ValueError(
                f"n_heads: expected a divisor of hidden={self.hidden}, got {self.n_heads}"
            )
        if self.pos_embed == "sincos" and self.hidden % 4:
            raise ValueError(f"hidden: pos_embed='sincos' needs a multiple of 4, got {self.hidden}")
        if self.null_class and not self.use_class_cond:
            raise ValueError("null_class: expected False where use_class_cond=False, got True")

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> DiTConfig:
        """A config from a plain dict, such as one read from a file. An unknown key is an error."""
        return from_options(cls, options)

    @classmethod
    def from_saved(cls, options: dict[str, Any]) -> DiTConfig:
        """Return the config that a file holds, which an earlier release may have written.

        Args:
            options: every field, except those that were added after the file was written.

        Raises:
            ValueError: a field is unknown, missing or out of range.
        """
        if isinstance(options, dict):
            options = _LATER_OPTIONS | options
        return from_options(cls, options, complete=True)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.img_size // self.patch_size

    @property
    def n_tokens(self) -> int:
        return self.grid**2

    @property
    def head_dim(self) -> int:
        return self.hidden // self.n_heads

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def class_rows(self) -> int:
        """Rows of the class embedding, the null row included."""
        return self.num_classes + int(self.null_class) if self.use_class_cond else 0

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of one image."""
        return self.in_channels, self.img_size, self.img_size


def _check_value(name: str, value: Any, hint: Any) -> None:
    """Check one field against its annotation: the annotations are the rule, said once."""
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected True or False, got {value!r}")
    elif hint in (float, float | None):
        if value is None and hint is not float:
            return
        if not (isinstance(value, float) and math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a positive float, got {value!r}")
    elif hint in (int, int | None):
        if value is None and hint is not int:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    elif value not in get_args(hint) or type(value) not in map(type, get_args(hint)):
        raise unknown_name(name, value, get_args(hint))


# Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), table 1; the patch size
# varies, and 32 x 32 x 4 is the latent of a 256 x 256 image.
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

PRESETS: dict[str, DiTConfig] = {"toy": DiTConfig()} | {
    f"DiT-{size}/{patch}": replace(
        _PUBLISHED, patch_size=patch, n_layers=depth, hidden=width, n_heads=heads
    )
    for size, (depth, width, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}
