"""The oracle: DiT and its sampling loop in plain PyTorch, in any float dtype up to float64.

Fast paths are tested against this file. It is written to be read beside the paper (Peebles & Xie,
"Scalable Diffusion Models with Transformers", 2023), in its order, and not to be fast.
`fastdit.DiT` shares no module with the model below; in float64 its LayerNorm and attention are the
functions of this file, and tests/test_reference.py holds both to formulas written out there. The
parameters have the same names and are drawn in the same order.

Shapes: B images, N tokens, D hidden, h heads, d head dim, p patch size, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.config import MLP_RATIO, DiTConfig
from fastdit.diffusion import DiffusionScheduler, timestep_embedding
from fastdit.noise import normal
from fastdit.update import Coefficients, Guidance


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


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """`LN(x) * (1 + scale) + shift`: x [B, N, D], scale and shift [B, D] -> [B, N, D]."""
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return (normed * (1 + scale[:, None]) + shift[:, None]).to(scale.dtype)


def gated_residual_layer_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`r = x + gate * y` and `LN(r) * (1 + scale) + shift`: both [B, N, D]."""
    residual = (x + gate[:, None] * y).to(x.dtype)
    return residual, layer_norm_modulate(residual, scale, shift, eps)


def attention(qkv: Tensor, n_heads: int) -> Tensor:
    """Softmax attention without a mask on packed qkv [B, N, 3D] -> [B, N, D]."""
    B, N, D3 = qkv.shape
    d = D3 // (3 * n_heads)
    q, k, v = qkv.view(B, N, 3, n_heads, d).permute(2, 0, 3, 1, 4)  # each [B, h, N, d]
    weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2).reshape(B, N, D3 // 3)


class Attention(nn.Module):
    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.n_heads = cfg.n_heads
        self.qkv = nn.Linear(cfg.hidden, 3 * cfg.hidden)
        self.proj = nn.Linear(cfg.hidden, cfg.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(self.qkv(x), self.n_heads))  # [B, N, D]


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
        self.t_embed = nn.Sequential(
            nn.Linear(cfg.t_embed_width or D, D),
            nn.SiLU() if cfg.t_embed_act == "silu" else nn.GELU(),
            nn.Linear(D, D),
        )
        if cfg.use_class_cond:
            self.y_embed = nn.Embedding(cfg.class_rows, D)
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
                elif name.endswith(".weight") and name != "y_embed.weight":
                    nn.init.xavier_uniform_(p.flatten(1))
            for name, p in self.named_parameters():
                if name in ("t_embed.0.weight", "t_embed.2.weight", "y_embed.weight"):
                    nn.init.normal_(p, std=0.02)
        if cfg.pos_embed == "sincos":
            self.pos_embed.copy_(sincos_pos_embed(cfg.hidden, cfg.grid))
        else:
            nn.init.normal_(self.pos_embed, std=0.02)
        for name, p in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith(("final_mod", "final_linear")):
                nn.init.zeros_(p)

    def conditioning(self, t: Tensor, y: Tensor | None) -> Tensor:
        """The vector that every modulation is made from: t [B], y [B] or None -> [B, D].

        Without labels a model with a null class uses its row, and others add nothing.
        """
        cfg = self.cfg
        embedding = timestep_embedding(
            t, cfg.t_embed_width or cfg.hidden, freq_shift=cfg.t_freq_shift
        )
        c = self.t_embed(embedding.to(self.pos_embed.dtype))
        if y is None and cfg.null_class:
            y = torch.full_like(t, cfg.num_classes, dtype=torch.int64)
        if y is not None and cfg.use_class_cond:
            c = c + self.y_embed(y)
        return F.silu(c) if cfg.modulation_act == "silu" else c

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the noise: x [B, C, H, W], t [B], y [B] or None -> [B, C or 2C, H, W]."""
        cfg = self.cfg
        c = self.conditioning(t, y)
        h = self.patch_embed(x) + self.pos_embed  # [B, N, D]
        for block in self.blocks:
            h = block(h, c)
        scale, shift = self.final_mod(c).chunk(2, dim=-1)
        h = self.final_linear(layer_norm_modulate(h, scale, shift, cfg.ln_eps))
        B, (rows, columns), p, C = len(h), cfg.grid, cfg.patch_size, cfg.out_channels
        image = torch.einsum("nhwpqc->nchpwq", h.view(B, rows, columns, p, p, C))
        return image.reshape(B, C, rows * p, columns * p)


def sampler_update(
    x: Tensor,
    model_out: Tensor,
    coefficients: Tensor,
    step: Tensor,
    x0_prev: Tensor | None = None,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    guidance: Guidance | None = None,
) -> tuple[Tensor, Tensor]:
    """Guidance, one solver step and its noise: as `functional.sampler_update` documents it.

    x [B, P, C] or [B, C, H, W] -> (x_next, x0), both like x.
    """
    dim = 1 if x.dim() == 4 else 2  # of the channels
    B, C = x.shape[0], x.shape[dim]
    wide = torch.promote_types(x.dtype, torch.float32)
    # Selected on the device: indexing by a tensor would wait for its value.
    c = Coefficients(*coefficients.index_select(0, step.reshape(1))[0].to(wide))
    x_t, eps = x.to(wide), model_out.to(wide)
    v = None
    if model_out.shape[dim] == 2 * C:
        eps, v = eps.chunk(2, dim=dim)
    if guidance is not None:
        n = C if guidance.channels is None else guidance.channels
        eps_cond, eps_null = eps[:B], eps[B:]
        guided = eps_null + guidance.scale * (eps_cond - eps_null)
        eps = torch.cat([guided.narrow(dim, 0, n), eps_cond.narrow(dim, n, C - n)], dim=dim)

    x0 = torch.clamp(c.x0_x * x_t + c.x0_eps * eps, -c.x0_limit, c.x0_limit)
    x_next = c.x * x_t + c.eps * eps + c.x0 * x0
    if x0_prev is not None:
        x_next = x_next + c.x0_prev * x0_prev.to(wide)
    if seeds is not None:
        noise = normal(seeds, step.reshape(1) + 1, x.shape[1:].numel())[0].reshape(x.shape)
    if noise is not None:
        sigma = c.sigma
        if v is not None:
            low, high = c.log_sigma_low, c.log_sigma_high
            sigma = torch.exp(low + (v[:B] + 1) / 2 * (high - low))
        x_next = torch.where(c.sigma == 0, x_next, x_next + sigma * noise.to(wide))
    return x_next.to(x.dtype), x0.to(x.dtype)


@torch.no_grad()
def sample(
    model: nn.Module,
    scheduler: DiffusionScheduler,
    x_T: Tensor,
    labels: Tensor | None = None,
    noise: Sequence[Tensor] | Tensor | None = None,
    guidance: Guidance | None = None,
) -> Tensor:
    """Ancestral sampling, line by line as Ho et al. 2020, algorithm 2.

    Where the model returns 2C channels, the variance is the learned one of Nichol & Dhariwal
    2021, equation 15; otherwise it is the posterior's.

    Args:
        model: noise predictor, called as `model(x, t, labels)`; with guidance also as
            `model(x, t, None)`, which must be its prediction without a label.
        scheduler: its tables are used in x_T's dtype.
        x_T: [B, C, H, W] standard normal noise to start from.
        labels: [B] int64, or None.
        noise: T tensors of x_T's shape; the k-th update uses noise[k]. None draws from
            PyTorch's global generator.
        guidance: Ho & Salimans 2022, equation 6.

    Returns:
        [B, C, H, W] in x_T's dtype.
    """
    table = {name: v.to(x_T.device, x_T.dtype) for name, v in scheduler.tables.items()}
    x, C = x_T, x_T.shape[1]
    for k, t in enumerate(reversed(range(scheduler.T))):
        beta, posterior_var = table["betas"][t], table["posterior_var"][t]
        t_B = torch.full((len(x),), t, device=x.device)
        out = model(x, t_B, labels)
        eps, v = out[:, :C], out[:, C:]  # v has C channels, or none
        if guidance is not None and guidance.active(t):
            null = model(x, t_B, None)[:, :C]
            guided = null + guidance.scale * (eps - null)
            n = C if guidance.channels is None else guidance.channels
            eps = torch.cat([guided[:, :n], eps[:, n:]], dim=1)
        variance = posterior_var
        if v.shape[1]:
            share = (v + 1) / 2
            variance = torch.exp(share * beta.log() + (1 - share) * posterior_var.log())
        x = (x - beta / table["sqrt_one_minus_alpha_bars"][t] * eps) / table["alphas"][t].sqrt()
        if t > 0:
            z = torch.randn_like(x) if noise is None else noise[k]
            x = x + variance.sqrt() * z
    return x
