"""The model of the paper, in its order (Peebles & Xie 2023).

Its parameters have the names of `fastdit.DiT`'s, and are drawn in the same order.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.config import DiTConfig
from fastdit.diffusion import timestep_embedding
from fastdit.reference.ops import (
    attention,
    layer_norm_modulate,
    qk_norm_rope,
    rms_norm_modulate,
    rope_table,
    swiglu,
)
from fastdit.text_config import MMDiTConfig


class PatchEmbed(nn.Module):
    """Section 3.2, "Patchify": a linear embedding of p x p patches."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        p, C, r = cfg.patch_size, cfg.in_channels, cfg.patch_bottleneck
        if r is None:
            self.proj = nn.Conv2d(C, cfg.hidden, kernel_size=p, stride=p)
        else:  # Li & He 2025 (JiT), section 4
            self.reduce = nn.Conv2d(C, r, kernel_size=p, stride=p, bias=False)
            self.proj = nn.Conv2d(r, cfg.hidden, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "reduce"):
            x = self.reduce(x)
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


class Norm(nn.Module):
    """A norm with adaLN modulation: LayerNorm, or RMSNorm with a learned weight."""

    def __init__(self, cfg: DiTConfig, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(cfg.hidden)) if cfg.norm == "rms" else None

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        if self.weight is None:
            return layer_norm_modulate(x, scale, shift, self.eps)
        return rms_norm_modulate(x, scale, shift, self.weight, self.eps)


class HeadNorm(nn.Module):
    """The learned weights of the norm of each head's queries, or keys."""

    def __init__(self, cfg: DiTConfig | MMDiTConfig) -> None:
        super().__init__()
        d, kind = cfg.head_dim, cfg.qk_norm
        self.weight = nn.Parameter(torch.ones(d)) if kind != "none" else None
        self.bias = nn.Parameter(torch.zeros(d)) if kind == "layer" else None


class Attention(nn.Module):
    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.n_heads, self.eps = cfg.n_heads, cfg.qk_norm_eps
        self.qkv = nn.Linear(cfg.hidden, 3 * cfg.hidden)
        self.q_norm, self.k_norm = HeadNorm(cfg), HeadNorm(cfg)
        self.proj = nn.Linear(cfg.hidden, cfg.hidden)

    def forward(self, x: Tensor, rope: Tensor | None) -> Tensor:
        norms = self.q_norm.weight, self.q_norm.bias, self.k_norm.weight, self.k_norm.bias
        qkv = qk_norm_rope(self.qkv(x), self.n_heads, *norms, rope, self.eps)
        return self.proj(attention(qkv, self.n_heads))  # [B, N, D]


class SwiGLU(nn.Module):
    """`w3(silu(a) * b)`, with a and b the halves of `w12(x)` (Shazeer 2020)."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(cfg.hidden, 2 * cfg.mlp_hidden)
        self.w3 = nn.Linear(cfg.mlp_hidden, cfg.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(swiglu(self.w12(x)))


def mlp(cfg: DiTConfig) -> nn.Module:
    if cfg.mlp == "swiglu":
        return SwiGLU(cfg)
    return nn.Sequential(
        nn.Linear(cfg.hidden, cfg.mlp_hidden),
        nn.GELU(approximate="tanh" if cfg.gelu == "tanh" else "none"),
        nn.Linear(cfg.mlp_hidden, cfg.hidden),
    )


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
        self.parts = cfg.block_parts
        self.norm1 = Norm(cfg, cfg.ln_eps)
        self.attn = Attention(cfg)
        self.norm2 = Norm(cfg, cfg.mlp_ln_eps or cfg.ln_eps)
        self.mlp = mlp(cfg)
        self.adaLN_modulation = nn.Linear(D, self.parts * D)
        if cfg.embedders == "block":
            add_embedders(self, cfg)

    def forward(self, x: Tensor, c: Tensor, rope: Tensor | None = None) -> Tensor:
        modulation = self.adaLN_modulation(c).chunk(self.parts, dim=-1)  # each [B, D]
        if self.parts == 6:
            scale1, shift1, gate1, scale2, shift2, gate2 = modulation
        else:
            (scale1, gate1, scale2, gate2), shift1, shift2 = modulation, None, None
        x = x + gate1[:, None] * self.attn(self.norm1(x, scale1, shift1), rope)
        x = x + gate2[:, None] * self.mlp(self.norm2(x, scale2, shift2))
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
        if cfg.context_tokens:
            self.context_pos = nn.Parameter(torch.empty(1, cfg.context_tokens, D))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.final_norm = Norm(cfg, cfg.ln_eps)
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
                elif (
                    name.endswith(".weight") and p.dim() > 1 and not name.endswith("y_embed.weight")
                ):
                    nn.init.xavier_uniform_(p.flatten(1))
            for name, p in self.named_parameters():
                if name.endswith(("t_embed.0.weight", "t_embed.2.weight", "y_embed.weight")):
                    nn.init.normal_(p, std=0.02)
        if cfg.pos_embed == "sincos":
            self.pos_embed.copy_(sincos_pos_embed(cfg.hidden, cfg.grid))
        else:
            nn.init.normal_(self.pos_embed, std=0.02)
        if cfg.context_tokens:
            nn.init.normal_(self.context_pos, std=0.02)
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
        c, of_label = owner.t_embed(embedding.to(self.pos_embed.dtype)), self.label(t, y, owner)
        if of_label is not None:
            c = c + of_label
        return F.silu(c) if cfg.modulation_act == "silu" else c

    def label(self, t: Tensor, y: Tensor | None, owner: Any) -> Tensor | None:
        """The class embedding [B, D], or None without labels and without a null class."""
        if y is None and self.cfg.null_class:
            y = torch.full_like(t, self.cfg.num_classes, dtype=torch.int64)
        return None if y is None or not self.cfg.use_class_cond else owner.y_embed(y)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the noise: x [B, C, H, W], t [B], y [B] or None -> [B, C or 2C, H, W]."""
        cfg = self.cfg
        owners = self.blocks if cfg.embedders == "block" else [self]
        each = [self.conditioning(t, y, owner) for owner in owners]
        h = self.patch_embed(x) + self.pos_embed  # [B, N, D]
        n, start = cfg.context_tokens or 0, cfg.context_start or 0
        rope = rope_table(cfg.head_dim, cfg.grid, n).to(h.device) if cfg.rope else None
        for i, (block, c) in enumerate(zip(self.blocks, cycle(each), strict=False)):
            if n and i == start:  # Li & He 2025 (JiT), section 4: in-context class tokens
                of_label = self.label(t, y, self)
                context = self.context_pos.expand(len(h), -1, -1)
                context = context if of_label is None else context + of_label[:, None]
                h = torch.cat([context, h], dim=1)
            own = rope[:, n:] if rope is not None and i < start else rope
            h = block(h, c, own)
        scale, shift = self.final_mod(each[0]).chunk(2, dim=-1)
        h = self.final_linear(self.final_norm(h[:, n:], scale, shift))
        B, (rows, columns), p, C = len(h), cfg.grid, cfg.patch_size, cfg.out_channels
        image = torch.einsum("nhwpqc->nchpwq", h.view(B, rows, columns, p, p, C))
        return image.reshape(B, C, rows * p, columns * p)
