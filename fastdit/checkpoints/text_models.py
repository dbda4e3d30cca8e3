"""Translation of diffusers' PixArt and Stable Diffusion 3 to fastdit's, and back.

diffusers stores queries, keys and values separately and modulation as (shift, scale, gate), where
fastdit has one linear and (scale, shift, gate). No value of a weight changes, and translating back
gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from fastdit.checkpoints.inference import Told, check_patches_and_layers
from fastdit.checkpoints.options import check_choices, check_out_channels, float_of, size_of
from fastdit.checkpoints.pieces import TRIPLES, Piece, gathered, scattered
from fastdit.text_config import MMDiTConfig, PixArtConfig, TextConfig

PIXART_CLASS, SD3_CLASS = CLASSES = ("PixArtTransformer2DModel", "SD3Transformer2DModel")
_OLD_PIXART_CLASS = "Transformer2DModel"  # which is a DiT's too, with another norm_type

# The most tokens of a prompt that a pipeline of diffusers makes.
PIPELINE_TOKENS = {
    "PixArtAlphaPipeline": 120,
    "PixArtSigmaPipeline": 300,
    "StableDiffusion3Pipeline": 589,
}
_MOST_TOKENS = {PIXART_CLASS: 300, SD3_CLASS: 589}

_PIXART_CHOICES = {
    "norm_type": ("ada_norm_single",),
    "activation_fn": ("gelu-approximate", "gelu"),
    "attention_bias": (True, False),
    "norm_elementwise_affine": (False,),
    "upcast_attention": (False,),
    "attention_type": ("default",),
    "use_additional_conditions": (None, True, False),
}
_SD3_CHOICES: dict[str, tuple[Any, ...]] = {"qk_norm": (None, "rms_norm")}

_KINDS = ("weight", "bias")


def class_of(config: Any) -> str | None:
    """Return which of the two classes of diffusers a config is of, or None."""
    if not isinstance(config, Mapping):
        return None
    name = config.get("_class_name")
    if name == _OLD_PIXART_CLASS and config.get("norm_type") == "ada_norm_single":
        return PIXART_CLASS
    return name if name in CLASSES else None


def from_diffusers(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    told: Told,
    pipeline: str | None = None,
    is_file: bool = True,
) -> tuple[TextConfig, dict[str, Tensor]]:
    """Return the config and fastdit's state dict for one of diffusers' two classes.

    Args:
        tensors: its state dict.
        config: the content of its `config.json`, or a live model's `config` with `_class_name`.
        told: gets what was assumed.
        pipeline: the class of the pipeline that the model is part of, where it is known. It tells
            the most tokens of a prompt.
        is_file: whether it is more than a live module, of which a pipeline makes the prompts.

    Raises:
        ValueError: an option is not one that fastdit has, or does not fit the tensors.
    """
    cfg = config_from_diffusers(config, PIPELINE_TOKENS.get(pipeline or ""))
    if isinstance(cfg, PixArtConfig) and pipeline not in PIPELINE_TOKENS and is_file:
        told.assumed.append("text_tokens")
    check_patches_and_layers(tensors, cfg)
    return cfg, gathered(_pieces(cfg), tensors)


def to_diffusers(
    cfg: TextConfig, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return `config.json` and the state dict for diffusers; the inverse of `from_diffusers`.

    The most tokens of a prompt are the pipeline's there, and are not stored.

    Raises:
        ValueError: diffusers' model cannot express the config.
    """
    if not isinstance(cfg.img_size, int):
        expected = "that of diffusers is trained at square images only"
        raise ValueError(f"layout: {expected}, got img_size {cfg.img_size}")
    return diffusers_config(cfg), scattered(_pieces(cfg), state)


def diffusers_config(cfg: TextConfig) -> dict[str, Any]:
    """Return the content of `config.json` for a config, whether diffusers can express it or not."""
    shared = {
        "num_attention_heads": cfg.n_heads,
        "attention_head_dim": cfg.head_dim,
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "num_layers": cfg.n_layers,
        "sample_size": cfg.img_size,
        "patch_size": cfg.patch_size,
    }
    if isinstance(cfg, MMDiTConfig):
        return {
            "_class_name": SD3_CLASS,
            **shared,
            "joint_attention_dim": cfg.text_width,
            "caption_projection_dim": cfg.hidden,
            "pooled_projection_dim": cfg.pooled_width,
            "pos_embed_max_size": cfg.position_size,
            "dual_attention_layers": list(cfg.dual_blocks),
            "qk_norm": None if cfg.qk_norm == "none" else "rms_norm",
        }
    scale = cfg.position_scale
    return {
        "_class_name": PIXART_CLASS,
        **shared,
        "dropout": 0.0,
        "norm_num_groups": 32,
        "cross_attention_dim": cfg.hidden if cfg.text_projection else cfg.text_width,
        "attention_bias": cfg.qkv_bias,
        "activation_fn": "gelu-approximate" if cfg.gelu == "tanh" else "gelu",
        "num_embeds_ada_norm": 1000,
        "upcast_attention": False,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": cfg.ln_eps,
        "interpolation_scale": int(scale) if scale.is_integer() else scale,
        "use_additional_conditions": cfg.size_conditions,
        "caption_channels": cfg.text_width if cfg.text_projection else None,
        "attention_type": "default",
    }


