"""Samples beside a reference: the metrics that papers on ImageNet report."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastdit.errors import check_positive, warn
from fastdit.evaluation.inception import Features
from fastdit.evaluation.inputs import Images, Reference, describe_size, open_images, open_reference
from fastdit.evaluation.metrics import (
    NEIGHBOURS,
    Moments,
    frechet_distance,
    inception_score,
    moments,
    precision_and_recall,
)

Network = Callable[[Tensor], Features]


@dataclass(frozen=True)
class Evaluation:
    """The metrics of samples, and what they were computed from.

    Attributes:
        fid: Frechet distance of the pooled features; None if the reference has only spatial ones.
        sfid: Frechet distance of the spatial features; None if the reference has only pooled ones.
        inception_score: mean over the splits.
        inception_score_std: standard deviation of the splits.
        precision: share of the samples among the reference's images; None if it has none.
        recall: share of the reference's images among the samples; None if it has none.
        samples: number of samples.
        splits: parts of the samples that the Inception Score is the mean of.
        reference_images: number of images of the reference; 0 if it has statistics only.
        fid_from_statistics: whether the reference brought the statistics that FID compares with.
        sfid_from_statistics: whether it brought those that sFID compares with.
    """

    fid: float | None
    sfid: float | None
    inception_score: float
    inception_score_std: float
    precision: float | None
    recall: float | None
    samples: int
    splits: int
    reference_images: int
    fid_from_statistics: bool
    sfid_from_statistics: bool


def evaluate(
    samples: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    network: Network,
    *,
    batch_size: int = 64,
    image_size: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Return FID, sFID, Inception Score, precision and recall of samples.

    Args:
        samples: an NPZ whose `arr_0` is [N, H, W, 3] uint8, as `fastdit sample` writes it, or a
            folder of images.
        reference: the same, or an NPZ of statistics (`mu`, `sigma`, and `mu_s`, `sigma_s` for
            sFID), or of both, as ADM's reference batches are: then FID and sFID compare with the
            statistics, precision and recall with the images.
        network: takes [B, 3, H, W] uint8 and returns `Features` of B rows each, such as
            `load_inception()`.
        batch_size: images in the network at once.
        image_size: side of the square to which the images of folders are cropped and scaled, as ADM
            prepares ImageNet; None takes them as they are.
        progress: whether to show bars.

    Raises:
        ValueError: images or statistics are missing, damaged or of another kind, there are too few,
            or the network's features do not suit the statistics.

    Source: `evaluations/evaluator.py` of Dhariwal & Nichol 2021 (ADM).
    """
    sets = open_sets(Path(samples), Path(reference), image_size, progress)
    return compare(*sets, network, batch_size, progress)


def open_sets(
    samples: Path, reference: Path, image_size: int | None = None, progress: bool = False
) -> tuple[Images, Reference]:
    """Open what `evaluate` compares, and check all that is known before a network runs."""
    if image_size is not None:
        check_positive("image_size", image_size)
        if not (samples.is_dir() or reference.is_dir()):
            given = f"{samples} and {reference}"
            raise ValueError(f"image_size: expected a folder of images to crop, got {given}")
    images = open_images(samples, image_size, progress)
    against = open_reference(reference, image_size, progress)
    others = against.images
    fewest = 2 if others is None else NEIGHBOURS + 1
    for some in (images, others):
        if some is not None and some.count < fewest:
            raise ValueError(f"{some.path}: expected {fewest} images or more, got {some.count}")
    if others is not None and images.size != others.size:
        sizes = f"{describe_size(images.size)} and {describe_size(others.size)} pixels"
        what = f"samples and reference have images of {sizes}"
        warn(f"{what}; the network scales both to one size, and the metrics measure that too")
    return images, against


def compare(
    images: Images,
    against: Reference,
    network: Network,
    batch_size: int = 64,
    progress: bool = False,
) -> Evaluation:
    """Return the metrics of `evaluate` for sets that were opened."""
    check_positive("batch_size", batch_size)
    settings = network, batch_size, against.statistics, progress
    own, device = _features(images, Features._fields, *settings)
    statistics, shared = dict(against.statistics), None
    if against.images is not None:
        missing = [name for name in ("pool", "spatial") if name not in statistics]
        theirs, _ = _features(against.images, {"pool", *missing}, *settings)
        shared = theirs["pool"]
        _warn_of_few(against.images, [theirs[name] for name in missing])
        statistics |= {name: moments(theirs[name]) for name in missing}
    _warn_of_few(images, [own[name] for name in statistics])
    distances = _distances(own, statistics, progress)
    score = inception_score(own["logits"])
    precision = recall = None
    if shared is not None:
        pooled = own["pool"].to(device), shared.to(device)
        precision, recall = precision_and_recall(*pooled, progress=progress)
    return Evaluation(
        fid=distances.get("pool"),
        sfid=distances.get("spatial"),
        inception_score=score.mean,
        inception_score_std=score.std,
        precision=precision,
        recall=recall,
        samples=images.count,
        splits=score.splits,
        reference_images=0 if against.images is None else against.images.count,
        fid_from_statistics="pool" in against.statistics,
        sfid_from_statistics="spatial" in against.statistics,
    )


def _features(
    images: Images,
    names: Collection[str],
    network: Network,
    batch_size: int,
    statistics: Mapping[str, Moments],
    progress: bool,
) -> tuple[dict[str, Tensor], torch.device]:
    """Return the named features of all images, in float32 on the CPU, and the network's device."""
    kept: dict[str, Tensor] = {}
    settings = dict(unit="image", desc=images.path.name, disable=not progress, delay=1)
    with _float32_convolutions(), tqdm(total=images.count, **settings) as bar:
        done = 0
        for pixels in images.batches(batch_size):
            try:
                found = network(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
            except torch.OutOfMemoryError as error:
                what = f"the device's memory does not hold {batch_size} images"
                raise ValueError(f"batch_size: {what}; choose fewer") from error
            for name in names:
                rows = getattr(found, name)
                if name not in kept:
                    _check_features(name, rows, statistics)
                    kept[name] = torch.empty(images.count, rows.shape[1])
                kept[name][done : done + len(rows)] = rows
            done += len(pixels)
            bar.update(len(pixels))
    return kept, found.pool.device


def _check_features(name: str, features: Tensor, statistics: Mapping[str, Moments]) -> None:
    """Check, once the first batch is known, that a reference's statistics are of such features."""
    if name in statistics and len(statistics[name].mean) != features.shape[1]:
        got = f"{len(statistics[name].mean)}, so that they are of another network"
        raise ValueError(
            f"reference: expected statistics of {features.shape[1]} features, got {got}"
        )


@contextmanager
def _float32_convolutions() -> Iterator[None]:
    """Turn off TF32 for convolutions, which cuDNN uses by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _warn_of_few(images: Images, features: Iterable[Tensor]) -> None:
    """Warn where a set is too small for a covariance of full rank."""
    width = max((t.shape[1] for t in features), default=0)
    if images.count <= width:
        few = f"{images.path}: {images.count:,} images are few beside {width:,} features"
        warn(f"{few}, and the distances come out too high; published ones take 50,000 images")


def _distances(
    features: Mapping[str, Tensor], statistics: Mapping[str, Moments], progress: bool
) -> dict[str, float]:
    """Return the Frechet distance of each kind of features for which there are statistics."""
    distances = {}
    for name in tqdm(statistics, desc="distances", disable=not progress, delay=1):
        distances[name] = frechet_distance(statistics[name], moments(features[name]))
    return distances
