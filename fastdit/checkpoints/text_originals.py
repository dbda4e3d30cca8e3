"""The layouts of the projects that published PixArt and Stable Diffusion 3, which are read.

Their linears are packed as fastdit's are, and modulation is (shift, scale, gate) throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from fastdit.checkpoints.inference import Told, count_layers
from fastdit.checkpoints.pieces import TRIPLES, Piece, gathered
from fastdit.checkpoints.text_inference import mmdit_config, pixart_config
from fastdit.text_config import TextConfig

PIXART, SD3 = "PixArt-alpha/PixArt-alpha", "Stability-AI/sd3.5"
TEXT_PROJECTS = (PIXART, SD3)
_MARKS = {"t_block.1.weight": PIXART, "context_embedder.weight": SD3}

# What guidance takes in place of a prompt; it is a text encoder's, and no weight of the network.
_NULL_PROMPT = "y_embedder.y_embedding"

_PIXART_BLOCK = {
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "cross.q": "cross_attn.q_linear",
    "cross.kv": "cross_attn.kv_linear",
    "cross.proj": "cross_attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_SD3_BLOCK = {
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "attn.q_norm": "attn.ln_q",
    "attn.k_norm": "attn.ln_k",
    "dual.qkv": "attn2.qkv",
    "dual.proj": "attn2.proj",
    "dual.q_norm": "attn2.ln_q",
    "dual.k_norm": "attn2.ln_k",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


def text_project_of(names: Iterable[str]) -> str | None:
    """Return the project whose marks are among the names of tensors, or None."""
    return next((_MARKS[name] for name in names if name in _MARKS), None)


def from_original(
    project: str, tensors: Mapping[str, Tensor], told: Told
) -> tuple[TextConfig, dict[str, Tensor]]:
    """Return the config and fastdit's state dict for one of `TEXT_PROJECTS`.

    PixArt's embedding of no prompt becomes `null_prompt`, which no model of fastdit has.

    Args:
        project: as `text_project_of` returns it.
        tensors: the project's state dict.
        told: what is known of the model besides its tensors; it gets what was assumed.

    Raises:
        ValueError: a tensor that tells the config is missing, an option of the config is open, or
            the network has parts that fastdit does not have; the message names them.
    """
    layers = count_layers(tensors)
    if project == SD3:
        state = gathered(_sd3_pieces(layers, tensors), tensors)
        return mmdit_config(state, told), state
    _check_parts(tensors)
    state = gathered(_pixart_pieces(layers), tensors)
    prompt = state.pop(_NULL_PROMPT, None)
    cfg = pixart_config(state, told, None if prompt is None else _tokens(prompt))
    state.pop("pos_embed", None)  # fastdit computes them
    return cfg, state if prompt is None else state | {"null_prompt": prompt}


def _check_parts(tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if a PixArt has an option that fastdit's has not."""
    for part, what in ((".attn.sr.", "key-value compression"), (".attn.q_norm.", "qk-norm")):
        if found := [name for name in tensors if part in name]:
            raise ValueError(f"expected a PixArt without {what}, got {found[0]}")


def _tokens(prompt: Tensor) -> int:
    if prompt.dim() != 2 or not len(prompt):
        got = list(prompt.shape)
        raise ValueError(f"{_NULL_PROMPT}: expected shape [tokens, width], got {got}")
    return len(prompt)


def _layer(own: str, theirs: str, order: tuple[int, ...] = ()) -> list[Piece]:
    return [Piece(f"{own}.{kind}", (f"{theirs}.{kind}",), order) for kind in ("weight", "bias")]


def _embedder(own: str, theirs: str) -> list[Piece]:
    return _layer(f"{own}.0", f"{theirs}.0") + _layer(f"{own}.2", f"{theirs}.2")


def _pixart_pieces(layers: int) -> list[Piece]:
    text = "y_embedder.y_proj.fc"
    pieces = _layer("patch_embed.proj", "x_embedder.proj")
    pieces += _embedder("t_embed", "t_embedder.mlp")
    pieces += _embedder("size_embed", "csize_embedder.mlp")
    pieces += _embedder("ratio_embed", "ar_embedder.mlp")
    pieces += _layer("modulation", "t_block.1", TRIPLES[:6])
    pieces += _layer("text_embed.0", f"{text}1") + _layer("text_embed.2", f"{text}2")
    for i in range(layers):
        for own, theirs in _PIXART_BLOCK.items():
            pieces += _layer(f"blocks.{i}.{own}", f"blocks.{i}.{theirs}")
    tables = tuple(f"blocks.{i}.scale_shift_table" for i in range(layers))
    pieces.append(Piece("block_tables", tables, TRIPLES[:6], stacked=True))
    pieces.append(Piece("final_table", ("final_layer.scale_shift_table",), TRIPLES[:2]))
    return pieces + _layer("final_linear", "final_layer.linear")


def _sd3_pieces(layers: int, tensors: Mapping[str, Tensor]) -> list[Piece]:
    pieces = _layer("patch_embed.proj", "x_embedder.proj")
    pieces += _embedder("t_embed", "t_embedder.mlp")
    pieces += _embedder("pooled_embed", "y_embedder.mlp")
    pieces += _layer("text_embed", "context_embedder")
    for i in range(layers):
        for stream, block in (("image", "x_block"), ("text", "context_block")):
            own, theirs = f"blocks.{i}.{stream}", f"joint_blocks.{i}.{block}"
            parts = 9 if f"{theirs}.attn2.qkv.weight" in tensors else 6
            if stream == "text" and i == layers - 1:
                parts = 2
            order = TRIPLES[:parts]
            pieces += _layer(f"{own}.modulation", f"{theirs}.adaLN_modulation.1", order)
            for name, of_theirs in _SD3_BLOCK.items():
                pieces += _layer(f"{own}.{name}", f"{theirs}.{of_theirs}")
    pieces += _layer("final_mod", "final_layer.adaLN_modulation.1", TRIPLES[:2])
    return pieces + _layer("final_linear", "final_layer.linear")
