"""Which execution a model, a device and a batch allow, and which suits them best."""

from __future__ import annotations

import torch
from torch import nn

from fastdit import backends
from fastdit.config import DiTConfig
from fastdit.model import unwrap
from fastdit.predictors import hoists, unaltered

# Past both the C++ trajectory is no faster than a compiled step.
_HIDDEN, _TOKENS = 384, 128

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
    if not unaltered(model):
        return "reads a fastdit.DiT's weights alone, got one with hooks or exchanged modules"
    if device.type == "cpu":
        return backends.trajectory_obstacle("cpp", model.cfg, device, dtype)
    return backends.trajectory_obstacle("triton", model.cfg, device, dtype)


def automatic(
    model: nn.Module, device: torch.device, dtype: torch.dtype, rows: int, watched: bool
) -> str:
    """What "auto" stands for.

    Args:
        model: as a `Sampler` holds it.
        device: the model's.
        dtype: of the forward.
        rows: of a step's batch, null ones counted.
        watched: whether every step's x0 is asked for.
    """
    if device.type == "cuda":
        return "graph" if hoists(model) else "eager"
    if watched or obstacle("trajectory", model, device, dtype) is not None:
        return "eager"
    assert hoists(model)
    if not trajectory_pays(model.cfg, rows) or not backends.has_cpp():
        return "eager"
    return "trajectory"


def trajectory_pays(cfg: DiTConfig, rows: int) -> bool:
    """Whether the C++ loop is faster on a CPU than steps compiled by PyTorch.

    Measured by benchmarks/crossover.py on two cores with AVX-512: up to a hidden size of 384 it is,
    at every batch from 1 to 64; at 512 it is for a batch of 64 tokens, but not for sure from 256 on.
    """
    return cfg.hidden <= _HIDDEN or rows * cfg.n_tokens <= _TOKENS


def rule(cfg: DiTConfig) -> str:
    """What "auto" is for a model, in words."""
    reason = backends.trajectory_obstacle("cpp", cfg, torch.device("cpu"), torch.float32)
    if reason:
        on_cpu = f"'eager' on a CPU, since the C++ trajectory {reason}"
    elif cfg.hidden <= _HIDDEN:
        on_cpu = "'trajectory' on a CPU in float32, at every batch"
    else:
        most = _TOKENS // cfg.n_tokens
        on_cpu = f"'trajectory' on a CPU in float32 up to {most} rows, 'eager' beyond"
    return f"'graph' on CUDA; {on_cpu}"