def config_from_diffusers(config: Mapping[str, Any], text_tokens: int | None) -> TextConfig:
    """Return fastdit's config for a config of diffusers.

    Args:
        config: with the `_class_name` of one of the two classes.
        text_tokens: the most tokens of a prompt; None for the most of any pipeline of the class.

    Raises:
        ValueError: an option is not one that fastdit has; the message names it.
    """
    kind = class_of(config)
    n_heads, channels = size_of(config, "num_attention_heads"), size_of(config, "in_channels")
    hidden = n_heads * size_of(config, "attention_head_dim")
    shared: dict[str, Any] = dict(
        img_size=size_of(config, "sample_size"),
        patch_size=size_of(config, "patch_size"),
        in_channels=channels,
        hidden=hidden,
        n_layers=size_of(config, "num_layers"),
        n_heads=n_heads,
        text_tokens=text_tokens or _MOST_TOKENS[str(kind)],
    )
    if kind == SD3_CLASS:
        return _mmdit_config(config, shared)
    check_choices(config, _PIXART_CHOICES)
    check_out_channels(config, channels)
    projected = config.get("caption_channels") is not None
    cross = size_of(config, "cross_attention_dim")
    if projected and cross != hidden:
        expected = f"cross_attention_dim of {hidden}, the width that captions are projected to"
        raise ValueError(f"config: expected {expected}, got {cross}")
    conditions = config.get("use_additional_conditions")
    return PixArtConfig(
        **shared,
        text_width=size_of(config, "caption_channels") if projected else cross,
        text_projection=projected,
        size_conditions=shared["img_size"] == 128 if conditions is None else bool(conditions),
        position_scale=_position_scale(config, shared["img_size"]),
        qkv_bias=bool(config.get("attention_bias", True)),
        gelu="erf" if config.get("activation_fn") == "gelu" else "tanh",
        ln_eps=float_of(config, "norm_eps", 1e-6),
        learn_sigma=config.get("out_channels") == 2 * channels,
    )


def _mmdit_config(config: Mapping[str, Any], shared: dict[str, Any]) -> MMDiTConfig:
    check_choices(config, _SD3_CHOICES)
    check_out_channels(config, shared["in_channels"], most=1)
    caption = size_of(config, "caption_projection_dim")
    if caption != shared["hidden"]:
        expected = f"caption_projection_dim of {shared['hidden']}, the width of the stream"
        raise ValueError(f"config: expected {expected}, got {caption}")
    dual = config.get("dual_attention_layers", ())
    if not isinstance(dual, list | tuple):
        raise ValueError(f"config: expected dual_attention_layers as a list, got {dual!r:.40}")
    return MMDiTConfig(
        **shared,
        text_width=size_of(config, "joint_attention_dim"),
        pooled_width=size_of(config, "pooled_projection_dim"),
        position_size=size_of(config, "pos_embed_max_size"),
        qk_norm="none" if config.get("qk_norm") is None else "rms",
        dual_blocks=tuple(dual),
    )


