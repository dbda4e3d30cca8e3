"""The update rules of sampling; each reads like its paper's algorithm box."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdit.diffusion import DiffusionScheduler


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: `eps = eps_null + scale * (eps_cond - eps_null)`.

    Attributes:
        scale: 1 is the conditional prediction, 0 the one with the null label.
        channels: how many channels of eps, from the first, are guided (None: all). The other
            channels and a learned variance are the conditional prediction's. Peebles & Xie's
            `forward_with_cfg` guides 3 of the 4 latent channels.

    Source: Ho & Salimans 2022, equation 6, with scale = 1 + w.
    """

    scale: float
    channels: int | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale: expected a finite number, got {self.scale}")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"channels: expected at least 1, or None, got {self.channels}")


class AncestralDDPM:
    """Ancestral sampling over all T steps.

        x_{t-1} = (x_t - beta_t / sqrt(1 - alpha_bar_t) * eps) / sqrt(alpha_t) + sigma_t * z

    with z = 0 at t = 0, and sigma_t^2 = posterior_var_t; or, where the model returns 2C channels,
    learned: `log sigma_t^2` lies between `log posterior_var_t` (last channels at -1) and
    `log beta_t` (at 1).

    Source: Ho et al. 2020, algorithm 2; Nichol & Dhariwal 2021, equation 15.

    Attributes:
        timesteps: the steps in the order they are taken, T - 1 down to 0.
    """

    def __init__(self, scheduler: DiffusionScheduler) -> None:
        table = {name: values.flip(0) for name, values in scheduler.tables.items()}
        eps_weight = table["betas"] / table["sqrt_one_minus_alpha_bars"]
        self.timesteps: list[int] = list(reversed(range(scheduler.T)))
        # Python floats: the coefficients reach the ops unrounded, and without a device transfer.
        self._eps_weight: list[float] = eps_weight.tolist()
        self._x_weight: list[float] = table["alphas"].rsqrt().tolist()
        self._sigma: list[float] = table["posterior_var"].sqrt().tolist()
        self._log_beta: list[float] = table["betas"].log().tolist()

    def step(self, k: int, x: Tensor, model_out: Tensor, z: Tensor) -> Tensor:
        """The k-th update, from 0.

        Args:
            k: index into `timesteps`.
            x: [B, C, H, W], the state at `timesteps[k]`.
            model_out: [B, C, H, W] predicted noise, or [B, 2C, H, W] with the learned variance.
            z: [B, C, H, W] fresh noise.

        Returns:
            [B, C, H, W], the state one step later.
        """
        learned = model_out.shape[1] == 2 * x.shape[1]
        eps, v = model_out.chunk(2, dim=1) if learned else (model_out, None)
        x = torch.add(x, eps, alpha=-self._eps_weight[k]).mul_(self._x_weight[k])
        if self.timesteps[k] == 0:
            return x
        if v is None:
            return x.add_(z, alpha=self._sigma[k])
        low, high = 2 * math.log(self._sigma[k]), self._log_beta[k]
        log_sigma = (v + 1).mul_((high - low) / 4).add_(low / 2)
        return x.addcmul_(log_sigma.exp_(), z)


SOLVERS = {"ddpm": AncestralDDPM}
