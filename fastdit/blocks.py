"""The parts of `fastdit.DiT`: patch embedding, attention, MLP, block, and the embedders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdit import functional
from fastdit.config import DiTConfig


class PatchEmbed(nn.Module):
    """A linear embedding of patches, in two steps where there is a bottleneck.

    The weights are those of convolutions, as they are published.
    """

    reduce: nn.Conv2d | None

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        p, C, r = cfg.patch_size, cfg.in_channels, cfg.patch_bottleneck
        if r is None:
            self.proj = nn.Conv2d(C, cfg.hidden, kernel_size=p, stride=p)
            self.reduce = None
        else:
            self.reduce = nn.Conv2d(C, r, kernel_size=p, stride=p, bias=False)
            self.proj = nn.Conv2d(r, cfg.hidden, kernel_size=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, p*p*C], as `functional.patchify` lays them out -> [B, N, D]."""
        if self.reduce is not None:
            tokens = F.linear(tokens, by_token(self.reduce.weight))
        return F.linear(tokens, by_token(self.proj.weight), self.proj.bias)


def by_token(weight: Tensor) -> Tensor:
    """Return a convolution's weight [D, C, p, p] as the matrix [D, p*p*C] of a patch's token."""
    return weight.permute(0, 2, 3, 1).flatten(1)


