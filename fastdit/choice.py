"""Which execution a model, a device and a batch allow, and which suits them best."""

from __future__ import annotations

import torch
from torch import nn

from fastdit import backends
from fastdit.config import DiTConfig
from fastdit.model import unwrap
from fastdit.predictors import hoists, unaltered

EXECUTIONS = ("eager", "compile", "graph", "trajectory")


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
    reason = backends.trajectory_obstacle(backend, model.cfg, device, dtype)
    if reason is None and not unaltered(model):
        reason = "reads a fastdit.DiT's weights alone, got one with hooks or exchanged modules"
    return reason


def automatic(model: nn.Module, device: torch.device, dtype: torch.dtype, watched: bool) -> str:
    """What "auto" stands for.

    On a CPU the C++ trajectory, wherever it can be: measured by benchmarks/crossover.py, on two
    cores with AVX-512, it is faster than compiled steps for every model that it takes, at every
    batch. "auto" compiles nothing itself, since that takes longer than many a run.

    Args:
        model: as a `Sampler` holds it.
        device: the model's.
        dtype: of the forward.
        watched: whether every step's x0 is asked for.
    """
    if device.type == "cuda":
        return "graph" if hoists(model) else "eager"
    if watched or obstacle("trajectory", model, device, dtype) is not None:
        return "eager"
    return "trajectory" if backends.has_cpp() else "eager"


def rule(cfg: DiTConfig) -> str:
    """What "auto" is for a model, in words."""
    reason = backends.trajectory_obstacle("cpp", cfg, torch.device("cpu"), torch.float32)
    on_cpu = f"'eager' on a CPU, since the C++ trajectory {reason}"
    if reason is None:
        on_cpu = "on a CPU 'trajectory' in float32, 'eager' in other dtypes"
    return f"'graph' on CUDA, {on_cpu}"
