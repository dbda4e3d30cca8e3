"""What a source's batches must be, checked on the host before they go to the device.

A label out of range would train another class's row or the null row, and pixels in another range
would train a model whose samples look wrong; neither shows in the loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdit.errors import warn
from fastdit.train.sources import ImageBatch

_SCALING = "x / 127.5 - 1 scales pixels of 0 to 255"
_PIXEL_CHANNELS = (1, 3)
_BEYOND = 1.5  # the largest magnitude that overshooting resampling gives to pixels in [-1, 1]
_JUDGED = 64  # images, after which pixels that were never negative are warned of
_SPREAD = 0.5  # between the lowest and the highest pixel of images that are not uniform


class BatchChecker:
    """Checks the batches of one source, and warns at most once of the range of its pixels."""

    def __init__(
        self,
        sample_shape: tuple[int, int, int],
        num_classes: int | None,
        *,
        halves: bool = False,
        warns: bool = True,
    ) -> None:
        """Set what to expect.

        Args:
            sample_shape: [C, H, W] of one image.
            num_classes: number of classes; None for a model without classes, whose labels are not
                looked at.
            halves: whether images of a 16-bit dtype stay in it, because the model takes them.
            warns: whether to warn of pixels that are not in [-1, 1].
        """
        self._shape, self._num_classes, self._halves = sample_shape, num_classes, halves
        self._warns = warns and sample_shape[0] in _PIXEL_CHANNELS
        self._seen, self._low, self._high = 0, 0.0, 0.0

    def check(self, batch: ImageBatch, rows: Tensor) -> ImageBatch:
        """Return a source's batch in the dtypes that a run needs.

        Args:
            batch: what the source returned.
            rows: [b] int64, the rows that it was asked for.

        Raises:
            ValueError: shapes, dtypes or labels are not as a `Source` promises, or a pixel is NaN
                or Inf.
        Warns:
            UserWarning: the images look like pixels, but are not in [-1, 1].
        """
        if not isinstance(batch, tuple) or len(batch) != 3:
            got = f"a tuple of {len(batch)}" if isinstance(batch, tuple) else type(batch).__name__
            raise ValueError(f"data: expected take to return (mean, std, labels), got {got}")
        mean, std, labels = batch
        parts = {"images": mean} if std is None else {"means": mean, "deviations": std}
        checked = [self._checked_images(name, t, rows) for name, t in parts.items()]
        images = [t for t, _, _ in checked]
        if std is None and self._warns:
            self._watch_range(*checked[0])
        if self._num_classes is not None:
            labels = _checked_labels(labels, rows, self._num_classes)
        return ImageBatch(images[0], None if std is None else images[1], labels)

    def _checked_images(
        self, name: str, images: Tensor, rows: Tensor
    ) -> tuple[Tensor, float, float]:
        """Return images in the dtype of the run, and their lowest and highest value."""
        expected = [len(rows), *self._shape]
        _check_tensor(name, images)
        if not images.is_floating_point():
            advice = f"expected floats in [-1, 1], got {images.dtype}; {_SCALING}"
            raise ValueError(f"data: {name}: {advice}")
        if list(images.shape) != expected:
            last = [len(rows), *self._shape[1:], self._shape[0]]
            hint = "; permute(0, 3, 1, 2) puts the channels first" * (list(images.shape) == last)
            got = list(images.shape)
            raise ValueError(f"data: {name}: expected shape {expected}, got {got}{hint}")
        if images.dtype == torch.float64 or not self._halves:
            images = images.float()
        low, high = (float(t) for t in images.aminmax())  # both are NaN where a value is
        if not (math.isfinite(low) and math.isfinite(high)):
            row = int(rows[(~images.flatten(1).isfinite()).any(1)][0])
            raise ValueError(f"data: {name}: image {row} holds NaN or Inf")
        return images, low, high

    def _watch_range(self, images: Tensor, low: float, high: float) -> None:
        self._low = min(low, self._low) if self._seen else low
        self._high = max(high, self._high) if self._seen else high
        self._seen += len(images)
        advice = None
        if max(-self._low, self._high) > _BEYOND:
            advice = _SCALING
        elif self._seen >= _JUDGED and self._low >= 0 and self._high - self._low > _SPREAD:
            advice = "2 * x - 1 scales pixels of 0 to 1"
        if advice is not None:
            self._warns = False
            warn(
                f"data: the images reach from {self._low:.3g} to {self._high:.3g}, but samples are "
                f"clipped and shown in [-1, 1]; {advice}"
            )


def _checked_labels(labels: Tensor, rows: Tensor, num_classes: int) -> Tensor:
    """Return labels as int64, once they are known to be of the classes."""
    _check_tensor("labels", labels)
    fractional = labels.is_floating_point() or labels.is_complex()
    if fractional or labels.dtype == torch.bool or labels.shape != rows.shape:
        one_hot = list(labels.shape) == [len(rows), num_classes]
        hint = "; argmax(1) turns one-hot rows into labels" * one_hot
        got = f"{labels.dtype} of shape {list(labels.shape)}"
        raise ValueError(f"data: labels: expected [{len(rows)}] integers, got {got}{hint}")
    labels = labels.long()
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        label, row = int(labels[wrong][0]), int(rows[wrong][0])
        advice = "; subtract 1 if yours count from 1" * (label == num_classes)
        raise ValueError(
            f"data: labels: expected 0 to {num_classes - 1} for {num_classes} classes, counted "
            f"from 0, got {label} of image {row}{advice}"
        )
    return labels


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"data: {name}: expected a tensor, got {type(value).__name__}")
    if value.device.type != "cpu":
        raise ValueError(f"data: {name}: expected a tensor on the host, got {value.device}")
    if value.layout != torch.strided:
        raise ValueError(f"data: {name}: expected a strided tensor, got {value.layout}")
