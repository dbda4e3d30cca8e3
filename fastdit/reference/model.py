"""The model of the paper, in its order (Peebles & Xie 2023).

Its parameters have the names of `fastdit.DiT`'s, and are drawn in the same order.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.config import MLP_RATIO, DiTConfig
from fastdit.diffusion import timestep_embedding
from fastdit.reference.ops import attention, layer_norm_modulate


class PatchEmbed(nn.Module):
    """Section 3.2, "Patchify": a linear embedding of p x p patches."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        p = cfg.patch_size
        self.proj = nn.Conv2d(cfg.in_channels, cfg.hidden, kernel_size=p, stride=p)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, N, D]


def sincos_pos_embed(hidden: int, grid: tuple[int, int]) -> Tensor:
    """Fixed two-dimensional positions of (rows, columns) of patches: [1, N, hidden] float64.

    The first half of the channels encodes the column, the second half the row, each as
    `[sin | cos]` of `position / 10000^(i / (hidden / 4))` (`pos_embed` of MAE's and DiT's code).
    """
    omega = 10000.0 ** -(torch.arange(hidden // 4, dtype=torch.float64) / (hidden // 4))
    row, column = torch.meshgrid(*[torch.arange(side).double() for side in grid], indexing="ij")
    angles = [position.flatten()[:, None] * omega for position in (column, row)]
    parts = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
    return torch.cat(parts, dim=1)[None]


class Attention(nn.Module):
    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.n_heads = cfg.n_heads
        self.qkv = nn.Linear(cfg.hidden, 3 * cfg.hidden)
        self.proj = nn.Linear(cfg.hidden, cfg.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(self.qkv(x), self.n_heads))  # [B, N, D]


def add_embedders(owner: nn.Module, cfg: DiTConfig) -> None:
    """Section 3.2: give the model, or a block, its timestep MLP and its class embedding."""
    D = cfg.hidden
    owner.t_embed = nn.Sequential(
        nn.Linear(cfg.t_embed_width or D, D),
        nn.SiLU() if cfg.t_embed_act == "silu" else nn.GELU(),
        nn.Linear(D, D),
    )
    if cfg.use_class_cond:
        owner.y_embed = nn.Embedding(cfg.class_rows, D)


class Block(nn.Module):
    """Section 3.2, "adaLN-Zero block" (figure 3)."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        D = cfg.hidden
        self.eps, self.mlp_eps = cfg.ln_eps, cfg.mlp_ln_eps or cfg.ln_eps
        self.attn = Attention(cfg)
        self.mlp = nn.Sequential(
            nn.Linear(D, MLP_RATIO * D),
            nn.GELU(approximate="tanh" if cfg.gelu == "tanh" else "none"),
            nn.Linear(MLP_RATIO * D, D),
        )
        self.adaLN_modulation = nn.Linear(D, 6 * D)
        if cfg.embedders == "block":
            add_embedders(self, cfg)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c)  # [B, 6D]
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attn(layer_norm_modulate(x, scale1, shift1, self.eps))
        x = x + gate2[:, None] * self.mlp(layer_norm_modulate(x, scale2, shift2, self.mlp_eps))
        return x


class DiT(nn.Module):
    """The plain model; its arguments are the fields of `DiTConfig`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.cfg = cfg = DiTConfig(**options)
        D = cfg.hidden
        self.patch_embed = PatchEmbed(cfg)
        self.pos_embed = nn.Parameter(
            torch.empty(1, cfg.n_tokens, D), requires_grad=cfg.pos_embed == "learned"
        )
        if cfg.embedders == "shared":
            add_embedders(self, cfg)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.final_mod = nn.Linear(D, 2 * D)
        self.final_linear = nn.Linear(D, cfg.patch_size**2 * cfg.out_channels)
        self._init_weights()

    @classmethod
    def from_config(cls, cfg: DiTConfig) -> DiT:
        return cls(**cfg.to_dict())

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Section 4 and the published code; adaLN-Zero starts every block as the identity."""
        cfg = self.cfg
        if cfg.init == "xavier":
            for name, p in self.named_parameters():
                if name.endswith(".bias"):
                    nn.init.zeros_(p)
                elif name.endswith(".weight") and not name.endswith("y_embed.weight"):
                    nn.init.xavier_uniform_(p.flatten(1))
            for name, p in self.named_parameters():
                if name.endswith(("t_embed.0.weight", "t_embed.2.weight", "y_embed.weight")):
                    nn.init.normal_(p, std=0.02)
        if cfg.pos_embed == "sincos":
            self.pos_embed.copy_(sincos_pos_embed(cfg.hidden, cfg.grid))
        else:
            nn.init.normal_(self.pos_embed, std=0.02)
        for name, p in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith(("final_mod", "final_linear")):
                nn.init.zeros_(p)

    def conditioning(self, t: Tensor, y: Tensor | None, owner: Any = None) -> Tensor:
        """The vector that modulation is made from: t [B], y [B] or None -> [B, D].

        `owner` is the block whose embedders make it; None is the model, whose embedders serve all
        blocks. Without labels a model with a null class uses its row, and others add nothing.
        """
        cfg = self.cfg
        embedding = timestep_embedding(
            t, cfg.t_embed_width or cfg.hidden, freq_shift=cfg.t_freq_shift
        )
        owner = self if owner is None else owner
        c = owner.t_embed(embedding.to(self.pos_embed.dtype))
        if y is None and cfg.null_class:
            y = torch.full_like(t, cfg.num_classes, dtype=torch.int64)
        if y is not None and cfg.use_class_cond:
            c = c + owner.y_embed(y)
        return F.silu(c) if cfg.modulation_act == "silu" else c

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the noise: x [B, C, H, W], t [B], y [B] or None -> [B, C or 2C, H, W]."""
        cfg = self.cfg
        owners = self.blocks if cfg.embedders == "block" else [self]
        each = [self.conditioning(t, y, owner) for owner in owners]
        h = self.patch_embed(x) + self.pos_embed  # [B, N, D]
        for block, c in zip(self.blocks, cycle(each), strict=False):
            h = block(h, c)
        scale, shift = self.final_mod(each[0]).chunk(2, dim=-1)
        h = self.final_linear(layer_norm_modulate(h, scale, shift, cfg.ln_eps))
        B, (rows, columns), p, C = len(h), cfg.grid, cfg.patch_size, cfg.out_channels
        image = torch.einsum("nhwpqc->nchpwq", h.view(B, rows, columns, p, p, C))
        return image.reshape(B, C, rows * p, columns * p)
