"""The diffusion process on the host: noise schedules, their tables, the timestep embedding."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from fastdit.errors import check_range, unknown_name

# A signal of 10% of the noise's amplitude is visible as a shift of brightness and layout; the
# published 1000-step linear schedule ends at 4e-5.
TERMINAL_SNR_LIMIT = 1e-2


class TerminalSNRWarning(UserWarning):
    """The last step still holds signal, while sampling starts from pure noise."""


def timestep_embedding(
    t: Tensor, dim: int, max_period: float = 10000.0, freq_shift: int = 0
) -> Tensor:
    """Sinusoidal embedding of timesteps, `[cos | sin]`, always computed in float32.

    Args:
        t: [B], integer or float timesteps.
        dim: width of the embedding; where odd, the last column is zero.
        max_period: period of the slowest sinusoid, in steps.
        freq_shift: with 1 the slowest is reached exactly, as diffusers has it for DiT.

    Returns:
        [B, dim] float32; with half = dim // 2 column i < half is
        `cos(t * exp(-ln(max_period) * i / (half - freq_shift)))`.

    Source: Nichol & Dhariwal 2021, `timestep_embedding`; DiT follows it.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(max_period) * index / (half - freq_shift))
    angles = t.float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))


def _linear_betas(T: int) -> Tensor:
    """Ho et al. 2020, section 4."""
    return torch.linspace(1e-4, 0.02, T, dtype=torch.float64)


def _linear_scaled_betas(T: int) -> Tensor:
    """The linear betas times 1000/T, so that T steps add as much noise as 1000 would."""
    if T <= 20:  # the last beta would be 20 / T
        raise ValueError(f"T: schedule='linear-scaled' needs more than 20 steps, got {T}")
    return _linear_betas(T) * (1000 / T)


def _cosine_betas(T: int) -> Tensor:
    """Nichol & Dhariwal 2021, equation 17, clipped at 0.999 as published."""
    u = torch.arange(T + 1, dtype=torch.float64) / T
    alpha_bars = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bars[1:] / alpha_bars[:-1]).clamp(max=0.999)


def spaced_timesteps(T: int, steps: int) -> list[int]:
    """Timesteps from 0 to T - 1 at equal distances, rounded, ascending; one step is at 0.

    Source: Nichol & Dhariwal 2021, `space_timesteps` of their code with one section, which DiT's
    samples use ("250").
    """
    _check_steps(T, steps)
    stride = (T - 1) / (steps - 1) if steps > 1 else 1.0
    taken, at = [], 0.0
    for _ in range(steps):  # summed up and rounded half to even, as published
        taken.append(round(at))
        at += stride
    return taken


def strided_timesteps(T: int, steps: int) -> list[int]:
    """Every so-many-th timestep from 0, ascending: T - 1 is not among them.

    Raises:
        ValueError: no stride takes so many steps; the message names numbers near by.

    Source: Song et al. 2021 (DDIM), section 4.2's linear sub-sequence; "ddim50" in the code of
    Nichol & Dhariwal and of DiT.
    """
    _check_steps(T, steps)
    counts = {len(range(0, T, stride)): stride for stride in range(T, 0, -1)}
    if steps not in counts:
        near = sorted(counts, key=lambda n: abs(n - steps))[:2]
        raise ValueError(
            f"steps: no stride takes {steps} of {T} timesteps; the nearest numbers are "
            f"{' and '.join(map(str, sorted(near)))}"
        )
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
    """The tables of a discrete Gaussian diffusion, for any noise predictor.

    Every attribute below is a [T] float32 tensor on `device`, rounded once from float64.

    Attributes:
        T: number of steps.
        betas: variance added at each step.
        alphas: `1 - betas`.
        alpha_bars: cumulative product of alphas.
        alpha_bars_prev: alpha_bars one step earlier, starting with 1.
        sqrt_alpha_bars: the signal's amplitude in x_t.
        sqrt_one_minus_alpha_bars: the noise's amplitude in x_t.
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
            device: where the attributes live.
            schedule: "linear" (betas from 1e-4 to 0.02), "linear-scaled" (those times 1000/T)
                or "cosine".
            prediction: what the model was trained to return: "epsilon" (the noise), "sample" (x0),
                or "v_prediction" (`sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x0`, Salimans &
                Ho 2022).

        Raises:
            ValueError: T is no positive integer, or too small for the schedule; or a name is
                unknown.

        Warns:
            TerminalSNRWarning: x_T keeps signal that sampling will not start with.
        """
        if not isinstance(T, int) or isinstance(T, bool) or T < 1:
            raise ValueError(f"T: expected a positive integer, got {T!r}")
        if schedule not in SCHEDULES:
            raise unknown_name("schedule", schedule, SCHEDULES)
        if prediction not in PREDICTIONS:
            raise unknown_name("prediction", prediction, PREDICTIONS)
        self.T = T
        self.schedule = schedule
        self.prediction = prediction
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
        self._warn_if_signal_remains()

    @property
    def options(self) -> dict[str, int | str]:
        """The arguments that make this diffusion again, on any device."""
        return {"T": self.T, "schedule": self.schedule, "prediction": self.prediction}

    def _warn_if_signal_remains(self) -> None:
        alpha_bar = self.tables["alpha_bars"][-1].item()
        snr = alpha_bar / (1 - alpha_bar)
        if snr > TERMINAL_SNR_LIMIT:
            warnings.warn(
                f"terminal SNR is {snr:.3g} (alpha_bar_T = {alpha_bar:.3g}): at t = T - 1 training "
                f"still shows the model {math.sqrt(alpha_bar):.0%} of the image's amplitude, but "
                "sampling starts from pure noise, so samples drift in brightness and layout; "
                "schedule='linear-scaled' ends near zero",
                TerminalSNRWarning,
                stacklevel=3,
            )

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Noise images to timestep t: `sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps`.

        Args:
            x0: [B, ...] clean images, any float dtype.
            t: [B] integers in [0, T). On an accelerator its range is not read back, since that
                would stall the stream at every training step, nor is it by a compiled call.
            eps: standard normal noise of x0's shape.

        Returns:
            x_t, of x0's shape and dtype.

        Raises:
            ValueError: shapes differ, x0 is no float, or t is no integer or out of range.

        Source: Ho et al. 2020, equation 4.
        """
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
        """Rows t [B] of the table `name` in `dtype`; float64 comes from the float64 table."""
        if dtype == torch.float64:
            return self.tables[name].to(t.device)[t]
        attribute: Tensor = getattr(self, name)
        return attribute[t].to(dtype)