def _position_scale(config: Mapping[str, Any], img_size: int) -> float:
    scale = config.get("interpolation_scale")
    if scale is None:
        return float(max(img_size // 64, 1))
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < 2**20:
        expected = "interpolation_scale to be a positive number"
        raise ValueError(f"config: expected {expected}, got {scale!r:.40}")
    return float(scale)


def _pieces(cfg: TextConfig) -> list[Piece]:
    """Return the table of a config's tensors."""
    rows = _mmdit_rows(cfg) if isinstance(cfg, MMDiTConfig) else _pixart_rows(cfg)
    pieces = [
        Piece(f"{own}.{kind}", tuple(f"{name}.{kind}" for name in theirs), order)
        for own, theirs, order, kinds in rows
        for kind in kinds
    ]
    if isinstance(cfg, MMDiTConfig):
        return [*pieces, Piece("pos_embed", ("pos_embed.pos_embed",))]
    tables = tuple(f"transformer_blocks.{i}.scale_shift_table" for i in range(cfg.n_layers))
    pieces.append(Piece("block_tables", tables, TRIPLES[:6], stacked=True))
    return [*pieces, Piece("final_table", ("scale_shift_table",), TRIPLES[:2])]


# Own name of a layer, their names, the order of its parts, and which tensors it has.
_Row = tuple[str, tuple[str, ...], tuple[int, ...], tuple[str, ...]]


def _row(own: str, *theirs: str, order: tuple[int, ...] = (), bias: bool = True) -> _Row:
    return own, theirs, order, _KINDS if bias else _KINDS[:1]


def _embedder(own: str, theirs: str) -> Iterable[_Row]:
    return _row(f"{own}.0", f"{theirs}.linear_1"), _row(f"{own}.2", f"{theirs}.linear_2")


def _packed(own: str, start: str, names: str, end: str = "", bias: bool = True) -> _Row:
    return _row(own, *(f"{start}{name}{end}" for name in names), bias=bias)


def _mlp(own: str, theirs: str) -> Iterable[_Row]:
    return _row(f"{own}.0", f"{theirs}.net.0.proj"), _row(f"{own}.2", f"{theirs}.net.2")


def _pixart_rows(cfg: PixArtConfig) -> Iterable[_Row]:
    embedders = {"t_embed": "timestep_embedder"}
    if cfg.size_conditions:
        embedders |= {"size_embed": "resolution_embedder", "ratio_embed": "aspect_ratio_embedder"}
    yield _row("patch_embed.proj", "pos_embed.proj")
    for own, name in embedders.items():
        yield from _embedder(own, f"adaln_single.emb.{name}")
    yield _row("modulation", "adaln_single.linear", order=TRIPLES[:6])
    if cfg.text_projection:
        yield from _embedder("text_embed", "caption_projection")
    for i in range(cfg.n_layers):
        own, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        yield _packed(f"{own}.attn.qkv", f"{theirs}.attn1.to_", "qkv", bias=cfg.qkv_bias)
        yield _row(f"{own}.attn.proj", f"{theirs}.attn1.to_out.0")
        yield _packed(f"{own}.cross.q", f"{theirs}.attn2.to_", "q", bias=cfg.qkv_bias)
        yield _packed(f"{own}.cross.kv", f"{theirs}.attn2.to_", "kv", bias=cfg.qkv_bias)
        yield _row(f"{own}.cross.proj", f"{theirs}.attn2.to_out.0")
        yield from _mlp(f"{own}.mlp", f"{theirs}.ff")
    yield _row("final_linear", "proj_out")


def _mmdit_rows(cfg: MMDiTConfig) -> Iterable[_Row]:
    yield _row("patch_embed.proj", "pos_embed.proj")
    yield from _embedder("t_embed", "time_text_embed.timestep_embedder")
    yield from _embedder("pooled_embed", "time_text_embed.text_embedder")
    yield _row("text_embed", "context_embedder")
    for i, (of_image, of_text) in enumerate(cfg.block_parts):
        theirs, ends = f"transformer_blocks.{i}", of_text == 2
        image, text = f"blocks.{i}.image", f"blocks.{i}.text"
        order = () if ends else TRIPLES[:of_text]  # that of a text that ends is fastdit's already
        yield _row(f"{image}.modulation", f"{theirs}.norm1.linear", order=TRIPLES[:of_image])
        yield _row(f"{text}.modulation", f"{theirs}.norm1_context.linear", order=order)
        attentions = {f"{image}.attn": "attn", f"{text}.attn": "attn"}
        if of_image == 9:
            attentions[f"{image}.dual"] = "attn2"
        for own, name in attentions.items():
            of_context = own.startswith(text)
            start, end = ("add_", "_proj") if of_context else ("to_", "")
            yield _packed(f"{own}.qkv", f"{theirs}.{name}.{start}", "qkv", end)
            out = "to_add_out" if of_context else "to_out.0"
            if not (of_context and ends):
                yield _row(f"{own}.proj", f"{theirs}.{name}.{out}")
            if cfg.qk_norm == "rms":
                norm = "norm_added_" if of_context else "norm_"
                for part in "qk":
                    yield _row(f"{own}.{part}_norm", f"{theirs}.{name}.{norm}{part}", bias=False)
        yield from _mlp(f"{image}.mlp", f"{theirs}.ff")
        if not ends:
            yield from _mlp(f"{text}.mlp", f"{theirs}.ff_context")
    yield _row("final_mod", "norm_out.linear")
    yield _row("final_linear", "proj_out")
