"""PixArt-alpha and PixArt-Sigma in the order of the paper (Chen et al. 2023, section 2.3).

Parameters have the names of `fastdit.PixArt`'s.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.diffusion import timestep_embedding
from fastdit.reference.ops import attention, cross_attention, layer_norm_modulate
from fastdit.reference.text import (
    EMBEDDING,
    FINAL_EPS,
    PatchEmbed,
    embedder,
    positions,
    unpatchify,
)
from fastdit.text_config import PixArtConfig


class SelfAttention(nn.Module):
    def __init__(self, cfg: PixArtConfig) -> None:
        super().__init__()
        D = cfg.hidden
        self.n_heads = cfg.n_heads
        self.qkv = nn.Linear(D, 3 * D, bias=cfg.qkv_bias)
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(self.qkv(x), self.n_heads))  # [B, N, D]


class CrossAttention(nn.Module):
    """The image's queries, and the keys and values of a text."""

    def __init__(self, cfg: PixArtConfig) -> None:
        super().__init__()
        D = cfg.hidden
        self.n_heads = cfg.n_heads
        self.q = nn.Linear(D, D, bias=cfg.qkv_bias)
        self.kv = nn.Linear(D if cfg.text_projection else cfg.text_width, 2 * D, bias=cfg.qkv_bias)
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor, text: Tensor, lengths: Tensor | None) -> Tensor:
        found = cross_attention(self.q(x), self.kv(text), self.n_heads, lengths)
        return self.proj(found)  # [B, N, D]


class Block(nn.Module):
    """Figure 4: self-attention and MLP are modulated, and cross-attention stands between them."""

    def __init__(self, cfg: PixArtConfig) -> None:
        super().__init__()
        D = cfg.hidden
        self.eps = cfg.ln_eps
        self.attn = SelfAttention(cfg)
        self.cross = CrossAttention(cfg)
        self.mlp = nn.Sequential(
            nn.Linear(D, cfg.mlp_hidden),
            nn.GELU(approximate="tanh" if cfg.gelu == "tanh" else "none"),
            nn.Linear(cfg.mlp_hidden, D),
        )

    def forward(
        self, x: Tensor, modulation: Tensor, text: Tensor, lengths: Tensor | None
    ) -> Tensor:
        """x [B, N, D], modulation [B, 6, D], text [B, M, width] -> [B, N, D]."""
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation.unbind(1)  # each [B, D]
        x = x + gate1[:, None] * self.attn(layer_norm_modulate(x, scale1, shift1, self.eps))
        x = x + self.cross(x, text, lengths)
        x = x + gate2[:, None] * self.mlp(layer_norm_modulate(x, scale2, shift2, self.eps))
        return x


class PixArt(nn.Module):
    """The plain model; its arguments are the fields of `PixArtConfig`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.cfg = cfg = PixArtConfig(**options)
        D = cfg.hidden
        self.patch_embed = PatchEmbed(cfg)
        self.t_embed = embedder(EMBEDDING, D, nn.SiLU())
        if cfg.size_conditions:
            self.size_embed = embedder(EMBEDDING, D // 3, nn.SiLU())
            self.ratio_embed = embedder(EMBEDDING, D // 3, nn.SiLU())
        self.modulation = nn.Linear(D, 6 * D)
        if cfg.text_projection:
            self.text_embed = embedder(cfg.text_width, D, nn.GELU(approximate="tanh"))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.block_tables = nn.Parameter(torch.randn(cfg.n_layers, 6, D) * D**-0.5)
        self.final_table = nn.Parameter(torch.randn(2, D) * D**-0.5)
        self.final_linear = nn.Linear(D, cfg.patch_size**2 * cfg.out_channels)

    def size_conditioning(self, resolution: Tensor, aspect_ratio: Tensor) -> Tensor:
        """The embedded height, width and aspect ratio, side by side: [B, D]."""
        dtype = self.block_tables.dtype
        height, width = (
            self.size_embed(timestep_embedding(side, EMBEDDING).to(dtype))
            for side in resolution.unbind(1)
        )
        ratio = self.ratio_embed(timestep_embedding(aspect_ratio[:, 0], EMBEDDING).to(dtype))
        return torch.cat([height, width, ratio], dim=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        lengths: Tensor | None = None,
        *,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        """Predict the noise: x [B, C, H, W], t [B], text [B, M, width] -> [B, C or 2C, H, W]."""
        cfg = self.cfg
        grid = cfg.grid_of(*x.shape[2:])
        c = self.t_embed(timestep_embedding(t, EMBEDDING).to(self.block_tables.dtype))  # [B, D]
        if resolution is not None and aspect_ratio is not None:
            c = c + self.size_conditioning(resolution, aspect_ratio)
        # adaLN-single: one linear for all blocks, and parameters of each block's own
        shared = self.modulation(F.silu(c)).unflatten(1, (6, cfg.hidden))
        text = self.text_embed(text) if cfg.text_projection else text
        base = cfg.sample_shape[1] / cfg.patch_size / cfg.position_scale
        h = self.patch_embed(x)
        h = (h + positions(cfg.hidden, grid, base).to(h.device, torch.float32)).to(h.dtype)
        for block, own in zip(self.blocks, self.block_tables, strict=True):
            h = block(h, shared + own, text, lengths)
        scale, shift = (self.final_table + c[:, None]).unbind(1)
        h = self.final_linear(layer_norm_modulate(h, scale, shift, FINAL_EPS))
        return unpatchify(h, grid, cfg.patch_size)
