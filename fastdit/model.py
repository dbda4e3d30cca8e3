"""`fastdit.DiT`: the reference's parameters, with a forward made of fused passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdit import functional, reference
from fastdit.config import DiTConfig


class MLP(nn.Sequential):
    """Linear, GELU, Linear; at inference on CUDA a tanh GELU rides in the first product."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        # A compiler fuses more where it sees plain ops; a slice of an MLP is one too.
        if torch.compiler.is_compiling() or len(self) != 3:
            return super().forward(x)
        up, gelu, down = self
        if type(up) is nn.Linear and type(gelu) is nn.GELU and not _hooked(up, gelu):
            return down(functional.linear_gelu(x, up.weight, up.bias, gelu.approximate))
        return super().forward(x)


class Block(reference.Block):
    """A block as it lies between two fused passes.

    Each residual sum is one pass with the LayerNorm that follows it, so that a block begins with
    its first LayerNorm done, and ends with the next block's.

    Attributes:
        checkpointing: under gradient keep a block's inputs alone, and compute all else once more
            in the backward.
    """

    checkpointing = False

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__(cfg)
        self.mlp = MLP(*self.mlp)

    def forward(  # type: ignore[override]
        self, residual: Tensor, h: Tensor, modulation: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """residual and h, its modulated LayerNorm, [B, N, D] each -> the next block's.

        modulation is six of [B, D]: gate1, scale2, shift2 and gate2, then the scale and shift that
        open the next block, or the final layer.
        """
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(
                self._run, residual, h, *modulation, use_reentrant=False, preserve_rng_state=False
            )
        return self._run(residual, h, *modulation)

    def _run(self, residual: Tensor, h: Tensor, *modulation: Tensor) -> tuple[Tensor, Tensor]:
        gate1, scale2, shift2, gate2, next_scale, next_shift = modulation
        h = functional.attention(self.attn.qkv(h), self.attn.n_heads)
        residual, h = functional.gated_residual_layer_norm_modulate(
            residual, self.attn.proj(h), gate1, scale2, shift2, self.mlp_eps
        )
        return functional.gated_residual_layer_norm_modulate(
            residual, self.mlp(h), gate2, next_scale, next_shift, self.eps
        )


class DiT(reference.DiT):
    """Diffusion Transformer with adaLN-Zero conditioning.

    A drop-in for the plain model: same constructor, state dict and numbers. A forward is
    `denoise(patchify(x), modulation(t, y))`: what depends on (t, y) alone stands apart, so that a
    sampler can compute it outside its loop, and every residual sum is fused with the LayerNorm
    that follows it, across the border between blocks too.

        model = DiT(img_size=16, patch_size=4, hidden=64, n_layers=4, n_heads=4)
        eps = model(x, t, y)  # x [B, C, H, W], t [B], y [B] or None
    """

    block_type = Block
    blocks: list[Block]  # type: ignore[assignment]

    def modulation_parts(self, c: Tensor) -> Iterator[Tensor]:
        """Of conditioning c [R, D], layer by layer: [R, 6D] for each block, [R, 2D] for the last.

        A layer is asked for its own when its turn comes, so that a caller can make do with the
        memory of one.
        """
        for block in self.blocks:
            yield block.adaLN_modulation(c)
        yield self.final_mod(c)

    def modulation(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """All that the conditioning contributes to a forward.

        Args:
            t: [B] timesteps.
            y: [B] int64 labels; None for no label.

        Returns:
            [B, (6 n_layers + 2) D], side by side: scale1, shift1, gate1, scale2, shift2, gate2 of
            each block, then scale and shift of the final layer.
        """
        return torch.cat(list(self.modulation_parts(self.conditioning(t, y))), dim=-1)

    def denoise(self, tokens: Tensor, modulation: Tensor) -> Tensor:
        """Predict the noise of patch tokens.

        Args:
            tokens: [B, N, p*p*C], as `reference.patchify` lays them out.
            modulation: [B, (6 n_layers + 2) D], as `modulation` returns it.

        Returns:
            [B, N, p*p*C_out].
        """
        patch = self.patch_embed.proj
        weight = patch.weight.permute(0, 2, 3, 1).flatten(1)  # [D, p*p*C], as the tokens lie
        residual = F.linear(tokens, weight, patch.bias) + self.pos_embed  # [B, N, D]
        parts = modulation.split(self.cfg.hidden, dim=-1)  # each [B, D]
        h = functional.layer_norm_modulate(residual, parts[0], parts[1], self.cfg.ln_eps)
        for i, block in enumerate(self.blocks):
            residual, h = block(residual, h, parts[6 * i + 2 : 6 * i + 8])
        return self.final_linear(h)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the noise in x.

        Args:
            x: [B, C, H, W] noisy images.
            t: [B] timesteps.
            y: [B] int64 class labels; None for no label (the null row where the model has one).

        Returns:
            [B, C, H, W]; [B, 2C, H, W] with learn_sigma.

        Raises:
            ValueError: a shape is wrong, or y is given to a model without class conditioning.
        """
        self.check_inputs(x, t, y)
        p = self.cfg.patch_size
        tokens = self.denoise(reference.patchify(x, p), self.modulation(t, y))
        return reference.unpatchify(tokens, p)


def _hooked(*modules: nn.Module) -> bool:
    """Whether calling one of them does more than its forward."""
    anywhere = nn.modules.module
    if anywhere._global_forward_hooks or anywhere._global_forward_pre_hooks:
        return True
    return any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in modules)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's or a data-parallel wrapper."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrap(model.module)
    # By name: importing the class would import torch._dynamo, a second of start-up.
    if type(model).__name__ == "OptimizedModule":
        return unwrap(model.get_submodule("_orig_mod"))
    return model
