"""Moving, splitting and compiling what a run trains, as its `Runtime` says."""

from __future__ import annotations

from torch import nn

from fastdit.model import DiT
from fastdit.train import distributed
from fastdit.train.alignment import Alignment
from fastdit.train.runtime import PRECISIONS, Runtime


def place(model: DiT, alignment: Alignment | None, runtime: Runtime) -> None:
    """Move or split a model on the host, in place, with its projector if any; compile its blocks.

    Every process must have the same weights.
    """
    if not runtime.split:
        model.to(runtime.device)
        if alignment is not None:
            alignment.to(runtime.device)
    for block in model.blocks:
        block.checkpointing = runtime.checkpointing
        if runtime.compile == "block":
            block.compile(dynamic=False)
    if runtime.split:
        distributed.shard(model, runtime.device, PRECISIONS[runtime.precision])
        if alignment is not None:
            distributed.shard_whole(alignment, runtime.device)


def wrap(objective: nn.Module, runtime: Runtime) -> nn.Module:
    """Compile a loss whose parts are placed, and let its gradients be averaged over processes."""
    if runtime.compile == "whole":
        objective.compile(dynamic=False)
    if runtime.world.size > 1 and not runtime.split:
        return distributed.replicate(objective, runtime.device)
    return objective
