"""How a training run is computed: device, precision, compilation, processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fastdit.errors import check_fields, warn
from fastdit.train.distributed import World

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Runtime:
    """How a run is computed. It affects speed and memory, and the loss only by rounding.

    Attributes:
        device: where to compute.
        precision: "bfloat16" runs the model under autocast: matrix products are in bfloat16, and
            weights, optimizer, residual stream and loss in float32. With "fsdp" the blocks' weights
            are gathered in bfloat16 too.
        compile: "block" compiles one block, which all blocks share; "whole" compiles the loss with
            the drawing of its noise, which runs faster on one process and compiles longer.
        checkpointing: keep only each block's inputs for the backward, which recomputes the rest.
        accumulate: micro-batches into which a process's share of a batch is split.
        strategy: with several processes, "ddp" keeps all weights on each of them, and "fsdp" splits
            the weights.
        world: this process's place among several.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: Literal["none", "block", "whole"] = "none"
    checkpointing: bool = False
    accumulate: int = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"
    world: World = field(default_factory=World)

    def __post_init__(self) -> None:
        check_fields(self, "precision", "compile", "strategy")
        if type(self.accumulate) is not int or self.accumulate < 1:
            raise ValueError(f"accumulate: expected at least 1, got {self.accumulate!r}")
        if self.split and self.compile == "whole":
            raise ValueError("compile: expected 'block' or 'none' with fsdp, got 'whole'")

    @property
    def split(self) -> bool:
        """Whether the weights are split over processes."""
        return self.strategy == "fsdp" and self.world.size > 1

    def check_batch_size(self, batch_size: int) -> None:
        """Raise a ValueError unless a batch divides into the processes' micro-batches."""
        parts = self.world.size * self.accumulate
        if batch_size % parts:
            why = f"{self.world.size} processes x {self.accumulate} micro-batches"
            raise ValueError(
                f"batch_size: expected a multiple of {parts} ({why}), got {batch_size}"
            )

    def environment(self) -> dict[str, Any]:
        """Return what a step's bits depend on, besides config, recipe and data."""
        return {
            "torch": torch.__version__,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "precision": self.precision,
            "compile": self.compile,
            "checkpointing": self.checkpointing,
            "accumulate": self.accumulate,
            "processes": self.world.size,
            "strategy": self.strategy if self.world.size > 1 else None,
        }

    def warn_of_changes(self, then: Any) -> None:
        """Warn of everything in which the `environment` of a saved run differs from this one."""
        for name, now in self.environment().items():
            before = then.get(name) if isinstance(then, dict) else None
            if before != now:
                warn(
                    f"{name}: the run was saved under {before}, and goes on under {now}; its bits "
                    "will differ from those of an uninterrupted run"
                )
