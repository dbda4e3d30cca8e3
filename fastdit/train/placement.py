"""Placing a model where it is trained: its device, its processes, its compilation."""

from __future__ import annotations

from torch import nn

from fastdit.diffusion import DiffusionScheduler
from fastdit.model import DiT
from fastdit.train import distributed
from fastdit.train.objective import Objective
from fastdit.train.recipe import Recipe
from fastdit.train.runtime import PRECISIONS, Runtime


def place(model: DiT, scheduler: DiffusionScheduler, recipe: Recipe, runtime: Runtime) -> nn.Module:
    """Move, split and compile a model as the runtime says, and return the loss that trains it."""
    precision = PRECISIONS[runtime.precision]
    model.float()
    if not runtime.split:
        model.to(runtime.device)
    for block in model.blocks:
        block.checkpointing = runtime.checkpointing
        if runtime.compile == "block":
            block.compile(dynamic=False)
    if runtime.split:
        distributed.shard(model, runtime.device, precision)
    objective = Objective(model, model.cfg, scheduler, recipe.seed, recipe.label_dropout, precision)
    if runtime.compile == "whole":
        objective.compile(dynamic=False)
    if runtime.world.size > 1 and not runtime.split:
        return distributed.replicate(objective, runtime.device)
    return objective
