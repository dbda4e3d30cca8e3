"""`fastdit.Sampler`: the one way to turn labels and seeds into images."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdit import reference
from fastdit.config import unknown_name
from fastdit.diffusion import DiffusionScheduler
from fastdit.model import DiT
from fastdit.noise import SEED_LIMIT, STREAM_LIMIT, normal
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
        execution: str = "auto",
        sample_shape: tuple[int, int, int] | None = None,
    ) -> None:
        """Prepare to sample.

        Args:
            model: called as `model(x, t, y)` with x [B, C, H, W], t [B] int64 and y [B] int64 or
                None; returns the predicted noise, like x, or [B, 2C, H, W] with the learned
                variance. It is called in the mode it is in, on the device and in the dtype of its
                parameters.
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
        cfg = model.cfg if isinstance(model, reference.DiT) else None
        shape = cfg.sample_shape if cfg else sample_shape
        if shape is None:
            raise ValueError(
                "sample_shape: expected (C, H, W), since the model is no DiT, got None"
            )
        if sample_shape not in (None, shape):
            raise ValueError(f"sample_shape: expected the model's {shape}, got {sample_shape}")
        self.model = model
        self.solver = SOLVERS[solver](scheduler)
        self.execution = "eager" if execution == "auto" else execution
        self.sample_shape: tuple[int, int, int] = shape
        self._patch_size = cfg.patch_size if cfg else None
        self._num_classes = cfg.num_classes if cfg and cfg.use_class_cond else None

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
        """
        parameter = next(self.model.parameters())
        device, model_dtype = parameter.device, parameter.dtype
        state_dtype = torch.promote_types(model_dtype, torch.float32)
        y = self._check_labels(labels)
        B = _batch_size(y, seeds, x_T)
        keys = _check_seeds(B, seed, seeds, first_index).to(device)
        self._check_tensor("x_T", x_T, (B, *self.sample_shape))
        self._check_tensor("noise", noise, (len(self.solver.timesteps), B, *self.sample_shape))
        _check_finite(self.model)

        if y is not None:
            y = y.to(device)
        x = self._seeded_noise(keys, torch.tensor([0], device=device))[0] if x_T is None else x_T
        x = x.to(device, state_dtype)
        fresh = self._noise_by_step(keys) if noise is None else iter(noise.to(device))
        timesteps = torch.tensor(self.solver.timesteps, device=device)[:, None].expand(-1, B)
        steps = tqdm(timesteps, desc="sampling", unit="step", disable=not progress)
        for k, (t, z) in enumerate(zip(steps, fresh, strict=True)):
            model_out = self.model(x.to(model_dtype), t, y).to(state_dtype)
            self._check_output(model_out, x)
            x = self.solver.step(k, x, model_out, z.to(state_dtype))
        return x

    def _seeded_noise(self, keys: Tensor, steps: Tensor) -> Tensor:
        """[S, B, C, H, W] float32; elements are counted in the model's own token order."""
        C, H, W = self.sample_shape
        z = normal(keys, steps, C * H * W)
        S, B = z.shape[:2]
        if self._patch_size is None:
            return z.reshape(S, B, C, H, W)
        p = self._patch_size
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
        if labels is None:
            return None
        if isinstance(self.model, DiT) and self._num_classes is None:
            raise ValueError("labels: expected None, since the model has use_class_cond=False")
        y = torch.as_tensor(labels, device="cpu")
        if y.dim() != 1 or y.is_floating_point() or y.dtype == torch.bool or not len(y):
            raise ValueError(
                "labels: expected a non-empty list of integers, one an image; got "
                f"{y.dtype} of shape {list(y.shape)}"
            )
        limit = self._num_classes
        if limit is not None and not 0 <= int(y.min()) <= int(y.max()) < limit:
            raise ValueError(
                f"labels: expected values in [0, {limit}), got {int(y.min())} to {int(y.max())}"
            )
        return y.to(torch.int64)

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
        if value is not None and value.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")


def _batch_size(y: Tensor | None, seeds: Sequence[int] | None, x_T: Tensor | None) -> int:
    given = y if y is not None else seeds if seeds is not None else x_T
    if given is None:
        raise ValueError(
            "labels: expected labels, or seeds or x_T to tell the batch size, got None"
        )
    return len(given)


def _check_seeds(B: int, seed: int, seeds: Sequence[int] | None, first_index: int) -> Tensor:
    """[B, 2] int64 rows of (key, stream)."""
    if seeds is None:
        if not 0 <= first_index <= STREAM_LIMIT - B:
            raise ValueError(f"first_index: expected a value in [0, 2^32 - {B}], got {first_index}")
        rows = [(_check_key(seed), first_index + i) for i in range(B)]
    elif len(seeds) != B:
        raise ValueError(f"seeds: expected {B}, one an image; got {len(seeds)}")
    elif first_index:
        raise ValueError("first_index: expected 0 where seeds names every image's key")
    else:
        rows = [(_check_key(key), 0) for key in seeds]
    return torch.tensor(rows, dtype=torch.int64)


def _check_key(seed: int) -> int:
    try:
        key = operator.index(seed)
    except TypeError:
        key = -1
    if not 0 <= key < SEED_LIMIT:
        raise ValueError(f"seed: expected an integer in [0, 2^63), got {seed}")
    return key


def _check_finite(model: nn.Module) -> None:
    """One reduction over all weights and one read-back: a NaN weight would paint every pixel."""
    parameters = dict(model.named_parameters())
    finite = torch.stack([p.isfinite().all() for p in parameters.values()])
    if not finite.all():
        name = list(parameters)[int((~finite).nonzero()[0])]
        raise ValueError(f"model: expected finite weights, but {name} holds NaN or Inf")
