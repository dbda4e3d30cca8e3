"""Several processes that train one model, on torch's own engine: DDP, or FSDP2's shards.

torchrun starts them and says who is who. Everything here is also right in a process of its own,
where it does nothing.
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
    """Who this process is among those that work together.

    Attributes:
        rank: from 0 on.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes, in each."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def any(self, asked: bool) -> bool:
        """Whether any process says yes; waits for the others, not for a device."""
        if self.size == 1:
            return asked
        answer = torch.tensor([float(asked)])  # on the host, whatever the model is on
        dist.all_reduce(answer, dist.ReduceOp.MAX)
        return bool(answer > 0)

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    def check_same(self, values: dict[str, Any]) -> None:
        """Raise a ValueError in each process unless all bring the same values, by name."""
        if self.size == 1:
            return
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, values)
        for rank, theirs in enumerate(everyone):
            other = [name for name in values if theirs[name] != everyone[0][name]]
            if other:
                name = other[0]
                raise ValueError(
                    f"{name}: process {rank} has {theirs[name]}, process 0 {everyone[0][name]}; "
                    "expected one run, in a folder that all of them see"
                )


@contextmanager
def processes(
    device: torch.device | str = "cpu", timeout: timedelta | None = None
) -> Iterator[World]:
    """The processes that torchrun started, connected; one without it.

    Args:
        device: where they compute: on CUDA they talk through NCCL, elsewhere through Gloo.
        timeout: how long one waits for another; None is torch's default.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        timeout=timeout,
        device_id=torch.device(device) if cuda else None,
    )
    world = World(dist.get_rank(), dist.get_world_size())
    yield world
    # Not after an error: each would wait for the others, who wait for this one. All leave together,
    # since a thread of Gloo's that still frees what a collective held, as the interpreter ends,
    # aborts the process.
    world.wait()
    dist.destroy_process_group()


def shard(model: DiT, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Split a model's weights, gradients and optimizer state over the processes, in place.

    A block's own weights are gathered when it runs, and its modulation's, which run before all
    blocks, apart from them.

    Args:
        model: on the host; each process must have the same one.
        device: where its parts go.
        dtype: of the blocks' gathered weights; all else, the sums of gradients and the weights
            that are kept stay as they are. None leaves the gathered ones too.

    Source: `torch.distributed.fsdp.fully_shard` (FSDP2).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False
    )
    for block in model.blocks:
        fully_shard(block.adaLN_modulation, mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with gradients averaged over the processes (DDP)."""
    on_cuda = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        module, device_ids=on_cuda, gradient_as_bucket_view=True
    )


def apart(module: nn.Module) -> AbstractContextManager[None]:
    """A backward in here adds gradients up without talking to the others, where that costs no
    memory: DDP's are whole anyway, those of FSDP are reduced to shards each time."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def local(t: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory; all of one that is not split."""
    t = t.detach()
    return t.to_local() if _is_split(t) else t  # type: ignore[attr-defined]


def whole(t: Tensor) -> Tensor:
    """All of a tensor; where it is split all processes must ask for it together."""
    t = t.detach()
    return t.full_tensor() if _is_split(t) else t  # type: ignore[attr-defined]


@torch.no_grad()
def fill(target: Tensor, values: Tensor) -> None:
    """Copy values, all of them, into a tensor that may be split."""
    if _is_split(target):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
        values = values.detach().to(target.device, target.dtype)
        # Each process has all values: none is sent.
        values = distribute_tensor(values, mesh, placements, src_data_rank=None)
    target.copy_(values)


def _is_split(t: Tensor) -> bool:
    # By name: importing DTensor takes a while, and where there is one it has been imported.
    return type(t).__name__ == "DTensor"
