"""What people look at while a model trains: a progress bar, metrics, TensorBoard, and samples."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from fastdit.data.images import to_pixels, write_grid
from fastdit.model import DiT
from fastdit.train.run_folder import RunFolder


class Shown(NamedTuple):
    """Samples of a model, and what was measured of them."""

    images: Tensor  # [b, C, H, W], those that are shown
    columns: int  # of the grid that shows them
    number: int  # of samples that were made, and measured if anything is
    measured: dict[str, float]


class Monitor:
    """Receives a run's measurements, and writes and shows them.

    Every process has a monitor, but only that of rank 0 has outputs.
    """

    def __init__(
        self,
        folder: RunFolder | None = None,
        *,
        log_every: int = 10,
        sample_every: int = 0,
        sample: Callable[[DiT], Shown] | None = None,
        progress: bool = False,
    ) -> None:
        """Choose what is shown, and how often.

        Args:
            folder: gets `metrics.jsonl`, sample grids, and TensorBoard's files if TensorBoard is
                installed; None writes nothing.
            log_every: steps between two measurements; each waits for the device.
            sample_every: steps between two grids of samples; 0 makes one at the end only.
            sample: makes the samples, such as `fastdit.train.samples.shapes_sampler(...)`.
            progress: whether to show a progress bar.
        """
        for name, value in (("log_every", log_every), ("sample_every", sample_every + 1)):
            if value < 1:
                raise ValueError(f"{name}: expected a number of steps, got {value}")
        self.folder, self.log_every, self.sample_every = folder, log_every, sample_every
        self._sample, self._progress = sample, progress
        self.shown: Shown | None = None  # the last samples
        self.grid: Path | None = None  # the file that shows them
        self._bar: Any = None
        self._board: Any = None

    @property
    def cadence(self) -> dict[str, Any]:
        """What the processes of a run must agree on."""
        shows = self._sample is not None
        return {"log_every": self.log_every, "sample_every": self.sample_every, "shows": shows}

    def begin(self, step: int, steps: int) -> None:
        """Open the outputs of a run that starts or continues at a step."""
        self._bar = tqdm(
            total=steps, initial=step, desc="training", unit="step", disable=not self._progress
        )
        if self.folder is not None and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            board = self.folder.path / "tensorboard"
            self._board = SummaryWriter(str(board), purge_step=step + 1)

    def advance(self) -> None:
        """Count one step."""
        self._bar.update()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record what was measured after a number of steps."""
        if "loss" in values:
            speed = ", {images_per_second:.0f} img/s, MFU {mfu:.1%}" if "mfu" in values else ""
            self._bar.set_postfix_str(("loss {loss:.4f}" + speed).format(**values))
        if self.folder is not None:
            self.folder.metrics.parent.mkdir(parents=True, exist_ok=True)
            with open(self.folder.metrics, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def due(self, step: int, last: bool) -> bool:
        """Return whether samples should be made after a number of steps."""
        due = last or (self.sample_every > 0 and step % self.sample_every == 0)
        return due and self._sample is not None

    def show(self, step: int, model: DiT) -> None:
        """Make samples of a model, write their grid, and record what was measured of them."""
        assert self._sample is not None
        self._bar.set_description("sampling")
        self.shown = shown = self._sample(model)
        self._bar.set_description("training")
        if self.folder is not None:
            self.grid = self.folder.samples / f"step-{step:08d}.png"
            zoom = max(1, 48 // max(shown.images.shape[-2:]))
            write_grid(self.grid, to_pixels(shown.images), shown.columns, zoom)
        if shown.measured:
            self.log(step, shown.measured)

    def end(self) -> None:
        """Close the outputs, whatever ended the run."""
        for output in (self._bar, self._board):
            if output is not None:
                output.close()
