"""Fitting a trained model to other data, with which fine-tuning begins."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.config import DiTConfig
from fastdit.errors import height_and_width
from fastdit.model import DiT, sincos_pos_embed

_SEED = 0  # of everything that is drawn
_MAX_ELEMENTS = 2**31  # of a weight that is made anew; more is a mistake
_CLASS_TABLE = "y_embed.weight"  # the end of its name, since each block may have one of its own
_OF_CHANNELS = ("patch_embed.", "final_linear.")  # beginnings of names


@torch.no_grad()
def adapted(
    model: DiT,
    *,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
) -> tuple[DiT, list[str]]:
    """Return a model fitted to other data, and what was made anew for them.

    What the data change is made anew, and all else is kept to the bit:

    - classes: their rows are drawn as `DiTConfig.init` says; a null row is kept.
    - image size: sine-cosine positions are computed. Learned positions are interpolated bicubically
      over rows and columns, in float32 or, where they are stored so, in float64.
    - channels: the patch embedding is drawn as in a fresh model, and the final linear is zero.

    Draws are those of a seed, 0, so that they are the same in every call and every process. The
    caller's random state is left alone. New weights have the dtype and the device of the old ones,
    and are trained if those were.

    Args:
        model: the trained model, which is left as it is. The result shares the memory of the
            weights that are kept.
        num_classes: number of classes; None keeps the model's, and so for the other two.
        img_size: height and width, in pixels or latent cells: an integer for a square, or a pair.
        in_channels: number of channels.

    Returns:
        (fitted, made): the fitted model, and phrases such as "the 5 class rows". Where all numbers
        are the model's own, it is the model itself and an empty list.

    Raises:
        ValueError: a number is out of range, the patches do not divide the size, or num_classes is
            given to a model without class conditioning.
    """
    before = model.cfg
    if num_classes is not None and not before.use_class_cond:
        reason = "since the model has use_class_cond=False"
        raise ValueError(f"num_classes: expected None, {reason}, got {num_classes}")
    if img_size is not None:
        img_size = height_and_width("img_size", img_size, before.patch_size)
    cfg = replace(
        before,
        num_classes=before.num_classes if num_classes is None else num_classes,
        img_size=before.img_size if img_size is None else img_size,
        in_channels=before.in_channels if in_channels is None else in_channels,
    )
    if cfg == before:
        return model, []
    _check_elements(cfg)
    state, made = model.state_dict(), []
    tables = [name for name in state if name.endswith(_CLASS_TABLE)]
    new: dict[str, Tensor] = {}
    if cfg.num_classes != before.num_classes:
        drawn = _drawn(cfg, len(tables))[_CLASS_TABLE]
        rows = drawn[: len(tables) * cfg.num_classes].chunk(len(tables))
        for name, own in zip(tables, rows, strict=True):
            null = state[name][before.num_classes :]
            new[name] = torch.cat([own.to(null), null])
        each = " of every block" if len(tables) > 1 else ""
        made.append(f"the {_count(cfg.num_classes, 'class row')}{each}")
    if cfg.grid != before.grid:
        new["pos_embed"] = _positions(state["pos_embed"], before, cfg)
        how = f", interpolated from {_by(before.grid)}" if cfg.pos_embed == "learned" else ""
        made.append(f"the positions of {_by(cfg.grid)} patches{how}")
    if cfg.in_channels != before.in_channels:
        fresh = _drawn(cfg, len(tables))
        new |= {name: t for name, t in fresh.items() if name.startswith(_OF_CHANNELS)}
        made.append(f"the patch embedding of {_count(cfg.in_channels, 'channel')}")
        made.append("the final linear, which starts at zero")
    return _with_weights(cfg, model, state | {n: t.to(state[n]) for n, t in new.items()}), made


def _check_elements(cfg: DiTConfig) -> None:
    """Raise a ValueError if a weight of the new sizes would not fit into memory."""
    counts = {
        "num_classes": cfg.num_classes * cfg.use_class_cond,
        "img_size": cfg.n_tokens,
        "in_channels": cfg.in_channels * cfg.patch_size**2,
    }
    for name, count in counts.items():
        if count * cfg.hidden > _MAX_ELEMENTS:
            got = f"{getattr(cfg, name)}, which makes {count} x {cfg.hidden}"
            raise ValueError(f"{name}: expected a weight of at most 2^31 elements, got {got}")


def _drawn(cfg: DiTConfig, tables: int) -> dict[str, Tensor]:
    """Return fresh weights, with the class rows of all `tables` in the one class table.

    They are those of a model of one layer, since layers are not needed and would take long.
    """
    rows = max(1, tables) * cfg.num_classes
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(_SEED)
        one = replace(cfg, n_layers=1, num_classes=rows, context_start=None)
        fresh = DiT.from_config(one).state_dict()
    return {_CLASS_TABLE if n.endswith(_CLASS_TABLE) else n: t for n, t in fresh.items()}


def _positions(table: Tensor, before: DiTConfig, cfg: DiTConfig) -> Tensor:
    """Return the positions of the new grid: [1, N, D], for a table of the old one."""
    if cfg.pos_embed == "sincos":
        return sincos_pos_embed(cfg.hidden, cfg.grid)
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    image = wide.unflatten(1, before.grid).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    image = F.interpolate(image, size=cfg.grid, mode="bicubic", align_corners=False)
    return image.flatten(2).transpose(1, 2).contiguous()


def _with_weights(cfg: DiTConfig, model: DiT, state: dict[str, Tensor]) -> DiT:
    """Return a model of a config with given weights, which are trained where the model's are."""
    with torch.device("meta"):
        fitted = DiT.from_config(cfg)
    fitted.load_state_dict(state, assign=True)
    fitted.make_rope()
    for p, own in zip(fitted.parameters(), model.parameters(), strict=True):
        p.requires_grad_(own.requires_grad)
    return fitted.train(model.training)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"
