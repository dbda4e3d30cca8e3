"""The diffusion process: noise schedules and their tables, and the timestep embedding."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastdit.errors import check_positive, check_range, unknown_name, warn

# A signal with 10% of the noise's amplitude visibly shifts brightness and layout; the published
# 1000-step linear schedule ends at 4e-5.
TERMINAL_SNR_LIMIT = 1e-2


class TerminalSNRWarning(UserWarning):
    """The last diffusion step still holds signal, but sampling starts from pure noise."""


def timestep_embedding(
    t: Tensor, dim: int, max_period: float = 10000.0, freq_shift: int = 0
) -> Tensor:
    """Return the sinusoidal embedding `[cos | sin]` of timesteps, always computed in float32.

    Args:
        t: [B], integer or float timesteps.
        dim: width of the embedding; if it is odd, the last column is zero.
        max_period: the lowest frequency approaches 1 / max_period radians per step.
        freq_shift: 0; or 1, as in diffusers' DiT, with which it is 1 / max_period exactly.

    Returns:
        [B, dim] float32. With half = dim // 2, column i < half is
        `cos(t * exp(-ln(max_period) * i / (half - freq_shift)))`.

    Source: Nichol & Dhariwal 2021, `timestep_embedding` of their code, which DiT follows.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(max_period) * index / (half - freq_shift))
    angles = t.float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))


def _linear_betas(T: int) -> Tensor:
    """Return the betas of Ho et al. 2020, section 4."""
    return torch.linspace(1e-4, 0.02, T, dtype=torch.float64)


def _linear_scaled_betas(T: int) -> Tensor:
    """Return the linear betas times 1000/T, so that T steps add as much noise as 1000 would."""
    if T <= 20:  # the last beta would be 20 / T
        raise ValueError(f"T: schedule='linear-scaled' needs more than 20 steps, got {T}")
    return _linear_betas(T) * (1000 / T)


def _cosine_betas(T: int) -> Tensor:
    """Return the betas of Nichol & Dhariwal 2021, equation 17, clipped at 0.999 as published."""
    u = torch.arange(T + 1, dtype=torch.float64) / T
    alpha_bars = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bars[1:] / alpha_bars[:-1]).clamp(max=0.999)


def spaced_timesteps(T: int, steps: int) -> list[int]:
    """Return ascending timesteps from 0 to T - 1 at equal distances, rounded; or [0] if steps is 1.

    Source: Nichol & Dhariwal 2021, `space_timesteps` of their code with one section, as in DiT's
    published samples ("250").
    """
    _check_steps(T, steps)
    stride = (T - 1) / (steps - 1) if steps > 1 else 1.0
    timesteps, at = [], 0.0
    for _ in range(steps):  # summing strides and rounding half to even, as published
        timesteps.append(round(at))
        at += stride
    return timesteps


def strided_timesteps(T: int, steps: int) -> list[int]:
    """Return the multiples of a stride from 0 up, in ascending order.

    Raises:
        ValueError: no stride gives this number of steps; the message names the nearest numbers.

    Source: Song et al. 2021 (DDIM), section 4.2, linear sub-sequence; "ddim50" in the code of
    Nichol & Dhariwal and of DiT.
    """
    _check_steps(T, steps)
    counts = {len(range(0, T, stride)): stride for stride in range(T, 0, -1)}
    if steps not in counts:
        low, high = sorted(sorted(counts, key=lambda n: abs(n - steps))[:2])
        nearest = f"the nearest numbers are {low} and {high}"
        raise ValueError(f"steps: no stride takes {steps} of {T} timesteps; {nearest}")
    return list(range(0, T, counts[steps]))


def _check_steps(T: int, steps: int) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= T:
        raise ValueError(f"steps: expected an integer from 1 to T = {T}, got {steps!r}")


SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "linear": _linear_betas,
    "linear-scaled": _linear_scaled_betas,
    "cosine": _cosine_betas,
}
PREDICTIONS = ("epsilon", "sample", "v_prediction")


