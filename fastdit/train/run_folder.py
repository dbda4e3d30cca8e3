"""A run's folder. Files are written atomically, so that a kill leaves the last checkpoint whole.

runs/toy/
  model.safetensors                      the model to sample from: averaged if the recipe says so
  checkpoints/step-00000700.safetensors  everything needed to resume; the last few are kept
  metrics.jsonl, tensorboard/            what was measured during training
  samples/step-00000700.png              samples of the model at that step
  .lock                                  locked while the run is in progress
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastdit.checkpoints.native import read_tensors, write_tensors
from fastdit.checkpoints.pickles import is_pickle
from fastdit.checkpoints.runs import WEIGHTS_FILE, step_files
from fastdit.data.files import LOCK, atomic_path, locked, remove_leftovers
from fastdit.errors import warn


class Saved(NamedTuple):
    """The contents of a checkpoint."""

    path: Path
    tensors: dict[str, Tensor]  # mapped from the file
    header: dict[str, Any]


class RunFolder:
    """Reads and writes the files of a run."""

    def __init__(self, path: str | os.PathLike[str], keep: int = 2) -> None:
        """Use a folder, which need not exist yet, and keep the last `keep` checkpoints in it."""
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, got {keep}")
        self.path, self.keep = Path(path), keep
        self.weights, self.metrics = self.path / WEIGHTS_FILE, self.path / "metrics.jsonl"
        self.samples = self.path / "samples"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Return (step, file) of every checkpoint, oldest first; some may be damaged."""
        return step_files(self.path)

    def check_unused(self) -> None:
        """Raise a FileExistsError if a new run would overwrite the files of an older one."""
        if self.checkpoints():
            if (self.path / LOCK).is_file():
                with self.claimed():  # if the run is still going on, the error names its process
                    pass
            advice = "continue it (--resume auto), or name another folder"
            raise FileExistsError(f"out: {self.path} already holds a run; {advice}")
        if self.weights.exists():
            raise FileExistsError(f"out: {self.weights} already exists; name another folder")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Lock the folder against other processes; a killed process releases its lock too.

        Raises:
            FileExistsError: another process holds the lock; the message has the other's id.
        Warns:
            UserWarning: the file system does not support locks.
        """
        with locked(self.path, "run"):
            yield

    def write(self, step: int, tensors: Mapping[str, Tensor], header: dict[str, Any]) -> None:
        """Write a checkpoint, then remove old ones and the temporary files of killed processes.

        Raises:
            OSError: the checkpoint could not be written; the older ones are unchanged.
        """
        path = self.path / "checkpoints" / f"step-{step:08d}.safetensors"
        write_tensors(path, tensors, {"step": step, **header})
        remove_leftovers(path.parent)
        earlier = [old for at, old in self.checkpoints() if at < step]
        for old in earlier[: len(earlier) - (self.keep - 1)]:
            old.unlink(missing_ok=True)

    def newest(self) -> Saved | None:
        """Read the newest checkpoint that is whole; None if the folder has no checkpoints.

        Raises:
            ValueError: all checkpoints are damaged.
        Warns:
            UserWarning: a newer checkpoint is damaged.
        """
        found = self.checkpoints()
        for _, path in reversed(found):
            try:
                return read(path)
            except (ValueError, FileNotFoundError) as error:  # also for a folder or a broken link
                warn(f"not resumed from: {error}")
        if found:
            advice = "start again in another folder"
            raise ValueError(
                f"{self.path}: none of its {len(found)} checkpoints is whole; {advice}"
            )
        return None

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints and measurements of later steps than the one to resume at."""
        for at, path in self.checkpoints():
            if at > step and (path.is_file() or path.is_symlink()):
                path.unlink()
        if self.metrics.exists():
            kept = [line for line in _lines(self.metrics) if line["step"] <= step]
            with atomic_path(self.metrics) as aside:
                aside.write_text("".join(json.dumps(line) + "\n" for line in kept))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a JSONL file, without any that a kill has cut short."""
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line


def read(path: str | os.PathLike[str]) -> Saved:
    """Read a checkpoint of a run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, or no checkpoint of a run.
    """
    if is_pickle(path):
        raise ValueError(
            f"{path}: expected a checkpoint of fastdit train, got a file of PyTorch's; a new run "
            "starts from its weights by --from"
        )
    tensors, header = read_tensors(path)
    if not header.keys() >= {"step", "config", "recipe", "data", "environment"}:
        got = f"a file with {list(header)}; a run's checkpoints are in its folder's checkpoints/"
        raise ValueError(f"{path}: expected a checkpoint of fastdit train, got {got}")
    return Saved(Path(path), tensors, header)
