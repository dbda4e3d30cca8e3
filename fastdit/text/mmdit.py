"""`fastdit.MMDiT`: the transformer of Stable Diffusion 3 and 3.5, on fastdit's fused ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit import functional
from fastdit.blocks import Linear
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
from fastdit.text_config import MMDiTConfig, TextConfig

_EPS = 1e-6  # of all norms


class Attention(nn.Module):
    """The linears and norms of one stream's attention; the products are joint, or its own."""

    def __init__(self, cfg: MMDiTConfig, ends: bool = False) -> None:
        """With `ends` the stream ends here, and nothing comes back to it."""
        super().__init__()
        D = cfg.hidden
        self.qkv = Linear(D, 3 * D)
        self.q_norm, self.k_norm = None, None
        if cfg.qk_norm == "rms":
            self.q_norm = nn.RMSNorm(cfg.head_dim, _EPS)
            self.k_norm = nn.RMSNorm(cfg.head_dim, _EPS)
        self.proj = None if ends else Linear(D, D)

    @property
    def norms(self) -> tuple[Tensor | None, Tensor | None]:
        """Weights [d] of the norms of queries and of keys, or None."""
        if self.q_norm is None or self.k_norm is None:
            return None, None
        return self.q_norm.weight, self.k_norm.weight


class Stream(nn.Module):
    """One of a block's two streams, the image's or the text's."""

    def __init__(self, cfg: MMDiTConfig, parts: int) -> None:
        super().__init__()
        ends = parts == 2
        self.modulation = Linear(cfg.hidden, parts * cfg.hidden)
        self.attn = Attention(cfg, ends)
        self.dual = Attention(cfg) if parts == 9 else None
        self.mlp = None if ends else make_mlp(cfg)

    def advance(
        self, residual: Tensor, found: Tensor, modulation: Sequence[Tensor], n_heads: int
    ) -> tuple[Tensor, Tensor]:
        """Take what attention found into the stream, and run the MLP.

        Args:
            residual: [B, N, D], the stream.
            found: [B, N, D], what attention returned.
            modulation: gate1, scale2, shift2, gate2, in a stream with a second attention its scale,
                shift and gate, and the scale and shift that open the next block: [B, D] each.
            n_heads: of the second attention.

        Returns:
            (residual, h) for the next block, [B, N, D] each.
        """
        assert self.attn.proj is not None and self.mlp is not None
        fused = functional.gated_residual_layer_norm_modulate
        gate, scale2, shift2, gate2, *dual, next_scale, next_shift = modulation
        y = self.attn.proj(found)
        if self.dual is not None and self.dual.proj is not None:
            scale3, shift3, gate3 = dual
            h = functional.layer_norm_modulate(residual, scale3, shift3, _EPS)
            q_weight, k_weight = self.dual.norms
            own = functional.qk_attention(
                self.dual.qkv(h), n_heads, q_weight, None, k_weight, None, None, _EPS
            )
            residual = gated_residual(residual, y, gate)
            y, gate = self.dual.proj(own), gate3
        residual, h = fused(residual, y, gate, scale2, shift2, _EPS)
        return fused(residual, self.mlp(h), gate2, next_scale, next_shift, _EPS)


