"""The oracle: DiT and its ops in plain PyTorch, in any float dtype up to float64, nothing fused.

Every fast path in fastdit is tested against this file. It is written to be read beside the
paper (Peebles & Xie, "Scalable Diffusion Models with Transformers", 2023), not to be fast.

Shapes: B images, N tokens, D hidden, h heads, d head dim, p patch size, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.config import MLP_RATIO, PRESETS, DiTConfig
from fastdit.diffusion import DiffusionScheduler, timestep_embedding
from fastdit.errors import unknown_name
from fastdit.noise import normal
from fastdit.packed import PackedDiT

if TYPE_CHECKING:
    from typing_extensions import Self


def patchify(x: Tensor, p: int) -> Tensor:
    """[B, C, h*p, w*p] images -> [B, h*w, p*p*C] tokens, the channel fastest."""
    B, C, H, W = x.shape
    x = x.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)  # [B, h, w, p, p, C]
    return x.reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(x: Tensor, p: int) -> Tensor:
    """[B, N, p*p*C] tokens of a square image -> [B, C, H, W]; the inverse of patchify."""
    B, N, F_ = x.shape
    h = int(N**0.5)
    C = F_ // (p * p)
    x = x.view(B, h, h, p, p, C).permute(0, 5, 1, 3, 2, 4)  # [B, C, h, p, w, p]
    return x.reshape(B, C, h * p, h * p)


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
    """Softmax attention without mask on packed qkv [B, N, 3D] -> [B, N, D]."""
    B, N, D3 = qkv.shape
    d = D3 // (3 * n_heads)
    q, k, v = qkv.view(B, N, 3, n_heads, d).permute(2, 0, 3, 1, 4)  # each [B, h, N, d]
    weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2).reshape(B, N, D3 // 3)


class Coefficients(NamedTuple):
    """One step of a solver as `sampler_update` takes it: its columns, in order."""

    x0_x: Tensor  # x0 = clamp(x0_x * x + x0_eps * eps, -x0_limit, x0_limit)
    x0_eps: Tensor
    x0_limit: Tensor  # inf: no clipping
    x: Tensor  # x_next = x * x + eps * eps + x0 * x0 + x0_prev * x0_prev + sigma * z
    eps: Tensor
    x0: Tensor
    x0_prev: Tensor
    sigma: Tensor  # 0: nothing is added for z, and the next two are not used
    log_sigma_low: Tensor  # learned range: sigma where v = -1
    log_sigma_high: Tensor  # and where v = 1


COEFFICIENTS = Coefficients._fields


class _Guidance(Protocol):
    """`fastdit.solvers.Guidance`, which this file may not import."""

    @property
    def scale(self) -> float: ...

    @property
    def channels(self) -> int | None: ...

    def active(self, t: int) -> bool: ...


def sampler_update(
    x: Tensor,
    model_out: Tensor,
    coefficients: Tensor,
    step: Tensor,
    x0_prev: Tensor | None = None,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    guidance: _Guidance | None = None,
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


class Modulation(NamedTuple):
    """The modulation of K steps of a loop: at step k that of image i is

    `by_step[k, 0] + by_label[rows[i]]`, or without by_label `by_step[k, rows[i]]`; laid out as
    `fastdit.DiT.modulation` says.
    """

    by_step: Tensor  # [K, 1 or R, (6 n_layers + 2) D]
    by_label: Tensor | None  # [R, (6 n_layers + 2) D]
    rows: Tensor  # [B] int64, or with guidance 2B: the null label's last

    def at(self, k: int) -> Tensor:
        """[B or 2B, (6 n_layers + 2) D]."""
        table = self.by_step[k] if self.by_label is None else self.by_step[k] + self.by_label
        return table.index_select(0, self.rows)


def denoise(packed: PackedDiT, tokens: Tensor, modulation: Tensor) -> Tensor:
    """`fastdit.DiT.denoise` of packed weights: tokens [B, N, F] -> [B, N, F or 2F]."""
    cfg, parts = packed.cfg, packed.parts()
    m = modulation.split(cfg.hidden, dim=-1)  # each [B, D]
    h = F.linear(tokens, parts.embed) + parts.position
    for i, layer in enumerate(parts.layers):
        scale1, shift1, gate1, scale2, shift2, gate2 = m[6 * i : 6 * i + 6]
        qkv = F.linear(
            layer_norm_modulate(h, scale1, shift1, cfg.ln_eps), layer.qkv, layer.qkv_bias
        )
        y = F.linear(attention(qkv, cfg.n_heads), layer.proj, layer.proj_bias)
        h = h + gate1[:, None] * y
        y = layer_norm_modulate(h, scale2, shift2, cfg.mlp_ln_eps or cfg.ln_eps)
        y = F.gelu(
            F.linear(y, layer.fc1, layer.fc1_bias),
            approximate="tanh" if cfg.gelu == "tanh" else "none",
        )
        h = h + gate2[:, None] * F.linear(y, layer.fc2, layer.fc2_bias)
    h = layer_norm_modulate(h, m[-2], m[-1], cfg.ln_eps)
    return F.linear(h, parts.final, parts.final_bias)


def trajectory(
    x: Tensor,
    x0: Tensor,
    packed: PackedDiT,
    modulation: Modulation,
    coefficients: Tensor,
    first: int = 0,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    guidance: _Guidance | None = None,
) -> tuple[Tensor, Tensor]:
    """K steps of a sampling loop: as `functional.trajectory` documents it.

    x, x0 [B, P, C] -> (x, x0) after the last step.
    """
    B = len(x)
    for k in range(len(coefficients)):
        m = modulation.at(k)
        tokens = x.to(packed.weights.dtype).view(B, packed.cfg.n_tokens, -1)
        if guidance is not None:
            tokens = torch.cat([tokens, tokens])
        out = denoise(packed, tokens, m).view(len(tokens), x.shape[1], -1)
        z = None if noise is None else noise[k]
        if seeds is not None:
            step = torch.tensor([first + k + 1], device=x.device)
            z = normal(seeds, step, x.shape[1:].numel())[0].view(x.shape)
        row = torch.tensor(k, device=x.device)
        x, x0 = sampler_update(x, out, coefficients, row, x0, noise=z, guidance=guidance)
    return x, x0


def sincos_pos_embed(hidden: int, grid: int) -> Tensor:
    """Fixed two-dimensional positions, [1, grid*grid, hidden] float64.

    The first half of the channels encodes the column, the second half the row, each as
    `[sin | cos]` of `position / 10000^(i / (hidden / 4))` (MAE and DiT, `pos_embed`).
    """
    omega = 10000.0 ** -(torch.arange(hidden // 4, dtype=torch.float64) / (hidden // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [grid, D/2]
    column = axis[None].expand(grid, -1, -1)
    row = axis[:, None].expand(-1, grid, -1)
    return torch.cat([column, row], dim=-1).reshape(1, grid * grid, hidden)


class PatchEmbed(nn.Module):
    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        p = cfg.patch_size
        self.proj = nn.Conv2d(cfg.in_channels, cfg.hidden, kernel_size=p, stride=p)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # [B, N, D]


class Attention(nn.Module):
    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.n_heads = cfg.n_heads
        self.qkv = nn.Linear(cfg.hidden, 3 * cfg.hidden)
        self.proj = nn.Linear(cfg.hidden, cfg.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(self.qkv(x), self.n_heads))  # [B, N, D]


class Block(nn.Module):
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
    """The plain model. `fastdit.DiT` has its parameters and its numbers, and a faster forward."""

    block_type = Block

    def __init__(
        self,
        img_size: int = 16,
        patch_size: int = 4,
        in_channels: int = 3,
        hidden: int = 64,
        n_layers: int = 4,
        n_heads: int = 4,
        num_classes: int = 16,
        use_class_cond: bool = True,
        **options: Any,
    ) -> None:
        """Build a model with fresh weights; it returns zeros until it is trained.

        Args and `options` are the fields of `DiTConfig`, which documents them.

        Raises:
            ValueError: an option is unknown, out of range, or contradicts another.
        """
        super().__init__()
        self.cfg = cfg = DiTConfig.from_dict(
            dict(
                img_size=img_size,
                patch_size=patch_size,
                in_channels=in_channels,
                hidden=hidden,
                n_layers=n_layers,
                n_heads=n_heads,
                num_classes=num_classes,
                use_class_cond=use_class_cond,
                **options,
            )
        )
        D = cfg.hidden
        t_width = cfg.t_embed_width or D
        self.patch_embed = PatchEmbed(cfg)
        self.pos_embed = nn.Parameter(
            torch.empty(1, cfg.n_tokens, D), requires_grad=cfg.pos_embed == "learned"
        )
        t_act = nn.SiLU() if cfg.t_embed_act == "silu" else nn.GELU()
        self.t_embed = nn.Sequential(nn.Linear(t_width, D), t_act, nn.Linear(D, D))
        if cfg.use_class_cond:
            self.y_embed = nn.Embedding(cfg.class_rows, D)
        blocks = nn.ModuleList(self.block_type(cfg) for _ in range(cfg.n_layers))
        self.blocks: list[Block] = blocks  # type: ignore[assignment]
        self.final_mod = nn.Linear(D, 2 * D)
        self.final_linear = nn.Linear(D, cfg.patch_size**2 * cfg.out_channels)
        self._init_weights()

    @classmethod
    def from_config(cls, cfg: DiTConfig) -> Self:
        return cls(**cfg.to_dict())

    @classmethod
    def from_preset(cls, name: str, image_size: int | None = None) -> Self:
        """A model of a published size with fresh weights.

        Args:
            name: a key of `fastdit.PRESETS`, such as "DiT-XL/2".
            image_size: pixels along a side of the images whose latents, an eighth of that, a
                published model works on; None is 256. "toy" works on pixels.

        Raises:
            ValueError: the name is unknown, or the size is no multiple of 8 and the patches'.
        """
        if name not in PRESETS:
            raise unknown_name("name", name, PRESETS)
        cfg = PRESETS[name]
        if image_size is not None:
            pixels = 8 if cfg.null_class else 1  # to a cell of the latent
            if image_size < 1 or image_size % (pixels * cfg.patch_size):
                raise ValueError(
                    f"image_size: expected a multiple of {pixels * cfg.patch_size}, got "
                    f"{image_size}"
                )
            cfg = replace(cfg, img_size=image_size // pixels)
        return cls.from_config(cfg)

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Positions, the zeros of adaLN-Zero, and where cfg.init says so the published draws."""
        cfg = self.cfg
        if cfg.init == "xavier":
            for module in self.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    nn.init.xavier_uniform_(module.weight.flatten(1))
                    _zero_(module.bias)
            for layer in self.t_embed:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
            if cfg.use_class_cond:
                nn.init.normal_(self.y_embed.weight, std=0.02)
        if cfg.pos_embed == "sincos":
            self.pos_embed.copy_(sincos_pos_embed(cfg.hidden, cfg.grid))
        else:
            nn.init.normal_(self.pos_embed, std=0.02)
        modulations = [block.adaLN_modulation for block in self.blocks]
        for layer in (*modulations, self.final_mod, self.final_linear):
            _zero_(layer.weight, layer.bias)

    def check_inputs(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        """Shapes only: values would cost a device sync, and would not trace."""
        B = x.shape[0] if x.dim() else 0
        C, H, W = self.cfg.sample_shape
        if x.shape != (B, C, H, W):
            raise ValueError(f"x: expected shape [B, {C}, {H}, {W}], got {list(x.shape)}")
        if list(t.shape) != [B]:
            raise ValueError(f"t: expected shape [{B}], one timestep an image, got {list(t.shape)}")
        if y is None:
            return
        if not self.cfg.use_class_cond:
            raise ValueError("y: expected None, since the model has use_class_cond=False")
        if list(y.shape) != [B]:
            raise ValueError(f"y: expected shape [{B}], one label an image, got {list(y.shape)}")

    def time_conditioning(self, t: Tensor) -> Tensor:
        """The timestep's part of the conditioning: t [B] -> [B, D]."""
        first = self.t_embed[0]
        assert isinstance(first, nn.Linear)
        embedding = timestep_embedding(t, first.in_features, freq_shift=self.cfg.t_freq_shift)
        return self.t_embed(embedding.to(first.weight.dtype))

    def label_conditioning(self, y: Tensor | None) -> Tensor | None:
        """The label's part: y [B] -> [B, D]; without labels the null row [D], or None."""
        if y is not None:
            return self.y_embed(y)
        return self.y_embed.weight[self.cfg.num_classes] if self.cfg.null_class else None

    def conditioning(self, t: Tensor, y: Tensor | None) -> Tensor:
        """The vector every modulation is made from: t [B], y [B] or None -> [B, D]."""
        c, of_label = self.time_conditioning(t), self.label_conditioning(y)
        if of_label is not None:
            c = c + of_label
        return F.silu(c) if self.cfg.modulation_act == "silu" else c

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """As `fastdit.DiT.forward`: x [B, C, H, W], t [B], y [B] or None -> [B, C or 2C, H, W]."""
        self.check_inputs(x, t, y)
        c = self.conditioning(t, y)  # [B, D]
        h = self.patch_embed(x) + self.pos_embed  # [B, N, D]
        for block in self.blocks:
            h = block(h, c)
        scale, shift = self.final_mod(c).chunk(2, dim=-1)
        h = self.final_linear(layer_norm_modulate(h, scale, shift, self.cfg.ln_eps))
        return unpatchify(h, self.cfg.patch_size)


def _zero_(*parameters: Tensor | None) -> None:
    for parameter in parameters:
        if parameter is not None:
            nn.init.zeros_(parameter)


@torch.no_grad()
def sample(
    model: nn.Module,
    scheduler: DiffusionScheduler,
    x_T: Tensor,
    labels: Tensor | None = None,
    noise: Sequence[Tensor] | Tensor | None = None,
    guidance: _Guidance | None = None,
) -> Tensor:
    """Ancestral sampling, line by line as Ho et al. 2020, algorithm 2.

    Where the model returns 2C channels, the variance is the learned one of Nichol & Dhariwal
    2021, equation 15; else it is the posterior's.

    Args:
        model: noise predictor, called as `model(x, t, labels)`; with guidance also as
            `model(x, t, None)`, which must be its prediction without a label.
        scheduler: its tables are used in x_T's dtype.
        x_T: [B, C, H, W] standard normal noise to start from.
        labels: [B] int64, or None.
        noise: T tensors of x_T's shape; the k-th update uses noise[k]. None draws from
            PyTorch's global generator.
        guidance: `fastdit.Guidance`: Ho & Salimans 2022, equation 6.

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
