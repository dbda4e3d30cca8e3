"""Reading shards of labelled images: memory-mapped, in any order."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from fastdit.data.shards import PLAN, read_plan, shard_paths

# What a plan says of where its pictures lie and when they were written, not of what they are.
PLACE = ("source", "stamps")


def plan_digest(plan: dict[str, Any]) -> str:
    """Return a hash of what a plan's shards hold, wherever their pictures lie."""
    held = {name: value for name, value in plan.items() if name not in PLACE}
    content = json.dumps(held, sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class ImageShards:
    """Memory-mapped rows of shards, with their labels.

    Attributes:
        plan: what the shards hold, and how it was made.
        labels: the label of each image.
        classes: names of the classes.
    """

    def __init__(self, folder: Path, what: str, form: tuple[type, int], advice: str) -> None:
        """Open a folder of shards.

        Args:
            folder: the folder.
            what: names the shards in messages.
            form: the arrays' dtype and number of dimensions.
            advice: what to do if something is missing.

        Raises:
            ValueError: there are none, or some are missing.
        """
        plan = read_plan(folder)
        if plan is None or not plan.keys() >= {"num", "batch_size", "labels", "classes"}:
            raise ValueError(f"{folder}: expected {what}, found none")
        self.plan, self._folder, self._form, self._advice = plan, folder, form, advice
        self._size: int = plan["batch_size"]
        self.labels: list[int] = plan["labels"]
        self.classes: list[str] = plan["classes"]
        if len(self.labels) != plan["num"] or not set(self.labels) <= set(range(len(self.classes))):
            raise ValueError(f"{folder / PLAN}: expected {plan['num']} labels of its classes")
        self._parts = shard_paths(folder, plan)
        for part in self._parts:
            if not part.is_file():
                missing = f"{part.name} is not there; {advice}"
                raise ValueError(f"{folder}: expected all of {what}; {missing}")
        self.digest = plan_digest(plan)
        self._seen = self._time_of_plan()
        # Opened on demand, since there may be more shards than the limit on open files.
        self._shard = functools.lru_cache(maxsize=64)(self._open)

    def __len__(self) -> int:
        return len(self.labels)

    def stored(self, i: int) -> np.ndarray:
        """Return what is stored of image i."""
        if not 0 <= i < len(self):
            raise IndexError(f"expected an index in [0, {len(self)}), got {i}")
        return self._shard(i // self._size)[i % self._size]

    def _open(self, i: int) -> np.ndarray:
        path = self._parts[i]
        try:
            shard = np.load(path, mmap_mode="r")
        except (ValueError, EOFError, FileNotFoundError) as error:
            raise ValueError(
                f"{path}: it is damaged or gone; remove it, and {self._advice}"
            ) from error
        self._check_unchanged()
        rows, (dtype, dims) = min(self._size, len(self) - i * self._size), self._form
        shape = (rows, *(shard if i == 0 else self._shard(0)).shape[1:])
        if len(shape) != dims or shard.shape != shape or shard.dtype != dtype:
            got = f"{shard.dtype} of {list(shard.shape)}; remove it, and {self._advice}"
            expected = f"{np.dtype(dtype)} of shape {list(shape)}"
            raise ValueError(f"{path}: expected {expected}, got {got}")
        return shard

    def _time_of_plan(self) -> int:
        return (self._folder / PLAN).stat().st_mtime_ns

    def _check_unchanged(self) -> None:
        """Raise a ValueError if another process has put other pictures into the folder.

        Stale shards are removed before a new plan is written, and new ones are written after it.
        So a shard is of the plan that is there once the shard is open.
        """
        if (seen := self._time_of_plan()) == self._seen:
            return
        plan = read_plan(self._folder)
        if plan is None or plan_digest(plan) != self.digest:
            raise ValueError(f"{self._folder}: its pictures were changed while it was read")
        self._seen = seen