class Block(nn.Module):
    """A block of both streams, which attend to each other and to themselves at once."""

    def __init__(self, cfg: MMDiTConfig, parts: tuple[int, int]) -> None:
        super().__init__()
        self.n_heads = cfg.n_heads
        self.image, self.text = Stream(cfg, parts[0]), Stream(cfg, parts[1])

    def forward(
        self,
        image: tuple[Tensor, Tensor],
        text: tuple[Tensor, Tensor],
        modulation: Sequence[Sequence[Tensor]],
        lengths: Tensor | None,
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Run the block.

        Args:
            image: (residual, h), the image's stream and its modulated norm, [B, N, D] each.
            text: the same of the text's stream, [B, M, D] each.
            modulation: of both streams, as `Stream.advance` takes it; none for a text that ends.
            lengths: [B], how many of the M tokens are the prompt's; None for all of them.

        Returns:
            (image, text) for the next block; the text that ends as it was.
        """
        attn, of_text = self.image.attn, self.text.attn
        found, found_text = functional.joint_attention(
            attn.qkv(image[1]),
            of_text.qkv(text[1]),
            self.n_heads,
            (*attn.norms, *of_text.norms),
            lengths,
            _EPS,
        )
        image = self.image.advance(image[0], found, modulation[0], self.n_heads)
        if modulation[1]:
            text = self.text.advance(text[0], found_text, modulation[1], self.n_heads)
        return image, text


class MMDiT(TextModel):
    """The transformer of Stable Diffusion 3 and 3.5: two streams with joint attention.

        model = fastdit.load("stable-diffusion-3-medium-diffusers/transformer")
        velocity = model(x, t, text, pooled)

    Source: Esser et al. 2024 (Stable Diffusion 3), section 4 and figure 2.
    """

    blocks: list[Block]  # an nn.ModuleList
    pos_embed: Tensor

    def __init__(self, **options: Any) -> None:
        """Build a model with fresh weights; `options` are the fields of `fastdit.MMDiTConfig`.

        Raises:
            ValueError: an option is unknown, out of range, or contradicts another.
        """
        super().__init__()
        self.cfg = cfg = MMDiTConfig.from_dict(options)
        D, P = cfg.hidden, cfg.position_size
        self.patch_embed = PatchEmbed(cfg)
        self.register_buffer("pos_embed", torch.empty(1, P * P, D))
        self.t_embed = embedder(T_EMBED_WIDTH, D)
        self.pooled_embed = embedder(cfg.pooled_width, D)
        self.text_embed = Linear(cfg.text_width, D)
        made = [Block(cfg, parts) for parts in cfg.block_parts]
        self.blocks = nn.ModuleList(made)  # type: ignore[assignment]
        self.final_mod = Linear(D, 2 * D)
        self.final_linear = Linear(D, cfg.patch_size**2 * cfg.out_channels)
        self._init_weights()

    @staticmethod
    def _takes(cfg: TextConfig) -> bool:
        return isinstance(cfg, MMDiTConfig)

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Draw weights as the published DiT does; modulation and the final layer start at zero."""
        cfg, P = self.cfg, self.cfg.position_size
        self._init_linears()
        # By column and by row: all of it in float64 would take gigabytes beside a large model.
        base, half = cfg.sample_shape[1] // cfg.patch_size, cfg.hidden // 2
        axis = functional.sincos_pos_embed(cfg.hidden, (P, 1), base)[0, :, half:]
        table = self.pos_embed.view(P, P, 2, half)
        table[:, :, 0], table[:, :, 1] = axis, axis[:, None]
        for layer in (*self.modulation_layers(), self.final_linear):
            nn.init.zeros_(layer.weight)

    def modulation_layers(self) -> list[Linear]:
        """Return the linears that make modulation: image's and text's of each block; the final."""
        of_blocks = [s.modulation for block in self.blocks for s in (block.image, block.text)]
        return [*of_blocks, self.final_mod]

    def encode_text(self, text: Tensor, lengths: Tensor | None = None) -> Text:
        return Text(self.text_embed(text), lengths)

    def pooled_conditioning(self, pooled: Tensor) -> Tensor:
        """Return the pooled text's part of the conditioning: [R, pooled_width] -> [R, D]."""
        return self.pooled_embed(pooled)

    def modulation_of(self, c: Tensor) -> Tensor:
        c = F.silu(c)
        return torch.cat([layer(c) for layer in self.modulation_layers()], dim=-1)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the middle of the table of positions for (rows, columns) of patches: [1, N, D]."""
        P = self.cfg.position_size
        top, left = ((P - side) // 2 for side in grid)
        table = self.pos_embed.view(P, P, -1)
        return table[top : top + grid[0], left : left + grid[1]].reshape(1, grid[0] * grid[1], -1)

    def denoise(
        self,
        tokens: Tensor,
        modulation: Tensor,
        text: Text,
        positions: Tensor,
        skip_layers: Sequence[int] = (),
    ) -> Tensor:
        """Predict the velocity as `TextModel.denoise` says, without the blocks `skip_layers`."""
        cfg = self.cfg
        x = self.patch_embed(tokens)
        residual = (x + positions).to(x.dtype)  # [B, N, D]
        parts = iter(modulation.split(cfg.hidden, dim=-1))
        by_block = [
            ([next(parts) for _ in range(of_image)], [next(parts) for _ in range(of_text)])
            for of_image, of_text in cfg.block_parts
        ]
        run = [i for i in range(cfg.n_layers) if i not in skip_layers]
        images = [*(by_block[i][0] for i in run), list(parts)]  # the final layer's last
        texts = [by_block[i][1] for i in run]
        norm = functional.layer_norm_modulate
        image = residual, norm(residual, images[0][0], images[0][1], FINAL_EPS)
        if run:
            context = text.tokens, norm(text.tokens, texts[0][0], texts[0][1], _EPS)
        for j, i in enumerate(run):
            own, rest = [*images[j][2:], *images[j + 1][:2]], []
            if j + 1 < len(run):
                rest = [*texts[j][2:], *texts[j + 1][:2]]
            image, context = self.blocks[i](image, context, (own, rest), text.lengths)
        return self.final_linear(image[1])

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        pooled: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        skip_layers: Sequence[int] = (),
    ) -> Tensor:
        """Predict the velocity at x, noise less data.

        Args:
            x: [B, C, H, W] noisy latents in the model's dtype, or any under autocast.
            t: [B] times from 1000 (noise) to 0 (data), float32 or integers.
            text: [B, M, text_width] embeddings of the prompts, in x's dtype.
            pooled: [B, pooled_width], the pooled embeddings, in x's dtype; it cannot do without.
            lengths: [B] int64, how many of the M tokens are the prompt's; None for all of them, as
                Stable Diffusion 3 takes its padding.
            skip_layers: numbers of blocks to leave out, as skip-layer guidance does.

        Returns:
            [B, C, H, W].

        Raises:
            ValueError: a shape or a dtype is wrong; the message names the argument.
        """
        self._check_inputs(x, t)
        B, _, H, W = x.shape
        self.check_text(text, B, lengths)
        if not isinstance(pooled, Tensor) or pooled.shape != (B, self.cfg.pooled_width):
            expected = f"shape [{B}, {self.cfg.pooled_width}], a prompt an image"
            got = list(pooled.shape) if isinstance(pooled, Tensor) else pooled
            raise ValueError(f"pooled: expected {expected}, got {got}")
        self._check_dtype("pooled", pooled)
        known = range(self.cfg.n_layers)
        if not isinstance(skip_layers, Sequence) or any(i not in known for i in skip_layers):
            expected = f"numbers of blocks, 0 to {self.cfg.n_layers - 1}"
            raise ValueError(f"skip_layers: expected {expected}, got {skip_layers!r}")
        grid = self.cfg.grid_of(H, W)
        c = self.time_conditioning(t) + self.pooled_conditioning(pooled)
        tokens = functional.patchify(x, self.cfg.patch_size)
        given = tokens, self.modulation_of(c), self.encode_text(text, lengths), self.positions(grid)
        return functional.unpatchify(self.denoise(*given, skip_layers), self.cfg.patch_size, grid)
