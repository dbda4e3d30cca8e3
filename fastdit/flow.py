"""Flow matching: a path from noise to data in continuous time, and what a model predicts on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from fastdit.diffusion import DiffusionScheduler
from fastdit.errors import from_options, unknown_name

_CUT = 1e-3  # of time, at an end where a prediction determines no velocity
_VP_TRAINING_CUT = 1e-5
_BETAS = (0.1, 20.0)  # of the "vp" path, at the data and at the noise


class Amplitudes(NamedTuple):
    """The state at some times is `signal * x0 + noise * z`, for standard normal z.

    Each field is float64 and of the times' shape.
    """

    signal: Tensor
    noise: Tensor
    signal_rate: Tensor  # d signal / dt, in the model's own time
    noise_rate: Tensor  # d noise / dt


class Affine(NamedTuple):
    """A quantity as `x * state + out * output of the model`, float64 and of the times' shape."""

    x: Tensor
    out: Tensor


# A path is a function of s, which is 0 at the noise and 1 at the data.


def _linear(s: Tensor) -> Amplitudes:
    one = torch.ones_like(s)
    return Amplitudes(s, 1 - s, one, -one)


def _gvp(s: Tensor) -> Amplitudes:
    quarter = math.pi / 2
    signal, noise = torch.sin(quarter * s), torch.sin(quarter * (1 - s))  # exactly 0 at their ends
    return Amplitudes(signal, noise, quarter * noise, -quarter * signal)


def _vp(s: Tensor) -> Amplitudes:
    low, high = _BETAS
    left = 1 - s
    log_signal = -(left**2) * (high - low) / 4 - left * low / 2
    signal, noise = log_signal.exp(), (-torch.expm1(2 * log_signal)).sqrt()
    signal_rate = signal * (left * (high - low) + low) / 2
    return Amplitudes(signal, noise, signal_rate, -signal * signal_rate / noise)


PATHS: dict[str, Callable[[Tensor], Amplitudes]] = {"linear": _linear, "gvp": _gvp, "vp": _vp}


