"""Which execution a model, a device and a batch allow, and which suits them best."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from fastdit.config import DiTConfig
from fastdit.model import unwrap
from fastdit.ops import dispatch
from fastdit.sampling.predictors import hoists, unaltered

EXECUTIONS = ("eager", "compile", "graph", "trajectory")


class Win(NamedTuple):
    """Models whose trajectory in Triton was measured to be faster than their graph."""

    arch: str  # of the GPU, such as "sm_90"
    tokens: int
    hidden: int
    layers: int  # up to so many


# In 16 bits. An entry is for what `benchmarks/sample_throughput.py --dtype bfloat16 --way "fastdit
# graph" "fastdit trajectory"` shows at every batch that it was given, one image to several a
# multiprocessor, and comes with its JSON: "auto" does not look at the batch, so that an image's
# bits do not depend on it. Empty, since nothing has been measured on a GPU.
WINS: tuple[Win, ...] = ()

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def obstacle(
    execution: str, model: nn.Module, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why a model cannot be sampled so, worded to follow the execution's name; or None."""
    if execution == "eager":
        return None
    if not hoists(model):
        return (
            "needs a fastdit.DiT whose forward is its own, without hooks, got "
            f"{type(unwrap(model)).__name__}"
        )
    if execution == "graph" and device.type != "cuda":
        return f"needs a model on CUDA, got one on {device}"
    if execution != "trajectory":
        return None
    backend = "cpp" if device.type == "cpu" else "triton"
    reason = dispatch.trajectory_obstacle(backend, model.cfg, device, dtype)
    if reason is None and not unaltered(model):
        reason = "reads a fastdit.DiT's weights alone, got one with hooks or exchanged modules"
    return reason


def automatic(model: nn.Module, device: torch.device, dtype: torch.dtype, watched: bool) -> str:
    """What "auto" stands for.

    On a CPU the C++ trajectory, wherever it can be: measured by benchmarks/crossover.py, on two
    cores with AVX-512, it is faster than compiled steps for every model that it takes, at every
    batch. "auto" compiles nothing itself, since that takes longer than many a run. On CUDA the
    graph, but for what `WINS` lists.

    Args:
        model: as a `Sampler` holds it.
        device: the model's.
        dtype: of the forward.
        watched: whether every step's x0 is asked for.
    """
    if device.type == "cuda":
        if not hoists(model):
            return "eager"
        if watched or dtype not in _SIXTEEN_BITS or not _wins(model.cfg, _arch(device)):
            return "graph"
        return "graph" if obstacle("trajectory", model, device, dtype) else "trajectory"
    if watched or obstacle("trajectory", model, device, dtype) is not None:
        return "eager"
    return "trajectory" if dispatch.has_cpp() else "eager"


def rule(cfg: DiTConfig) -> str:
    """What "auto" is for a model, in words."""
    reason = dispatch.trajectory_obstacle("cpp", cfg, torch.device("cpu"), torch.float32)
    on_cpu = f"'eager' on a CPU, since the C++ trajectory {reason}"
    if reason is None:
        on_cpu = "on a CPU 'trajectory' in float32, 'eager' in other dtypes"
    on_cuda = "'graph' on CUDA"
    if chips := sorted({win.arch for win in WINS if _covers(win, cfg)}):
        on_cuda += f", but 'trajectory' in 16 bits on {' and '.join(chips)}"
    return f"{on_cuda}, {on_cpu}"


def _wins(cfg: DiTConfig, arch: str) -> bool:
    return any(win.arch == arch and _covers(win, cfg) for win in WINS)


def _covers(win: Win, cfg: DiTConfig) -> bool:
    same = (win.tokens, win.hidden) == (cfg.n_tokens, cfg.hidden)
    return same and cfg.n_layers <= win.layers


def _arch(device: torch.device) -> str:
    """As `fastdit.kernels.common.arch`, which would import Triton."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
