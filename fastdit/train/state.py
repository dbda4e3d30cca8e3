"""Collect and restore the tensors of a run, however many processes hold them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdit.checkpoints.digests import digests_of
from fastdit.checkpoints.matching import check_keys
from fastdit.config import DiTConfig
from fastdit.model import DiT
from fastdit.train.alignment import Alignment
from fastdit.train.distributed import World, copy_full_tensor, full_tensor
from fastdit.train.ema import EMA
from fastdit.train.run_folder import Saved


def run_tensors(
    model: DiT,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    history: Tensor,
    alignment: Alignment | None = None,
) -> dict[str, Tensor]:
    """Return the live tensors of a run, under the names they have in a checkpoint."""
    tensors = {f"model.{name}": p for name, p in model.state_dict().items()}
    trained = dict(model.named_parameters())
    if alignment is not None:
        trained |= (projector := dict(alignment.named_parameters()))
        tensors |= projector
    for name, p in trained.items():
        for entry, tensor in optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{name}.{entry}"] = tensor
    if ema is not None:
        tensors |= {f"ema.{name}": t for name, t in ema.averages.items()}
    return tensors | {"history": history}


def gather(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Return whole copies on the host in the process of rank 0, and an empty dict in the others.

    All processes must call it together. A device holds only one whole tensor at a time.
    """
    gathered = {}
    for name, t in tensors.items():
        whole = full_tensor(t)
        if world.rank == 0:
            gathered[name] = whole.to("cpu", copy=True)
    return gathered


def model_from(config: DiTConfig, gathered: Mapping[str, Tensor]) -> DiT:
    """Return the model to sample from, on the host: with averaged weights if there are any.

    The model shares the memory of the gathered tensors.
    """
    state: dict[str, Tensor] = {}
    for kind in ("model.", "ema."):  # averages replace the weights
        state |= {n.removeprefix(kind): t for n, t in gathered.items() if n.startswith(kind)}
    with torch.device("meta"):
        model = DiT.from_config(config)
    model.load_state_dict(state, assign=True)
    model.make_rope()  # which no file holds
    return model.requires_grad_(False)


def copy_weights(model: DiT, initial: DiT) -> dict[str, Any]:
    """Copy a model's weights into another of the same config; return what identifies them.

    Raises:
        ValueError: initial is not a DiT of that config.
    """
    if not isinstance(initial, DiT):
        raise ValueError(f"initial: expected a fastdit.DiT, got {type(initial).__name__}")
    if initial.cfg != model.cfg:
        raise ValueError(f"initial: expected a model of {model.cfg}, got {initial.cfg}")
    state = initial.state_dict()
    model.load_state_dict(state)
    digests = json.dumps(digests_of(state, {})["tensors"])
    return {"digest": hashlib.blake2b(digests.encode(), digest_size=16).hexdigest()}


def create_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Let AdamW create its state, which it does in its first step, by a step of zero gradients."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()


def restore(own: Mapping[str, Tensor], saved: Saved, step: int) -> None:
    """Copy a checkpoint into the live tensors of a run.

    Raises:
        ValueError: the tensors are of another run, or of another step.
    """
    check_keys(str(saved.path), own, saved.tensors)
    for name, tensor in own.items():
        copy_full_tensor(tensor, saved.tensors[name])
    taken = {int(t) for name, t in own.items() if name.endswith(".step")} or {0}
    if taken != {step}:
        raise ValueError(f"{saved.path}: the optimizer took {taken} steps, the header says {step}")