@dataclass(frozen=True)
class FlowMatching:
    """A path from noise to data in continuous time, for any model that predicts on it.

    With s = 0 at the noise and 1 at the data, the state is `a x0 + b * noise_scale * z` for
    standard normal z:

        "linear":  a = s,             b = 1 - s
        "gvp":     a = sin(pi s / 2), b = cos(pi s / 2)
        "vp":      a = exp(-(1 - s)^2 (20 - 0.1) / 4 - (1 - s) 0.1 / 2),  b = sqrt(1 - a^2)

    Times are the model's own everywhere: t = s, or t = 1 - s with `clean_at=0`.

    Attributes:
        path: "linear", "gvp" or "vp".
        prediction: what the model was trained to return: "velocity" (dx_t/dt in the model's own
            time), "epsilon" (z), "sample" (x0) or "score" (the gradient of the state's log
            density, `-z` over the noise's amplitude).
        clean_at: the model's time at the data: 1 (SiT, LightningDiT, JiT), or 0 (REPA, where the
            noise is at 1).
        time_scale: the timestep embedding gets `t * time_scale`.
        noise_scale: deviation of the noise at the path's noisy end.
        min_noise: only with "sample" on the "linear" path: the least value of 1 - s by which the
            difference of the predicted image and the state is divided where it gives a velocity,
            in loss and in sampling alike. JiT's is 0.05. None does not bound it.

    Raises:
        ValueError: a field is of the wrong kind or out of range; the message names it.

    Source: Ma et al. 2024 (SiT), section 2 and `transport/` of their code; Li & He 2025 (JiT) for
    `noise_scale` and `min_noise`; Yu et al. 2025 (REPA) for `clean_at=0`.
    """

    path: Literal["linear", "gvp", "vp"] = "linear"
    prediction: Literal["velocity", "epsilon", "sample", "score"] = "velocity"
    clean_at: int = 1
    time_scale: float = 1.0
    noise_scale: float = 1.0
    min_noise: float | None = None

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in ("path", "prediction"):
            value, known = getattr(self, name), get_args(hints[name])
            if value not in known:
                raise unknown_name(name, value, known)
        if type(self.clean_at) is not int or self.clean_at not in (0, 1):
            raise ValueError(
                "clean_at: expected the model's time at the data, 1 or 0, got "
                + repr(self.clean_at)
            )
        for name in ("time_scale", "noise_scale"):
            object.__setattr__(self, name, _positive(name, getattr(self, name)))
        if self.min_noise is not None:
            object.__setattr__(self, "min_noise", _positive("min_noise", self.min_noise))
            if self.path != "linear" or self.prediction != "sample":
                raise ValueError(
                    "min_noise: expected None unless path is 'linear' and prediction 'sample', got "
                    f"{self.min_noise} with {self.path!r} and {self.prediction!r}"
                )

    @property
    def options(self) -> dict[str, Any]:
        """The fields, plain values that build this flow again."""
        return asdict(self)

    @property
    def span(self) -> tuple[float, float]:
        """The times between which images are sampled: at the noise, and at the data.

        They are the path's ends, except where the model's prediction gives no velocity there: 1e-3
        of time is left out at both ends with "epsilon", "score" and, without `min_noise`, "sample",
        and at the data's end of the "vp" path.

        Source: `check_interval` of SiT's `transport.py`.
        """
        return self._without(*self._cuts())

    @property
    def training_span(self) -> tuple[float, float]:
        """The same for times that a model is trained at; "vp" goes to 1e-5 from the data.

        Source: `create_transport` of SiT's `transport/__init__.py`.
        """
        first, last = self._cuts()
        return self._without(first, _VP_TRAINING_CUT if self.path == "vp" else last)

    def _cuts(self) -> tuple[float, float]:
        if self.path == "vp":
            return 0.0, _CUT
        bounded = self.prediction == "velocity" or self.min_noise is not None
        return (0.0, 0.0) if bounded else (_CUT, _CUT)

    def _without(self, first: float, last: float) -> tuple[float, float]:
        return (first, 1 - last) if self.clean_at else (1 - first, last)

    def data_time(self, t: Tensor) -> Tensor:
        """Return s of times t, 0 at the noise and 1 at the data: float64, of t's shape."""
        t = t.to(torch.float64)
        return t if self.clean_at else 1 - t

    def scaled(self, t: Tensor) -> Tensor:
        """Return what a model is called with at times t: `t * time_scale`."""
        return t * self.time_scale

    def amplitudes(self, t: Tensor) -> Amplitudes:
        """Return the amplitudes of signal and noise at times t of any shape, and their rates."""
        at = PATHS[self.path](self.data_time(t))
        sign, scale = (1 if self.clean_at else -1), self.noise_scale
        return Amplitudes(
            at.signal, scale * at.noise, sign * at.signal_rate, sign * scale * at.noise_rate
        )

    def denoised_from(self, t: Tensor) -> Affine:
        """Return x0 at times t in terms of the state and of what the model returns.

        With x = a x0 + b z and v = a' x0 + b' z, of which two determine the others.
        """
        a, b, da, db = self.amplitudes(t)
        if self.prediction == "velocity":
            det = a * db - da * b
            return Affine(db / det, -b / det)
        if self.prediction == "epsilon":
            return Affine(1 / a, -b / a)
        if self.prediction == "score":
            return Affine(1 / a, b**2 / a)
        return Affine(torch.zeros_like(a), torch.ones_like(a))

    def velocity_from(self, t: Tensor) -> Affine:
        """Return the velocity at times t in terms of the state and of what the model returns."""
        a, b, da, db = self.amplitudes(t)
        if self.prediction == "velocity":
            return Affine(torch.zeros_like(a), torch.ones_like(a))
        det = a * db - da * b
        if self.prediction == "epsilon":
            return Affine(da / a, det / a)
        if self.prediction == "score":
            return Affine(da / a, -b * det / a)
        if self.min_noise is None:
            return Affine(db / b, -det / b)
        gain = da / (1 - self.data_time(t)).clamp(min=self.min_noise)
        return Affine(-gain, gain)

    def velocity(self, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
        """Return the velocity that a model's output means.

        Args:
            x_t: [B, ...] the state.
            out: like x_t, what the model returned.
            t: [B] float times, within `span`.

        Returns:
            Like out.
        """
        of_x, of_out = (_by_image(c, out) for c in self.velocity_from(t))
        return of_x * x_t.to(out.dtype) + of_out * out

    def interpolate(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return the state at time t.

        Args:
            x0: [B, ...] images, any float dtype.
            t: [B] float32 or float64 times in [0, 1]. The range is checked on the CPU only, and not
                in a compiled call.
            noise: standard normal noise of x0's shape, which is multiplied by `noise_scale` here.

        Returns:
            x_t, of x0's shape and dtype.

        Raises:
            ValueError: the shapes differ, x0 or t is of another dtype, or a time is out of range.
        """
        self._check(x0, t, noise)
        at = self.amplitudes(t)
        return _by_image(at.signal, x0) * x0 + _by_image(at.noise, x0) * noise.to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the model should return at `interpolate(x0, t, noise)`.

        Args:
            x0, noise, t: as `interpolate` takes them, with t within `training_span`.

        Returns:
            Of x0's shape and dtype.

        Raises:
            ValueError: as `interpolate` does.
        """
        self._check(x0, t, noise)
        if self.prediction == "sample":
            return x0
        noise = noise.to(x0.dtype)
        if self.prediction == "epsilon":
            return noise
        at = self.amplitudes(t)
        if self.prediction == "score":
            return -noise / _by_image(at.noise, x0)
        return _by_image(at.signal_rate, x0) * x0 + _by_image(at.noise_rate, x0) * noise

    def loss_weight(self, t: Tensor) -> Tensor:
        """Return what the squared error of a prediction is multiplied by in the loss.

        It is 1, with these exceptions: a score's error is taken times the noise's amplitude, as
        SiT's loss does, and with `min_noise` an image's error is divided by `max(1 - s, min_noise)`
        as it is in the velocity, in which JiT's loss is taken.

        Args:
            t: [B] float times.

        Returns:
            [B] float64.
        """
        if self.prediction == "score":
            return self.amplitudes(t).noise ** 2
        if self.min_noise is not None:
            return self.velocity_from(t).out ** 2
        return torch.ones_like(t, dtype=torch.float64)

    def _check(self, x0: Tensor, t: Tensor, noise: Tensor) -> None:
        if not x0.is_floating_point():
            raise ValueError(f"x0: expected a float dtype, got {x0.dtype}")
        if noise.shape != x0.shape:
            raise ValueError(
                f"noise: expected x0's shape {list(x0.shape)}, got {list(noise.shape)}"
            )
        if t.shape != x0.shape[:1]:
            raise ValueError(f"t: expected shape [{x0.shape[0]}], got {list(t.shape)}")
        if t.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"t: expected times in [0, 1], float32 or float64, got {t.dtype}")
        if t.device.type == "cpu" and not torch.compiler.is_compiling() and t.numel():
            low, high = float(t.min()), float(t.max())
            if not (low >= 0 and high <= 1):
                raise ValueError(f"t: expected times in [0, 1], got {low} to {high}")


def _positive(name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        converted = float(value) if number else math.nan
    except OverflowError:  # of an integer
        converted = math.inf
    if not (converted > 0 and math.isfinite(converted)):
        raise ValueError(f"{name}: expected a positive number, got {value!r:.40}")
    return converted


def _by_image(values: Tensor, images: Tensor) -> Tensor:
    """Return values [B] in the dtype of images [B, ...], to be multiplied with them."""
    return values.to(images.dtype).view(-1, *[1] * (images.dim() - 1))


Process = DiffusionScheduler | FlowMatching


def process_of(options: dict[str, Any]) -> Process:
    """Return the diffusion or the flow that a model was trained on.

    Args:
        options: those of `FlowMatching.options`, which have a "path", or of
            `DiffusionScheduler.options`, which have a "schedule".

    Raises:
        ValueError: the options are neither's, or one of a flow's is unknown or missing.
    """
    if "path" in options:
        return from_options(FlowMatching, options, complete=True)
    if "schedule" not in options:
        raise ValueError(
            "options: expected those of a DiffusionScheduler, with a 'schedule', or of a "
            f"FlowMatching, with a 'path', got {options!r}"
        )
    return DiffusionScheduler(**options)


# The flows of published models: Ma et al. 2024; Yao et al. 2025; Yu et al. 2025; Li & He 2025;
# Esser et al. 2024, whose models get times from 1000 at the noise to 0.
_PUBLISHED = {
    "SiT": FlowMatching(),
    "LightningDiT": FlowMatching(),
    "REPA": FlowMatching(clean_at=0),
    "JiT": FlowMatching(prediction="sample", min_noise=0.05),
    "SD3": FlowMatching(clean_at=0, time_scale=1000.0),
    "SD3.5": FlowMatching(clean_at=0, time_scale=1000.0),
}
_JIT_NOISE = {512: 2.0}  # its deviation by the height of the images; for others it is 1


def published_flow(project: str, height: int) -> FlowMatching | None:
    """Return the flow that a project's published models were trained on, or None.

    Args:
        project: "SiT", "LightningDiT", "REPA", "JiT", "SD3" or "SD3.5"; or a preset's name, which
            begins so.
        height: of the model's input; JiT's noise depends on it.
    """
    project = project.partition("-")[0]
    flow = _PUBLISHED.get(project)
    if flow is None or project != "JiT":
        return flow
    return replace(flow, noise_scale=_JIT_NOISE.get(height, 1.0))
