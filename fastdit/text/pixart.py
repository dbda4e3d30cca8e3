"""`fastdit.PixArt`: PixArt-alpha and PixArt-Sigma, on the fused ops of `fastdit.functional`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit import functional
from fastdit.blocks import Linear
from fastdit.diffusion import timestep_embedding
from fastdit.functional.norms import gated_residual
from fastdit.text.layers import (
    FINAL_EPS,
    T_EMBED_WIDTH,
    PatchEmbed,
    Text,
    TextModel,
    embedder,
    make_mlp,
)
from fastdit.text_config import PixArtConfig, TextConfig


class SelfAttention(nn.Module):
    """Attention among the patches, with one linear for queries, keys and values."""

    def __init__(self, cfg: PixArtConfig) -> None:
        super().__init__()
        D = cfg.hidden
        self.n_heads = cfg.n_heads
        self.qkv = Linear(D, 3 * D, bias=cfg.qkv_bias)
        self.proj = Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.proj(functional.attention(self.qkv(x), self.n_heads))


class CrossAttention(nn.Module):
    """Attention of the patches to a text, whose keys and values are computed once for a loop."""

    def __init__(self, cfg: PixArtConfig) -> None:
        super().__init__()
        D = cfg.hidden
        self.n_heads = cfg.n_heads
        self.q = Linear(D, D, bias=cfg.qkv_bias)
        self.kv = Linear(D if cfg.text_projection else cfg.text_width, 2 * D, bias=cfg.qkv_bias)
        self.proj = Linear(D, D)

    def forward(self, x: Tensor, kv: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, N, D], and of the text [B, M, 2D] and [B] or None -> [B, N, D]."""
        return self.proj(functional.cross_attention(self.q(x), kv, self.n_heads, lengths))


