"""The ways to sample one model that `sample_throughput.py` times."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import _rivals as rivals
import torch
from _harness import build, randomize
from torch import Tensor, nn

import fastdit
from fastdit import DiTConfig, functional, reference
from fastdit.ops import dispatch
from fastdit.sampling import executions
from fastdit.sampling.predictors import TokenLayout

BASELINE = "reference eager"
MAX_AUTOTUNE = "reference max-autotune"
TRAJECTORY = "fastdit trajectory"
COMPILED = ("reference compiled", MAX_AUTOTUNE, "fastdit compile")
JUDGED_ON_CUDA = 2  # images; a hundred in float64 would take longer than the benchmark


@dataclass(frozen=True)
class Case:
    """One model on one device, with the scheduler and the dtype in which it is sampled."""

    preset: str
    cfg: DiTConfig
    scheduler: fastdit.DiffusionScheduler
    dtype: torch.dtype
    device: torch.device

    @functools.cached_property
    def model(self) -> fastdit.DiT:
        """The model in float32, made on the device."""
        model = build(fastdit.DiT, self.cfg, self.device)
        randomize(model)
        return model

    @functools.cached_property
    def own(self) -> fastdit.DiT:
        """The model in the dtype of the case."""
        same = self.dtype == torch.float32
        return self.model if same else copy.deepcopy(self.model).to(self.dtype)

    @functools.cached_property
    def plain(self) -> reference.DiT:
        """The reference with the same weights, which runs in 16 bits under autocast."""
        return self._reference(self.state_dtype)

    def _reference(self, dtype: torch.dtype) -> reference.DiT:
        model = build(reference.DiT, self.cfg, self.device)
        model.load_state_dict(self.model.state_dict())
        return model.to(dtype)

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def labels(self, batch: int) -> Tensor:
        """Return labels on the CPU, where a sampler reads them."""
        return torch.arange(batch) % self.cfg.num_classes

    def judged(self, batch: int) -> int:
        """Return how many of a batch's first images are compared to the oracle."""
        return batch if self.device.type == "cpu" else min(batch, JUDGED_ON_CUDA)

    def noise(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return (x_T, noise) of a batch.

        The images that are judged get what `Sampler` draws from seed 0, the others any noise.
        """
        judged, T = self.judged(batch), self.scheduler.T
        seeds = torch.tensor([[0, i] for i in range(judged)])
        layout = TokenLayout(self.cfg.sample_shape, self.cfg.patch_size)
        # On a GPU, the noise of two images is not worth building the C++ code.
        backend = None if self.device.type == "cpu" else "reference"
        z = functional.normal(seeds, torch.arange(T + 1), layout.shape.numel(), backend)
        images = layout.to_images(z.view(-1, *layout.shape)).unflatten(0, (T + 1, judged))
        rest = (T + 1, batch - judged, *self.cfg.sample_shape)
        z = torch.cat([images.to(self.device), torch.randn(rest, device=self.device)], dim=1)
        return z[0], z[1:]

    @functools.lru_cache(maxsize=4)  # noqa: B019  a case lives as long as the process
    def oracle(self, judged: int) -> Tensor:
        """Return the judged images, sampled in float64."""
        x_T, noise = self.noise(judged)
        exact = self._reference(torch.float64)
        labels = self.labels(judged).to(self.device)
        return reference.sample(exact, self.scheduler, x_T.double(), labels, noise.double())


# A way: (labels, (x_T, noise) or None) -> images. With None the plain ways draw their own noise.
# fastdit's ways always use seed 0, whose noise the other ways are given when they are judged.
Way = Callable[[Tensor, tuple[Tensor, Tensor] | None], Tensor]


def reference_way(case: Case, **compile_options: Any) -> Way:
    """The plain model in the plain loop."""
    model: nn.Module = case.plain
    if compile_options:
        # A graph for each batch size is fastest; fullgraph raises instead of falling back.
        model = torch.compile(model, dynamic=False, fullgraph=True, **compile_options)
    return plain_loop(case, model)


def plain_loop(case: Case, model: nn.Module) -> Way:
    """Any model in the plain loop; 16 bits mean autocast, as its users run it."""

    def sample(labels: Tensor, given: tuple[Tensor, Tensor] | None) -> Tensor:
        shape = (len(labels), *case.cfg.sample_shape)
        x_T, noise = given or (torch.randn(shape, device=case.device), None)
        low_precision = case.dtype == torch.bfloat16
        with torch.autocast(case.device.type, torch.bfloat16, enabled=low_precision):
            x_T = x_T.to(case.state_dtype)
            return reference.sample(model, case.scheduler, x_T, labels.to(case.device), noise)

    return sample


def rival_way(case: Case, rival: str) -> rivals.Rival:
    """The plain model, converted for another runtime, in the plain loop in its own process."""
    bare = dataclasses.replace(case)  # without the models, which the process makes again
    make = functools.partial(converted_way, bare, rival, torch.get_num_threads())
    return rivals.Rival(rival, make)


def converted_way(bare: Case, rival: str, threads: int) -> Way:
    """Make a rival's way inside its process."""
    # Another copy of the case holds the models, so that they are freed after the conversion.
    model = rivals.Converted(dataclasses.replace(bare).plain, rival, threads)
    torch.set_num_threads(1)  # PyTorch's threads would compete with the runtime's
    return plain_loop(bare, model)


def diffusers_way(case: Case) -> Way:
    """The transformer and scheduler of diffusers in the loop of its DiTPipeline, unguided."""
    from diffusers import DDPMScheduler, DiTTransformer2DModel

    cfg = case.cfg
    model = DiTTransformer2DModel(
        num_attention_heads=cfg.n_heads,
        attention_head_dim=cfg.head_dim,
        in_channels=cfg.in_channels,
        out_channels=cfg.out_channels,
        num_layers=cfg.n_layers,
        sample_size=cfg.img_size,
        patch_size=cfg.patch_size,
        num_embeds_ada_norm=cfg.num_classes,
    )
    model = model.to(case.device).eval()
    if case.dtype != torch.float32:  # diffusers warns of any dtype
        model = model.to(case.dtype)
    betas = case.scheduler.tables["betas"].numpy()
    scheduler = DDPMScheduler(case.scheduler.T, trained_betas=betas, clip_sample=False)
    scheduler.set_timesteps(case.scheduler.T)

    @torch.no_grad()
    def sample(labels: Tensor, given: tuple[Tensor, Tensor] | None) -> Tensor:
        labels = labels.to(case.device)
        x = torch.randn(len(labels), *cfg.sample_shape, device=case.device, dtype=case.dtype)
        for t in scheduler.timesteps:
            out = model(x, timestep=t.to(x.device).expand(len(x)), class_labels=labels).sample
            x = scheduler.step(out[:, : cfg.in_channels], t, x).prev_sample
        return x

    return sample


def fastdit_way(case: Case, execution: str) -> Way:
    sampler = fastdit.Sampler(case.own, case.scheduler, execution=execution)
    return lambda labels, given: sampler(labels, seed=0)


WAYS: dict[str, Callable[[Case], Way]] = {
    BASELINE: reference_way,
    "reference compiled": lambda case: reference_way(case, mode="default"),
    MAX_AUTOTUNE: lambda case: reference_way(case, mode="max-autotune"),
    "diffusers eager": diffusers_way,
    "fastdit eager": lambda case: fastdit_way(case, "eager"),
    "fastdit compile": lambda case: fastdit_way(case, "compile"),
    "fastdit graph": lambda case: fastdit_way(case, "graph"),
    TRAJECTORY: lambda case: fastdit_way(case, "trajectory"),
    "openvino": lambda case: rival_way(case, "openvino"),
    "onnxruntime": lambda case: rival_way(case, "onnxruntime"),
}


def obstacle(way: str, device: torch.device) -> str | None:
    """Return why a way cannot be timed here, or None."""
    if way in (MAX_AUTOTUNE, "fastdit graph") and device.type != "cuda":
        return "needs CUDA"
    if way.startswith("diffusers") and importlib.util.find_spec("diffusers") is None:
        return "needs diffusers; pip install 'fastdit[test]'"
    if way in rivals.PACKAGES:
        return rivals.obstacle(way, device)
    return None


def case_obstacle(way: str, case: Case) -> str | None:
    """Return why a way that can be timed here cannot sample this case, or None."""
    if way in rivals.PACKAGES and case.dtype != torch.float32:
        return "is timed in float32 only"
    if way != TRAJECTORY:
        return None
    subject = executions.Subject(case.own, case.device, case.dtype)
    reason = executions.obstacle("trajectory", subject)
    if reason is None and case.device.type == "cpu" and not dispatch.has_cpp():
        reason = "needs a C++ compiler"
    return reason