class Norm(nn.Module):
    """A norm with adaLN modulation, alone or with the gated residual before it.

    It is a LayerNorm, or with norm="rms" an RMSNorm with a learned weight.
    """

    def __init__(self, cfg: DiTConfig, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(cfg.hidden)) if cfg.norm == "rms" else None

    def forward(
        self,
        x: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        y: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream `x + gate * y`, or x where there is no y, and its norm.

        Args:
            x: [B, N, D].
            scale: [B, D].
            shift: [B, D], or None.
            y: [B, N, D], the output of the sub-layer before, or None.
            gate: [B, D], beside y.
        """
        eps, weight = self.eps, self.weight
        if y is None or gate is None:
            if weight is None:
                return x, functional.layer_norm_modulate(x, scale, shift, eps)
            return x, functional.rms_norm_modulate(x, scale, shift, weight, eps)
        if weight is None:
            return functional.gated_residual_layer_norm_modulate(x, y, gate, scale, shift, eps)
        return functional.gated_residual_rms_norm_modulate(x, y, gate, scale, shift, weight, eps)

    def extra_repr(self) -> str:
        return f"{'rms' if self.weight is not None else 'layer'}, eps={self.eps}"


class HeadNorm(nn.Module):
    """The learned weights of the norm of each head's queries, or of its keys.

    With a bias the norm is a LayerNorm, without one an RMSNorm.
    """

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(cfg.head_dim))
        biased = cfg.qk_norm == "layer"
        self.bias = nn.Parameter(torch.zeros(cfg.head_dim)) if biased else None


class Attention(nn.Module):
    """Self-attention with one linear for queries, keys and values.

    Queries and keys may have norms, and may be turned by their positions.
    """

    q_norm: HeadNorm | None
    k_norm: HeadNorm | None

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.n_heads, self.eps = cfg.n_heads, cfg.qk_norm_eps
        self.qkv = nn.Linear(cfg.hidden, 3 * cfg.hidden)
        self.q_norm, self.k_norm = None, None
        if cfg.qk_norm != "none":
            self.q_norm, self.k_norm = HeadNorm(cfg), HeadNorm(cfg)
        self.proj = nn.Linear(cfg.hidden, cfg.hidden)

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """[B, N, D], with the rotary table [2, N, d/2] or None -> [B, N, D]."""
        qkv, q, k = self.qkv(x), self.q_norm, self.k_norm
        if q is None or k is None:
            heads = functional.qk_attention(qkv, self.n_heads, rope=rope)
        else:
            weights = q.weight, q.bias, k.weight, k.bias
            heads = functional.qk_attention(qkv, self.n_heads, *weights, rope, self.eps)
        return self.proj(heads)


class Linear(nn.Linear):
    """A linear layer by `functional.linear`, which on a CPU may be faster than PyTorch's."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., M]."""
        return functional.linear(x, self.weight, self.bias)


class MLP(nn.Sequential):
    """Linear, GELU, Linear; at inference `functional.linear_gelu` may fuse the first two."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        # A compiler fuses more where it sees plain ops. A slice of an MLP is an MLP too.
        if torch.compiler.is_compiling() or len(self) != 3:
            return super().forward(x)
        up, gelu, down = self
        if isinstance(up, nn.Linear) and type(up) in (nn.Linear, Linear):
            if type(gelu) is nn.GELU and not _hooked(up, gelu):
                # PyTorch's linears have PyTorch's bits.
                backend = None if type(up) is Linear else "reference"
                given = x, up.weight, up.bias, gelu.approximate
                return down(functional.linear_gelu(*given, backend))
        return super().forward(x)


class SwiGLU(nn.Module):
    """`w3(silu(a) * b)`, with a and b the halves of `w12(x)` (Shazeer 2020, equation 6)."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(cfg.hidden, 2 * cfg.mlp_hidden)
        self.w3 = nn.Linear(cfg.mlp_hidden, cfg.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.w3(functional.swiglu(self.w12(x)))


def make_mlp(cfg: DiTConfig) -> MLP | SwiGLU:
    """Return a block's MLP."""
    if cfg.mlp == "swiglu":
        return SwiGLU(cfg)
    D, width = cfg.hidden, cfg.mlp_hidden
    gelu = nn.GELU(approximate="tanh" if cfg.gelu == "tanh" else "none")
    return MLP(nn.Linear(D, width), gelu, nn.Linear(width, D))


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
    """An adaLN-Zero block, cut so that each residual sum and the norm after it are one op.

    A block begins after its first norm and ends after the first norm of the next block.

    Attributes:
        checkpointing: keep only a block's inputs for the backward pass, which computes the rest
            once more.

    Source: Peebles & Xie 2023, figure 3.
    """

    checkpointing = False

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.norm1 = Norm(cfg, cfg.ln_eps)
        self.attn = Attention(cfg)
        self.norm2 = Norm(cfg, cfg.mlp_ln_eps or cfg.ln_eps)
        self.mlp = make_mlp(cfg)
        self.adaLN_modulation = nn.Linear(cfg.hidden, cfg.block_parts * cfg.hidden)
        if cfg.embedders == "block":
            self.add_embedders(cfg)

    def forward(
        self,
        residual: Tensor,
        h: Tensor,
        modulation: Sequence[Tensor | None],
        following: Norm,
        rope: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            residual: [B, N, D], the residual stream.
            h: [B, N, D], its modulated norm.
            modulation: six of [B, D]: gate1, scale2, shift2 and gate2 of this block, then the
                scale and shift that open the next block or the final layer. Shifts may be None.
            following: the norm that opens the next block or the final layer.
            rope: [2, N, d/2], the rotary table, or None.

        Returns:
            (residual, h) for the next block, [B, N, D] each.
        """
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(
                self._run,
                residual,
                h,
                following,
                rope,
                *modulation,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return self._run(residual, h, following, rope, *modulation)

    def _run(
        self,
        residual: Tensor,
        h: Tensor,
        following: Norm,
        rope: Tensor | None,
        *modulation: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        gate1, scale2, shift2, gate2, next_scale, next_shift = modulation
        residual, h = self.norm2(residual, scale2, shift2, self.attn(h, rope), gate1)
        return following(residual, next_scale, next_shift, self.mlp(h), gate2)


def _hooked(*modules: nn.Module) -> bool:
    """Return whether calling one of the modules does more than its forward."""
    anywhere = nn.modules.module
    if anywhere._global_forward_hooks or anywhere._global_forward_pre_hooks:
        return True
    return any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in modules)
