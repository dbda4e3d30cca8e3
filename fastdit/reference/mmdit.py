"""The transformer of Stable Diffusion 3 in the order of the paper (Esser et al. 2024, section 4).

Parameters have the names of `fastdit.MMDiT`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.diffusion import timestep_embedding
from fastdit.reference.model import HeadNorm
from fastdit.reference.ops import (
    attention,
    joint_attention,
    layer_norm_modulate,
    qk_norm_rope,
)
from fastdit.reference.text import (
    EMBEDDING,
    FINAL_EPS,
    PatchEmbed,
    embedder,
    positions,
    unpatchify,
)
from fastdit.text_config import MMDiTConfig

EPS = 1e-6  # of all norms


class Attention(nn.Module):
    """The linears and norms of one stream's attention; nothing comes back to one that `ends`."""

    def __init__(self, cfg: MMDiTConfig, ends: bool = False) -> None:
        super().__init__()
        D = cfg.hidden
        self.n_heads = cfg.n_heads
        self.qkv = nn.Linear(D, 3 * D)
        self.q_norm, self.k_norm = HeadNorm(cfg), HeadNorm(cfg)
        if not ends:
            self.proj = nn.Linear(D, D)

    @property
    def norms(self) -> tuple[Tensor | None, Tensor | None]:
        return self.q_norm.weight, self.k_norm.weight

    def forward(self, x: Tensor) -> Tensor:
        """Attention of the stream to itself: [B, N, D] -> [B, N, D]."""
        q_weight, k_weight = self.norms
        qkv = qk_norm_rope(self.qkv(x), self.n_heads, q_weight, None, k_weight, None, eps=EPS)
        return self.proj(attention(qkv, self.n_heads))


class Stream(nn.Module):
    """The image's or the text's half of figure 2b; `parts` is that of its modulation."""

    def __init__(self, cfg: MMDiTConfig, parts: int) -> None:
        super().__init__()
        D, self.parts = cfg.hidden, parts
        self.modulation = nn.Linear(D, parts * D)
        self.attn = Attention(cfg, ends=parts == 2)
        if parts == 9:  # Stable Diffusion 3.5 medium: a second attention, of the stream to itself
            self.dual = Attention(cfg)
        if parts > 2:
            self.mlp = nn.Sequential(
                nn.Linear(D, cfg.mlp_hidden),
                nn.GELU(approximate="tanh"),
                nn.Linear(cfg.mlp_hidden, D),
            )

    def modulations(self, c: Tensor) -> list[Tensor]:
        return list(self.modulation(c).chunk(self.parts, dim=-1))  # each [B, D]

    def finish(self, x: Tensor, found: Tensor, modulation: list[Tensor]) -> Tensor:
        """Add what attention found, that of a second attention, and the MLP."""
        _, _, gate1, scale2, shift2, gate2, *dual = modulation
        before = x
        x = x + gate1[:, None] * self.attn.proj(found)
        if dual:
            scale3, shift3, gate3 = dual
            x = x + gate3[:, None] * self.dual(layer_norm_modulate(before, scale3, shift3, EPS))
        return x + gate2[:, None] * self.mlp(layer_norm_modulate(x, scale2, shift2, EPS))


class Block(nn.Module):
    """Figure 2b; the last one has no use for the text's side past its keys and values."""

    def __init__(self, cfg: MMDiTConfig, parts: tuple[int, int]) -> None:
        super().__init__()
        self.n_heads = cfg.n_heads
        self.image, self.text = Stream(cfg, parts[0]), Stream(cfg, parts[1])

    def forward(
        self, x: Tensor, text: Tensor, c: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x [B, N, D], text [B, M, D], c [B, D] -> x and text after the block."""
        modulation, qkv = [], []
        for stream, h in ((self.image, x), (self.text, text)):
            modulation.append(stream.modulations(c))
            scale1, shift1 = modulation[-1][:2]
            qkv.append(stream.attn.qkv(layer_norm_modulate(h, scale1, shift1, EPS)))
        norms = *self.image.attn.norms, *self.text.attn.norms
        found, of_text = joint_attention(qkv[0], qkv[1], self.n_heads, norms, lengths, EPS)
        x = self.image.finish(x, found, modulation[0])
        if self.text.parts > 2:
            text = self.text.finish(text, of_text, modulation[1])
        return x, text


class MMDiT(nn.Module):
    """The plain model; its arguments are the fields of `MMDiTConfig`."""

    pos_embed: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.cfg = cfg = MMDiTConfig(**options)
        D, P = cfg.hidden, cfg.position_size
        self.patch_embed = PatchEmbed(cfg)
        base = cfg.sample_shape[1] // cfg.patch_size
        self.register_buffer("pos_embed", positions(D, (P, P), base).to(torch.get_default_dtype()))
        self.t_embed = embedder(EMBEDDING, D, nn.SiLU())
        self.pooled_embed = embedder(cfg.pooled_width, D, nn.SiLU())
        self.text_embed = nn.Linear(cfg.text_width, D)
        self.blocks = nn.ModuleList(Block(cfg, parts) for parts in cfg.block_parts)
        self.final_mod = nn.Linear(D, 2 * D)
        self.final_linear = nn.Linear(D, cfg.patch_size**2 * cfg.out_channels)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The middle of the table of positions: [1, N, D]."""
        P = self.cfg.position_size
        numbers = torch.arange(P * P, device=self.pos_embed.device).view(P, P)
        top, left = ((P - side) // 2 for side in grid)
        return self.pos_embed[:, numbers[top : top + grid[0], left : left + grid[1]].flatten()]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        pooled: Tensor,
        lengths: Tensor | None = None,
        *,
        skip_layers: Sequence[int] = (),
    ) -> Tensor:
        """Predict the velocity: x [B, C, H, W], t [B], text [B, M, width], pooled [B, P] -> x."""
        cfg = self.cfg
        grid = cfg.grid_of(*x.shape[2:])
        embedding = timestep_embedding(t, EMBEDDING).to(self.final_linear.weight.dtype)
        c = F.silu(self.t_embed(embedding) + self.pooled_embed(pooled))  # [B, D]
        h = self.patch_embed(x)
        h, text = (h + self.positions(grid)).to(h.dtype), self.text_embed(text)
        for i, block in enumerate(self.blocks):
            if i not in skip_layers:
                h, text = block(h, text, c, lengths)
        scale, shift = self.final_mod(c).chunk(2, dim=-1)
        h = self.final_linear(layer_norm_modulate(h, scale, shift, FINAL_EPS))
        return unpatchify(h, grid, cfg.patch_size)
