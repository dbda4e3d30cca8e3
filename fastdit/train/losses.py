"""The training losses, of a diffusion and of a flow.

That of a diffusion is the noise's squared error, and a variational bound for a learned variance.
That of a flow is the squared error of whatever the model predicts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.diffusion import DiffusionScheduler
from fastdit.flow import FlowMatching


def diffusion_loss(
    model_out: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    eps: Tensor,
    scheduler: DiffusionScheduler,
) -> Tensor:
    """Return the noise's mean squared error, plus the variational bound if a variance is learned.

    The bound, in bits per dimension, is the KL divergence of the model's step from the posterior,
    or at t = 0 the negative log-likelihood of the image's 256 levels. It trains the variance only:
    no gradient reaches the mean through it.

    Args:
        model_out: [B, C, H, W] predicted noise, or [B, 2C, H, W] with the variance's interpolation
            v after it.
        x0: [B, C, H, W] clean images, about -1 to 1.
        x_t: [B, C, H, W] the noisy images that the model saw.
        t: [B] int64 timesteps.
        eps: [B, C, H, W] the noise in x_t.
        scheduler: the diffusion; a learned variance needs at least two steps.

    Returns:
        [] the mean over the batch; the bound is computed in at least float32.

    Raises:
        ValueError: the variance is learned, and the diffusion has one step only.

    Source: Ho et al. 2020, equations 7, 13 and 14; Nichol & Dhariwal 2021, equation 15 and section
    3.1, with weight 1 for the bound, as in DiT's code.
    """
    C = x0.shape[1]
    predicted, v = model_out[:, :C], model_out[:, C:]
    loss = F.mse_loss(predicted, eps)
    if not v.shape[1]:
        return loss
    if scheduler.T < 2:
        raise ValueError(f"scheduler: a learned variance needs T of 2 or more, got {scheduler.T}")
    wide = torch.promote_types(x0.dtype, torch.float32)
    predicted, v, x0, x_t = (part.to(wide) for part in (predicted, v, x0, x_t))
    return loss + _bound(predicted.detach(), v, x0, x_t, t, scheduler).mean()


def flow_loss(
    model_out: Tensor,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    flow: FlowMatching,
    direction: float = 0.0,
) -> Tensor:
    """Return the weighted squared error of what a model predicts on a flow.

    Args:
        model_out: [B, C, H, W] what the flow's model predicts, or [B, 2C, H, W], of which the first
            C channels are the prediction and the others are not trained.
        x0: [B, C, H, W] clean images.
        t: [B] float times, within the flow's `training_span`.
        eps: [B, C, H, W] standard normal noise.
        flow: the flow, whose `target` and `loss_weight` are meant.
        direction: weight of `1 - cos`, with the cosine of predicted and true velocity over the
            channels; the flow must predict velocities.

    Returns:
        [] the mean over the batch.

    Source: Ma et al. 2024 (SiT), equations 4 and 5, and their code, without weighting; Li & He 2025
    (JiT), equation 6, for images with `min_noise`; Yao et al. 2025 (LightningDiT) for the
    direction.
    """
    predicted, target = model_out[:, : x0.shape[1]], flow.target(x0, eps, t)
    target = target.to(predicted.dtype)
    weight = flow.loss_weight(t).to(predicted.dtype)
    loss = (weight * ((predicted - target) ** 2).flatten(1).mean(1)).mean()
    if direction:
        loss = loss + direction * (1 - F.cosine_similarity(predicted, target, dim=1)).mean()
    return loss


def _bound(
    eps: Tensor, v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, scheduler: DiffusionScheduler
) -> Tensor:
    """Return the variational bound of each image: [B], in bits per dimension."""

    def at(name: str, steps: Tensor = t) -> Tensor:
        return scheduler.gather(name, steps, x0.dtype)[:, None, None, None]

    beta, noise = at("betas"), at("sqrt_one_minus_alpha_bars")
    predicted_x0 = (x_t - noise * eps) / at("sqrt_alpha_bars")
    # Equation 7. 1 - alpha_bar is taken as noise^2, and 1 - alpha_bar_prev from the posterior's
    # variance, since the subtractions would cancel where alpha_bar is near 1.
    of_x0 = at("alpha_bars_prev").sqrt() * beta / noise**2
    of_x = at("alphas").sqrt() * at("posterior_var") / beta
    mean = of_x0 * predicted_x0 + of_x * x_t
    true_mean = of_x0 * x0 + of_x * x_t

    low = at("posterior_var", t.clamp(min=1)).log()  # it is 0 at t = 0
    log_variance = low + (v + 1) / 2 * (beta.log() - low)
    # One expression: autograd adds up log_variance's gradients in the order of its terms.
    divergence = 0.5 * (
        log_variance
        - low
        - 1
        + (low - log_variance).exp()
        + (true_mean - mean) ** 2 * (-log_variance).exp()
    )
    likelihood = _log_likelihood(x0, mean, log_variance / 2)
    bits = torch.where(t[:, None, None, None] == 0, -likelihood, divergence) / math.log(2)
    return bits.flatten(1).mean(1)


def _log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log-likelihood of 8-bit levels in [-1, 1]; the outermost bins are unbounded."""
    half_level = 1 / 255
    above = _cdf((x - mean + half_level) * (-log_scale).exp())
    below = _cdf((x - mean - half_level) * (-log_scale).exp())
    inside = torch.where(x > 0.999, 1 - below, above - below)
    return torch.where(x < -0.999, above, inside).clamp(min=1e-12).log()


def _cdf(x: Tensor) -> Tensor:
    """Return the normal's CDF, by the approximation that the published code trains with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
