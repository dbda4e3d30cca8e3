"""One step of sampling, and the ancestral loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdit.diffusion import DiffusionScheduler
from fastdit.noise import normal
from fastdit.update import Coefficients, Guidance


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
