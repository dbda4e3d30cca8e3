"""`fastdit.Sampler`: the one way to turn labels and seeds into images."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdit import reference
from fastdit.diffusion import DiffusionScheduler
from fastdit.errors import check_range, unknown_name
from fastdit.model import unwrap
from fastdit.noise import normal
from fastdit.solvers import SOLVERS

EXECUTIONS = ("eager",)

_NOISE_CHUNK = 2**18  # normals made at a time: a small batch's steps are made together

Labels = Sequence[int] | Tensor


class Sampler:
    """Samples images from a noise predictor.

        sampler = Sampler(model, DiffusionScheduler(T=200))
        images = sampler([0, 5, 10], seed=7)

    Noise is counted, not drawn (`fastdit.noise`): image i of `seed=7` is the same image in a batch
    of one, in a batch of a thousand, and on any device, up to the arithmetic of the forward.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: DiffusionScheduler,
        solver: str = "ddpm",
        *,
        execution: str = "auto",
        sample_shape: tuple[int, int, int] | None = None,
    ) -> None:
        """Prepare to sample.

        Args:
            model: called as `model(x, t, y)` with x [B, C, H, W], t [B] int64 and y [B] int64 or
                None; returns the predicted noise, like x, or [B, 2C, H, W] with the learned
                variance. It is called in the mode it is in, on the device and in the dtype of its
                first parameter (on the CPU in float32 where it has none). A compiled or data
                parallel one is recognised.
            scheduler: the diffusion the model was trained on.
            solver: "ddpm" (ancestral, all T steps).
            execution: "eager", or "auto", which picks the fastest there is.
            sample_shape: (C, H, W) of one image, for models other than DiT.

        Raises:
            ValueError: an unknown name, or a model this sampler cannot serve.
        """
        if solver not in SOLVERS:
            raise unknown_name("solver", solver, SOLVERS)
        if execution not in ("auto", *EXECUTIONS):
            raise unknown_name("execution", execution, ("auto", *EXECUTIONS))
        inner = unwrap(model)
        cfg = inner.cfg if isinstance(inner, reference.DiT) else None
        shape = cfg.sample_shape if cfg else sample_shape
        if shape is None:
            raise ValueError(
                "sample_shape: expected (C, H, W), since the model is no DiT, got None"
            )
        if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
            raise ValueError(f"sample_shape: expected three positive integers, got {shape}")
        if sample_shape not in (None, shape):
            raise ValueError(f"sample_shape: expected the model's {shape}, got {sample_shape}")
        self.model = model
        self.solver = SOLVERS[solver](scheduler)
        self.execution = "eager" if execution == "auto" else execution
        self.sample_shape: tuple[int, int, int] = shape
        self._cfg = cfg

    @torch.no_grad()
    def __call__(
        self,
        labels: Labels | None,
        seed: int = 0,
        *,
        seeds: Sequence[int] | None = None,
        first_index: int = 0,
        x_T: Tensor | None = None,
        noise: Tensor | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Sample one image a label.

        Args:
            labels: [B] class labels. None samples without labels; the batch is then as large as
                `seeds` or `x_T`.
            seed: key of the noise; image i uses stream `first_index + i` of it.
            seeds: B keys, one an image, all at stream 0; replaces `seed`.
            first_index: index of the first image, so that a set can be sampled in parts.
            x_T: [B, C, H, W] to start from, instead of the seed's.
            noise: [S, B, C, H, W] to add, instead of the seed's: the k-th of S updates uses
                noise[k] (the last update adds none).
            progress: show a progress bar on stderr.

        Returns:
            [B, C, H, W] on the model's device: float32, or float64 for a float64 model.

        Raises:
            ValueError: an argument's shape or range is wrong, or a weight is not finite.
            FloatingPointError: the model's predictions were not finite.
        """
        parameter = next(self.model.parameters(), torch.empty(0, dtype=torch.float32))
        device, model_dtype = parameter.device, parameter.dtype
        state_dtype = torch.promote_types(model_dtype, torch.float32)
        y = self._check_labels(labels)
        B = _batch_size(y, seeds, x_T)
        keys = _check_seeds(B, seed, seeds, first_index).to(device)
        self._check_tensor("x_T", x_T, (B, *self.sample_shape))
        self._check_tensor("noise", noise, (len(self.solver.timesteps), B, *self.sample_shape))
        _check_finite("x_T", {} if x_T is None else {"it": x_T})
        _check_finite("noise", {} if noise is None else {"it": noise})
        _check_finite("model", dict(self.model.named_parameters()))

        if y is not None:
            y = y.to(device)
        x = self._seeded_noise(keys, torch.tensor([0], device=device))[0] if x_T is None else x_T
        x = x.to(device, state_dtype)
        fresh = self._noise_by_step(keys) if noise is None else iter(noise.to(device))
        timesteps = torch.tensor(self.solver.timesteps, device=device)[:, None].expand(-1, B)
        steps = tqdm(timesteps, desc="sampling", unit="step", leave=None, disable=not progress)
        for k, (t, z) in enumerate(zip(steps, fresh, strict=True)):
            model_out = self.model(x.to(model_dtype), t, y).to(state_dtype)
            self._check_output(model_out, x)
            x = self.solver.step(k, x, model_out, z.to(state_dtype))
        if not x.isfinite().all():
            raise FloatingPointError(
                f"model: expected finite predictions, but images hold NaN or Inf; {model_dtype} "
                "may be too narrow for it"
            )
        return x

    def _seeded_noise(self, keys: Tensor, steps: Tensor) -> Tensor:
        """[S, B, C, H, W] float32; elements are counted in the model's own token order."""
        C, H, W = self.sample_shape
        z = normal(keys, steps, C * H * W)
        S, B = z.shape[:2]
        if self._cfg is None:
            return z.reshape(S, B, C, H, W)
        p = self._cfg.patch_size
        tokens = z.reshape(S * B, (H // p) * (W // p), p * p * C)
        return reference.unpatchify(tokens, p).view(S, B, C, H, W)

    def _noise_by_step(self, keys: Tensor) -> Iterator[Tensor]:
        """The noise of each update, [B, C, H, W]; the k-th update (from 1) counts as step k."""
        C, H, W = self.sample_shape
        S = len(self.solver.timesteps)
        chunk = max(1, _NOISE_CHUNK // (len(keys) * C * H * W))
        for first in range(1, S + 1, chunk):
            steps = torch.arange(first, min(first + chunk, S + 1), device=keys.device)
            yield from self._seeded_noise(keys, steps)

    def _check_labels(self, labels: Labels | None) -> Tensor | None:
        """[B] int64 on the CPU, in range for a model that says its classes."""
        if labels is None:
            return None
        if self._cfg is not None and not self._cfg.use_class_cond:
            raise ValueError("labels: expected None, since the model has use_class_cond=False")
        expected = "labels: expected a non-empty list of integers, one an image"
        try:
            y = torch.as_tensor(labels, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{expected}; got {labels!r}") from error
        numbers = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
        if y.dim() != 1 or not numbers or not len(y):
            raise ValueError(f"{expected}; got {y.dtype} of shape {list(y.shape)}")
        y = y.to(torch.int64)
        if self._cfg is not None:
            check_range("labels", y, self._cfg.num_classes)
        return y

    @staticmethod
    def _check_output(model_out: Tensor, x: Tensor) -> None:
        B, C, H, W = x.shape
        if model_out.shape not in ((B, C, H, W), (B, 2 * C, H, W)):
            raise ValueError(
                f"model: expected an output of shape {[B, C, H, W]} or {[B, 2 * C, H, W]}, got "
                f"{list(model_out.shape)}"
            )

    @staticmethod
    def _check_tensor(name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
        if value is None:
            return
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: expected a float tensor, got {got}")
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")


def _batch_size(y: Tensor | None, seeds: Sequence[int] | None, x_T: Tensor | None) -> int:
    given = y if y is not None else seeds if seeds is not None else x_T
    if given is None or not len(given):
        raise ValueError(
            "labels: expected labels, or seeds or x_T to tell the batch size, got none"
        )
    return len(given)


def _check_seeds(B: int, seed: int, seeds: Sequence[int] | None, first_index: int) -> Tensor:
    """[B, 2] int64 rows of (key, stream)."""
    if seeds is None:
        first = _check_integer("first_index", first_index, bits=32)
        if first + B > 2**32:
            raise ValueError(f"first_index: expected at most 2^32 - {B}, got {first}")
        key = _check_integer("seed", seed, bits=63)
        rows = [(key, first + i) for i in range(B)]
    elif len(seeds) != B:
        raise ValueError(f"seeds: expected {B}, one an image; got {len(seeds)}")
    elif first_index:
        raise ValueError("first_index: expected 0 where seeds names every image's key")
    else:
        rows = [(_check_integer("seeds", key, bits=63), 0) for key in seeds]
    return torch.tensor(rows, dtype=torch.int64)


def _check_integer(name: str, value: int, bits: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 2**bits:
        raise ValueError(f"{name}: expected an integer in [0, 2^{bits}), got {value}")
    return number


def _check_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    """One reduction over all of them and one read-back: a NaN would paint every pixel."""
    if not tensors:
        return
    finite = torch.stack([t.isfinite().all() for t in tensors.values()])
    if not finite.all():
        name = list(tensors)[int((~finite).nonzero()[0])]
        raise ValueError(f"{what}: expected finite values, but {name} holds NaN or Inf")