class DiffusionScheduler:
    """The tables of a discrete Gaussian diffusion, for any model that predicts noise, x0 or v.

    Every attribute below is a [T] float32 tensor on `device`, rounded once from float64.

    Attributes:
        T: number of steps.
        betas: variance added at each step.
        alphas: `1 - betas`.
        alpha_bars: cumulative product of alphas.
        alpha_bars_prev: alpha_bars one step earlier, starting with 1.
        sqrt_alpha_bars: amplitude of the signal in x_t.
        sqrt_one_minus_alpha_bars: amplitude of the noise in x_t.
        posterior_var: `betas * (1 - alpha_bars_prev) / (1 - alpha_bars)`.

    Source: Ho et al. 2020, equations 4 and 7.
    """

    betas: Tensor
    alphas: Tensor
    alpha_bars: Tensor
    alpha_bars_prev: Tensor
    sqrt_alpha_bars: Tensor
    sqrt_one_minus_alpha_bars: Tensor
    posterior_var: Tensor

    def __init__(
        self,
        T: int = 200,
        device: torch.device | str = "cpu",
        schedule: str = "linear",
        prediction: str = "epsilon",
    ) -> None:
        """Build the tables.

        Args:
            T: number of steps, at least 1.
            device: device of the attributes.
            schedule: "linear" (betas from 1e-4 to 0.02), "linear-scaled" (the same times 1000/T)
                or "cosine".
            prediction: what the model was trained to return: "epsilon" (the noise), "sample" (x0),
                or "v_prediction" (`sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x0`, Salimans &
                Ho 2022).

        Raises:
            ValueError: T is not a positive integer or is too small for the schedule, or a name is
                unknown.
        """
        check_positive("T", T)
        if schedule not in SCHEDULES:
            raise unknown_name("schedule", schedule, SCHEDULES)
        if prediction not in PREDICTIONS:
            raise unknown_name("prediction", prediction, PREDICTIONS)
        self.T, self.schedule, self.prediction = T, schedule, prediction
        self.device = torch.device(device)
        betas = SCHEDULES[schedule](T)
        alphas = 1 - betas
        alpha_bars = alphas.cumprod(0)
        alpha_bars_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars[:-1]])
        self.tables: dict[str, Tensor] = {
            "betas": betas,
            "alphas": alphas,
            "alpha_bars": alpha_bars,
            "alpha_bars_prev": alpha_bars_prev,
            "sqrt_alpha_bars": alpha_bars.sqrt(),
            "sqrt_one_minus_alpha_bars": (1 - alpha_bars).sqrt(),
            "posterior_var": betas * (1 - alpha_bars_prev) / (1 - alpha_bars),
        }  # float64, on the host
        for name, table in self.tables.items():
            setattr(self, name, table.to(self.device, torch.float32))
        self._warned = False

    @property
    def options(self) -> dict[str, int | str]:
        """The arguments that build this diffusion again, on any device."""
        return {"T": self.T, "schedule": self.schedule, "prediction": self.prediction}

    def warn_of_signal(self) -> None:
        """Warn in the first call if x_T keeps signal, which sampling does not start from.

        It concerns those who train a model, and not those who sample one: `q_sample` calls it.
        """
        if self._warned:
            return
        self._warned = True
        left = self.tables["alpha_bars"][-1].item()
        snr = left / (1 - left)
        if snr > TERMINAL_SNR_LIMIT:
            warn(
                f"terminal SNR is {snr:.3g} (alpha_bar_T = {left:.3g}): at t = T - 1 training "
                f"still shows the model {math.sqrt(left):.0%} of the image's amplitude, but "
                "sampling starts from pure noise, so samples drift in brightness and layout; "
                "schedule='linear-scaled' ends near zero",
                TerminalSNRWarning,
            )

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Noise images to timestep t: `sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps`.

        Args:
            x0: [B, ...] clean images, any float dtype.
            t: [B] integers in [0, T). The range is checked on the CPU only, and not in a compiled
                call: on an accelerator the check would stall the stream at every training step.
            eps: standard normal noise of x0's shape.

        Returns:
            x_t, of x0's shape and dtype.

        Raises:
            ValueError: the shapes differ, x0 is not of a float dtype, or t is not of an integer
                dtype or out of range.

        Warns:
            TerminalSNRWarning: in the first call, as `warn_of_signal` does.

        Source: Ho et al. 2020, equation 4.
        """
        if not torch.compiler.is_compiling():
            self.warn_of_signal()
        if not x0.is_floating_point():
            raise ValueError(f"x0: expected a float dtype, got {x0.dtype}")
        if eps.shape != x0.shape:
            raise ValueError(f"eps: expected x0's shape {list(x0.shape)}, got {list(eps.shape)}")
        if t.shape != x0.shape[:1]:
            raise ValueError(f"t: expected shape [{x0.shape[0]}], got {list(t.shape)}")
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise ValueError(f"t: expected integers, got {t.dtype}")
        t = t.long()
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            check_range("t", t, self.T)
        per_image = (-1,) + (1,) * (x0.dim() - 1)
        signal = self.gather("sqrt_alpha_bars", t, x0.dtype).view(per_image)
        noise = self.gather("sqrt_one_minus_alpha_bars", t, x0.dtype).view(per_image)
        return signal * x0 + noise * eps.to(x0.dtype)

    def gather(self, name: str, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Return entries t [B] of the table `name`; all but float64 are rounded from float32."""
        table: Tensor = getattr(self, name)
        return self.tables[name].to(t.device)[t] if dtype == torch.float64 else table[t].to(dtype)
