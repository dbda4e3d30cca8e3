"""What a run must keep to go on: its tensors by name, wherever their parts are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastdit.checkpoints.native import check_keys
from fastdit.config import DiTConfig
from fastdit.model import DiT
from fastdit.train import distributed
from fastdit.train.distributed import World
from fastdit.train.ema import EMA
from fastdit.train.run_folder import Saved


def tensors_of(
    model: DiT, optimizer: torch.optim.Optimizer, ema: EMA | None, history: Tensor
) -> dict[str, Tensor]:
    """The live tensors, as they are called in a checkpoint."""
    tensors = {f"model.{name}": p for name, p in model.state_dict().items()}
    for name, p in model.named_parameters():
        for entry, tensor in optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{name}.{entry}"] = tensor
    if ema is not None:
        tensors |= {f"ema.{name}": t for name, t in ema.averages.items()}
    return tensors | {"history": history}


def gather(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Copies on the host of the first process, all of each tensor; none on the others.

    All processes must call it together. A device holds one whole tensor at a time.
    """
    gathered = {}
    for name, t in tensors.items():
        whole = distributed.whole(t)
        if world.rank == 0:
            gathered[name] = whole.to("cpu", copy=True)
    return gathered


def model_of(config: DiTConfig, gathered: Mapping[str, Tensor]) -> DiT:
    """The model to sample from, on the host: of the moving average where there is one.

    It takes the gathered tensors themselves.
    """
    state: dict[str, Tensor] = {}
    for kind in ("model.", "ema."):  # an average goes before the weights
        state |= {n.removeprefix(kind): t for n, t in gathered.items() if n.startswith(kind)}
    with torch.device("meta"):
        model = DiT.from_config(config)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def fill_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Let AdamW make its state, as its first step does: here with gradients of zero."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()


def restore(own: Mapping[str, Tensor], saved: Saved, step: int) -> None:
    """Copy a checkpoint into the live tensors.

    Raises:
        ValueError: its tensors are of another run, or not of this step.
    """
    check_keys(str(saved.path), own, saved.tensors)
    for name, tensor in own.items():
        distributed.fill(tensor, saved.tensors[name])
    taken = {int(t) for name, t in own.items() if name.endswith(".step")} or {0}
    if taken != {step}:
        raise ValueError(f"{saved.path}: the optimizer took {taken} steps, the header says {step}")