class Block(nn.Module):
    """Self-attention with adaLN modulation, cross-attention without, and a modulated MLP."""

    def __init__(self, cfg: PixArtConfig) -> None:
        super().__init__()
        self.eps = cfg.ln_eps
        self.attn = SelfAttention(cfg)
        self.cross = CrossAttention(cfg)
        self.mlp = make_mlp(cfg, cfg.gelu)

    def forward(
        self, residual: Tensor, h: Tensor, modulation: list[Tensor], text: Text, next_eps: float
    ) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            residual: [B, N, D], the residual stream.
            h: [B, N, D], its modulated norm.
            modulation: seven of [B, D]: gate1, scale2, shift2 and gate2 of this block, the scale
                and shift that open the next block or the final layer, and ones.
            text: keys and values of this block, [B, M, 2D].
            next_eps: epsilon of the norm that opens the next block or the final layer.

        Returns:
            (residual, h) for the next block, [B, N, D] each.
        """
        gate1, scale2, shift2, gate2, next_scale, next_shift, one = modulation
        residual = gated_residual(residual, self.attn(h), gate1)
        # The stream itself asks the text: PixArt has no norm, modulation or gate there.
        found = self.cross(residual, text.tokens, text.lengths)
        fused = functional.gated_residual_layer_norm_modulate
        residual, h = fused(residual, found, one, scale2, shift2, self.eps)
        return fused(residual, self.mlp(h), gate2, next_scale, next_shift, next_eps)


class PixArt(TextModel):
    """PixArt-alpha and PixArt-Sigma: a DiT with cross-attention to a text and one modulation.

        model = fastdit.load("PixArt-XL-2-512x512/transformer")
        out = model(x, t, text)  # x [B, C, H, W], t [B], text [B, M, text_width]

    The timestep makes six parts of modulation for all blocks together, to which each block adds
    parts of its own, "adaLN-single".

    Source: Chen et al. 2023 (PixArt-alpha), section 2.3.
    """

    blocks: list[Block]  # an nn.ModuleList
    # The positions that were asked for last, with their grid and device. They are no buffer, since
    # the size of an image is not the model's, and a copy of the model makes its own.
    _kept: tuple[tuple[int, int], torch.device, Tensor] | None = None

    def __init__(self, **options: Any) -> None:
        """Build a model with fresh weights; `options` are the fields of `fastdit.PixArtConfig`.

        Raises:
            ValueError: an option is unknown, out of range, or contradicts another.
        """
        super().__init__()
        self.cfg = cfg = PixArtConfig.from_dict(options)
        D = cfg.hidden
        self.patch_embed = PatchEmbed(cfg)
        self.t_embed = embedder(T_EMBED_WIDTH, D)
        if cfg.size_conditions:
            self.size_embed = embedder(T_EMBED_WIDTH, D // 3)
            self.ratio_embed = embedder(T_EMBED_WIDTH, D // 3)
        self.modulation = Linear(D, 6 * D)
        if cfg.text_projection:
            self.text_embed = embedder(cfg.text_width, D, nn.GELU(approximate="tanh"))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))  # type: ignore[assignment]
        self.block_tables = nn.Parameter(torch.empty(cfg.n_layers, 6, D))
        self.final_table = nn.Parameter(torch.empty(2, D))
        self.final_linear = Linear(D, cfg.patch_size**2 * cfg.out_channels)
        self._init_weights()

    @staticmethod
    def _takes(cfg: TextConfig) -> bool:
        return isinstance(cfg, PixArtConfig)

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Draw weights as the published code does; what the text adds, and the output, are zero."""
        self._init_linears()
        for table in (self.block_tables, self.final_table):
            nn.init.normal_(table, std=self.cfg.hidden**-0.5)
        for layer in (*(block.cross.proj for block in self.blocks), self.final_linear):
            nn.init.zeros_(layer.weight)

    def encode_text(self, text: Tensor, lengths: Tensor | None = None) -> Text:
        if self.cfg.text_projection:
            text = self.text_embed(text)
        # [R, L, M, 2D]
        return Text(torch.stack([block.cross.kv(text) for block in self.blocks], dim=1), lengths)

    def size_conditioning(self, resolution: Tensor, aspect_ratio: Tensor) -> Tensor:
        """Return what a model with `size_conditions` adds to the timestep's conditioning.

        Args:
            resolution: [R, 2], height and width of the image in pixels.
            aspect_ratio: [R, 1], height over width.

        Returns:
            [R, D].
        """
        parts = []
        for values, layers in ((resolution, self.size_embed), (aspect_ratio, self.ratio_embed)):
            embedding = timestep_embedding(values.flatten(), T_EMBED_WIDTH)
            parts.append(layers(embedding.to(self.block_tables.dtype)).view(len(values), -1))
        return torch.cat(parts, dim=1)

    def modulation_of(self, c: Tensor) -> Tensor:
        return torch.cat([self.modulation(F.silu(c)), c], dim=-1)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the positions of (rows, columns) of patches, [1, N, D] float32.

        They are spread over as many units as the training's grid has rows, and divided by
        `position_scale`.
        """
        device = self.block_tables.device
        if torch.compiler.is_compiling():  # which makes a constant of them
            return self._make_positions(grid, device)
        if self._kept is None or self._kept[:2] != (grid, device):
            made = self._make_positions(grid, device)
            if type(made) is not Tensor:  # that of a mode which computes no values
                return made
            self._kept = grid, device, made
        return self._kept[2]

    def _make_positions(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        cfg = self.cfg
        span = cfg.sample_shape[1] / cfg.patch_size / cfg.position_scale
        return functional.sincos_pos_embed(cfg.hidden, grid, span).to(device, torch.float32)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def denoise(self, tokens: Tensor, modulation: Tensor, text: Text, positions: Tensor) -> Tensor:
        cfg, D = self.cfg, self.cfg.hidden
        x = self.patch_embed(tokens)
        residual = (x + positions).to(x.dtype)  # [B, N, D]
        # Six parts for each block, one op for all of them; and two for the final layer.
        parts = modulation[:, None, : 6 * D].unflatten(-1, (6, D)) + self.block_tables
        by_block = [list(own.unbind(1)) for own in parts.unbind(1)]
        final = (self.final_table + modulation[:, None, 6 * D :]).unbind(1)
        by_block.append(list(final))
        one = final[0].new_ones(D).expand(len(tokens), D)
        scale, shift = by_block[0][:2]
        h = functional.layer_norm_modulate(residual, scale, shift, cfg.ln_eps)
        for i, block in enumerate(self.blocks):
            own = [*by_block[i][2:], *by_block[i + 1][:2], one]
            eps = cfg.ln_eps if i + 1 < cfg.n_layers else FINAL_EPS
            kv = Text(text.tokens[:, i], text.lengths)
            residual, h = block(residual, h, own, kv, eps)
        return self.final_linear(h)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor | Text,
        lengths: Tensor | None = None,
        *,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        """Predict the noise in x.

        Args:
            x: [B, C, H, W] noisy latents in the model's dtype, or any under autocast.
            t: [B] timesteps, as integers or float32.
            text: [B, M, text_width] embeddings of the prompts, in x's dtype; or what `encode_text`
                returned of them, so that a loop computes it once.
            lengths: [B] int64, how many of the M tokens are the prompt's; None for all of them, and
                beside an encoded text, which has its own.
            resolution: [B, 2], height and width of the image in pixels; only for a model with
                `size_conditions`, which needs it.
            aspect_ratio: [B, 1], height over width; likewise.

        Returns:
            [B, C, H, W]; [B, 2C, H, W] with learn_sigma.

        Raises:
            ValueError: a shape or a dtype is wrong; the message names the argument.
        """
        self._check_inputs(x, t)
        B, _, H, W = x.shape
        encoded = self._encoded(text, B, lengths)
        grid = self.cfg.grid_of(H, W)
        sizes = {"resolution": (resolution, 2), "aspect_ratio": (aspect_ratio, 1)}
        for name, (value, width) in sizes.items():
            if (value is not None) != self.cfg.size_conditions:
                expected = f"shape [{B}, {width}]" if value is None else "None"
                because = f"as size_conditions={self.cfg.size_conditions}"
                got = "None" if value is None else "a tensor"
                raise ValueError(f"{name}: expected {expected}, {because}, got {got}")
            if value is not None and value.shape != (B, width):
                raise ValueError(f"{name}: expected shape [{B}, {width}], got {list(value.shape)}")
        c = self.time_conditioning(t)
        if resolution is not None and aspect_ratio is not None:
            c = c + self.size_conditioning(resolution, aspect_ratio)
        tokens = functional.patchify(x, self.cfg.patch_size)
        out = self.denoise(tokens, self.modulation_of(c), encoded, self.positions(grid))
        return functional.unpatchify(out, self.cfg.patch_size, grid)

    def _encoded(self, text: Tensor | Text, B: int, lengths: Tensor | None) -> Text:
        if not isinstance(text, Text):
            self.check_text(text, B, lengths)
            return self.encode_text(text, lengths)
        if lengths is not None:
            raise ValueError("lengths: expected None beside an encoded text, which has its own")
        if len(text.tokens) != B:
            raise ValueError(f"text: expected {B} encoded prompts, got {len(text.tokens)}")
        return text
