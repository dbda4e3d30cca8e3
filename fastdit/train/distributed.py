"""Training one model on several processes, with DDP or FSDP2.

torchrun starts the processes and tells each one its rank. Everything here also works in a single
process, where it does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdit.model import DiT


@dataclass(frozen=True)
class World:
    """This process's place among those that work together.

    Attributes:
        rank: this process's number, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def total(self, x: Tensor) -> Tensor:
        """Sum x over all processes, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def any(self, asked: bool) -> bool:
        """Return whether any process passes True; wait for the others, but not for a device."""
        if self.size == 1:
            return asked
        answer = torch.tensor([float(asked)])  # on the host, even if the model is on a GPU
        dist.all_reduce(answer, dist.ReduceOp.MAX)
        return bool(answer > 0)

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            dist.barrier()

    def check_same(self, values: dict[str, Any]) -> None:
        """Raise a ValueError in every process unless all of them pass the same values."""
        if self.size == 1:
            return
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, values)
        for name in values:
            first, *others = (theirs[name] for theirs in everyone)
            for rank, other in enumerate(others, 1):
                if other != first:
                    why = f"process {rank} has {other}, process 0 {first}"
                    raise ValueError(f"{name}: {why}; expected one run, in a folder that all see")


@contextmanager
def processes(
    device: torch.device | str = "cpu", timeout: timedelta | None = None
) -> Iterator[World]:
    """Connect the processes that torchrun started; without torchrun there is only this one.

    Args:
        device: where they compute; on CUDA they communicate through NCCL, elsewhere through Gloo.
        timeout: how long one process waits for another; None is torch's default.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    backend, gpu = "gloo", None
    if torch.device(device).type == "cuda":
        backend, gpu = "cpu:gloo,cuda:nccl", torch.device(device)
        torch.cuda.set_device(gpu)
    dist.init_process_group(backend, timeout=timeout, device_id=gpu)
    world = World(dist.get_rank(), dist.get_world_size())
    yield world
    # Skipped after an error, since the others may wait for this process elsewhere. All leave
    # together: a Gloo thread that still frees a collective's memory while the interpreter exits
    # aborts the process.
    world.wait()
    dist.destroy_process_group()


def shard(model: DiT, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Split a model's weights, gradients and optimizer state over the processes, in place.

    A block's weights are gathered when it runs. Its modulation is gathered separately, and so are
    embedders of its own, since all modulations are computed before the first block runs.

    Args:
        model: the model on the host, the same in every process.
        device: where each process keeps its part.
        dtype: dtype of the blocks' gathered weights; None leaves it as it is. Gradients are
            reduced in float32, and the stored weights keep their dtype.

    Source: `torch.distributed.fsdp.fully_shard` (FSDP2).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False
    )
    if model.cfg.embedders == "block":
        for block in model.blocks:
            fully_shard(block.t_embed, mesh=mesh)
            if model.cfg.use_class_cond:
                fully_shard(block.y_embed, mesh=mesh)
    for block in model.blocks:
        if block.norm1.weight is not None:  # the block before it calls it
            fully_shard(block.norm1, mesh=mesh, mp_policy=policy)
        fully_shard(block.adaLN_modulation, mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def shard_whole(module: nn.Module, device: torch.device) -> None:
    """Split the weights of a small module as `shard` does a model's, all gathered together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(module, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a module so that its gradients are averaged over the processes (DDP)."""
    on_cuda = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        module, device_ids=on_cuda, gradient_as_bucket_view=True
    )


def without_gradient_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Let a backward in this context add up DDP's gradients without exchanging them.

    FSDP still reduces its gradients in every backward: unreduced ones would not be split, and would
    take as much memory as the whole model.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def local_tensor(t: Tensor) -> Tensor:
    """Return this process's part of a tensor, in the same memory; all of one that is not split."""
    t = t.detach()
    return t.to_local() if _is_split(t) else t  # type: ignore[attr-defined]


def full_tensor(t: Tensor) -> Tensor:
    """Return a whole tensor; if it is split, all processes must call this together."""
    t = t.detach()
    return t.full_tensor() if _is_split(t) else t  # type: ignore[attr-defined]


@torch.no_grad()
def copy_full_tensor(target: Tensor, values: Tensor) -> None:
    """Copy a whole tensor into one that may be split."""
    if _is_split(target):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
        values = values.detach().to(target.device, target.dtype)
        # Every process has all values, so nothing needs to be sent.
        values = distribute_tensor(values, mesh, placements, src_data_rank=None)
    target.copy_(values)


def _is_split(t: Tensor) -> bool:
    # By name, since importing DTensor takes a while; a split tensor's class is already imported.
    return type(t).__name__ == "DTensor"
