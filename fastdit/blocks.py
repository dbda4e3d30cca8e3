"""The parts of `fastdit.DiT`: patch embedding, attention, MLP, block, and the embedders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdit import functional
from fastdit.config import MLP_RATIO, DiTConfig


class PatchEmbed(nn.Module):
    """A linear embedding of patches; its weight is that of a convolution, as it is published."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        p = cfg.patch_size
        self.proj = nn.Conv2d(cfg.in_channels, cfg.hidden, kernel_size=p, stride=p)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, p*p*C], as `functional.patchify` lays them out -> [B, N, D]."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # [D, p*p*C]
        return F.linear(tokens, weight, self.proj.bias)


class Attention(nn.Module):
    """Self-attention with one linear for queries, keys and values."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.n_heads = cfg.n_heads
        self.qkv = nn.Linear(cfg.hidden, 3 * cfg.hidden)
        self.proj = nn.Linear(cfg.hidden, cfg.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.proj(functional.attention(self.qkv(x), self.n_heads))


class MLP(nn.Sequential):
    """Linear, GELU, Linear; at inference on CUDA a tanh GELU is fused into the first product."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        # A compiler fuses more where it sees plain ops. A slice of an MLP is an MLP too.
        if torch.compiler.is_compiling() or len(self) != 3:
            return super().forward(x)
        up, gelu, down = self
        if type(up) is nn.Linear and type(gelu) is nn.GELU and not _hooked(up, gelu):
            return down(functional.linear_gelu(x, up.weight, up.bias, gelu.approximate))
        return super().forward(x)


class Conditioned(nn.Module):
    """A module with the embedders of the conditioning: the model, or each of its blocks."""

    t_embed: nn.Sequential
    y_embed: nn.Embedding

    def add_embedders(self, cfg: DiTConfig) -> None:
        """Make the timestep's MLP and, for a class-conditional model, the class embedding."""
        D = cfg.hidden
        act = nn.SiLU() if cfg.t_embed_act == "silu" else nn.GELU()
        self.t_embed = nn.Sequential(nn.Linear(cfg.t_embed_width or D, D), act, nn.Linear(D, D))
        if cfg.use_class_cond:
            self.y_embed = nn.Embedding(cfg.class_rows, D)


class Block(Conditioned):
    """An adaLN-Zero block, cut so that each residual sum and the LayerNorm after it are one op.

    A block begins after its first LayerNorm and ends after the first LayerNorm of the next block.

    Attributes:
        checkpointing: keep only a block's inputs for the backward pass, which computes the rest
            once more.

    Source: Peebles & Xie 2023, figure 3.
    """

    checkpointing = False

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        D = cfg.hidden
        self.eps, self.mlp_eps = cfg.ln_eps, cfg.mlp_ln_eps or cfg.ln_eps
        self.attn = Attention(cfg)
        gelu = nn.GELU(approximate="tanh" if cfg.gelu == "tanh" else "none")
        self.mlp = MLP(nn.Linear(D, MLP_RATIO * D), gelu, nn.Linear(MLP_RATIO * D, D))
        self.adaLN_modulation = nn.Linear(D, 6 * D)
        if cfg.embedders == "block":
            self.add_embedders(cfg)

    def forward(
        self, residual: Tensor, h: Tensor, modulation: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            residual: [B, N, D], the residual stream.
            h: [B, N, D], its modulated LayerNorm.
            modulation: six of [B, D]: gate1, scale2, shift2 and gate2 of this block, then the
                scale and shift that open the next block or the final layer.

        Returns:
            (residual, h) for the next block, [B, N, D] each.
        """
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(
                self._run, residual, h, *modulation, use_reentrant=False, preserve_rng_state=False
            )
        return self._run(residual, h, *modulation)

    def _run(self, residual: Tensor, h: Tensor, *modulation: Tensor) -> tuple[Tensor, Tensor]:
        gate1, scale2, shift2, gate2, next_scale, next_shift = modulation
        residual, h = functional.gated_residual_layer_norm_modulate(
            residual, self.attn(h), gate1, scale2, shift2, self.mlp_eps
        )
        return functional.gated_residual_layer_norm_modulate(
            residual, self.mlp(h), gate2, next_scale, next_shift, self.eps
        )


def _hooked(*modules: nn.Module) -> bool:
    """Return whether calling one of the modules does more than its forward."""
    anywhere = nn.modules.module
    if anywhere._global_forward_hooks or anywhere._global_forward_pre_hooks:
        return True
    return any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in modules)
