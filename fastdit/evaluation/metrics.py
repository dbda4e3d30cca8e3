"""FID, Inception Score, precision and recall, from the features of images."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

NEIGHBOURS = 3  # of an image, in precision and recall
SPLIT = 5000  # images of one Inception Score, of which the mean is reported

_ROWS = 8192  # features that are converted to float64 at once
_DISTANCES = 2**26  # distances between images that are in memory at once
_ASYMMETRY = 1e-10  # relative, of covariances that were summed in float64 over millions of images
_EPS = torch.finfo(torch.float64).eps


class Moments(NamedTuple):
    """Mean [D] and covariance [D, D] of features in float64, and how far they were rounded."""

    mean: Tensor
    covariance: Tensor
    rounding: float = _EPS


def moments(features: Tensor) -> Moments:
    """Return the mean and the unbiased covariance of features.

    Args:
        features: [N, D] in any float dtype, on the CPU; N of at least 2.

    Raises:
        ValueError: there are fewer than 2 rows, or a feature is not finite.
    """
    if len(features) < 2:
        raise ValueError(
            f"features: expected 2 images or more for a covariance, got {len(features)}"
        )
    mean = features.mean(dim=0, dtype=torch.float64)
    total = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for rows in features.split(_ROWS):
        centred = rows.double() - mean
        total.addmm_(centred.T, centred)
    found = Moments(mean, total / (len(features) - 1))
    check_moments("features", found)
    return found


def frechet_distance(first: Moments, second: Moments) -> float:
    """Return the squared Frechet distance of two normal distributions, the FID of their features.

    `|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))`. The last trace is the sum of the roots of
    the eigenvalues of `S1^(1/2) S2 S1^(1/2)`. That matrix is symmetric, and has no negative
    eigenvalues, whether or not the covariances have full rank. A root of `S1 S2` itself
    (`scipy.linalg.sqrtm`) may turn out complex or NaN.

    Args:
        first: mean and covariance of D features.
        second: mean and covariance of as many features.

    Returns:
        The distance; at least 0.

    Raises:
        ValueError: the sizes differ, a value is not finite, a matrix is not a covariance, or the
            eigenvalues are wrong by more than rounding.

    Source: Dowson & Landau 1982; Heusel et al. 2017, equation 6.
    """
    if first.covariance.shape != second.covariance.shape:
        sizes = f"{len(first.mean)} and {len(second.mean)}"
        raise ValueError(f"statistics: expected the same number of features, got {sizes}")
    check_moments("the first statistics", first)
    check_moments("the second statistics", second)
    root = _square_root(first)
    product = root @ second.covariance @ root
    values = _eigenvalues((product + product.T) / 2)
    scale = float(first.covariance.norm() * second.covariance.norm())
    if float(values.min()) < -_tolerance(first, second) * scale:
        _refuse(f"the product has the eigenvalue {float(values.min()):.3g}")
    traces = first.covariance.trace() + second.covariance.trace()
    difference = first.mean - second.mean
    between = difference.dot(difference) + traces - 2 * values.clamp(min=0).sqrt().sum()
    return max(float(between), 0.0)  # equal distributions are apart by a rounding of either sign


def check_moments(what: str, found: Moments) -> None:
    """Raise a ValueError unless the values are finite and the covariance is symmetric."""
    if not (found.mean.isfinite().all() and found.covariance.isfinite().all()):
        raise ValueError(f"{what}: expected finite numbers, got NaN or Inf")
    apart = float((found.covariance - found.covariance.T).abs().max())
    if apart > max(_ASYMMETRY, 100 * found.rounding) * float(found.covariance.abs().max()):
        raise ValueError(f"{what}: expected a symmetric covariance, got entries {apart:.3g} apart")


def _tolerance(*found: Moments) -> float:
    """Return the relative error that rounding explains in an eigenvalue."""
    return max(len(found[0].mean), 100) * max(m.rounding for m in found)


def _square_root(found: Moments) -> Tensor:
    """Return the symmetric square root of a covariance, once it was squared to check it."""
    covariance = (found.covariance + found.covariance.T) / 2
    try:
        values, vectors = torch.linalg.eigh(covariance)
    except RuntimeError as error:  # torch.linalg.LinAlgError
        _refuse(str(error))
    allowed = _tolerance(found) * float(covariance.norm())
    if float(values.min()) < -allowed:
        _refuse(f"one has the eigenvalue {float(values.min()):.3g}")
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # The clamped eigenvalues, and the rounding of all the others.
    residue = float((root @ root - covariance).norm())
    if not residue <= allowed * len(values) ** 0.5:
        _refuse(f"the square of a root is off by {residue:.3g}")
    return root


def _eigenvalues(matrix: Tensor) -> Tensor:
    try:
        values = torch.linalg.eigvalsh(matrix)
    except RuntimeError as error:  # torch.linalg.LinAlgError
        _refuse(str(error))
    # The sum of the eigenvalues is the trace, that of their squares the square of the norm.
    allowed = max(len(values), 100) * _EPS * float(matrix.norm()) * len(values) ** 0.5
    for found, expected in (
        (values.sum(), matrix.trace()),
        (values.norm(), matrix.norm()),
    ):
        if not abs(float(found - expected)) <= allowed:
            _refuse(f"the product has eigenvalues that are off by {float(found - expected):.3g}")
    return values


def _refuse(reason: str) -> NoReturn:
    causes = "they are damaged or of low precision, or this machine's LAPACK is wrong"
    raise ValueError(f"covariances: expected two that have square roots, but {reason}; {causes}")


class InceptionScore(NamedTuple):
    """Mean and standard deviation of the splits' scores, and the number of splits."""

    mean: float
    std: float
    splits: int


def inception_score(logits: Tensor, split: int = SPLIT) -> InceptionScore:
    """Return the Inception Score: the mean of `exp(E[KL(p(y|x) || p(y))])` over splits.

    Images are split in the order of the rows, into parts of equal size that is as close to `split`
    as it can be: ten parts of 5,000 for 50,000 images.

    Args:
        logits: [N, K] in any float dtype.
        split: images per part.

    Raises:
        ValueError: a logit is not finite.

    Source: Salimans et al. 2016.
    """
    if not logits.isfinite().all():
        raise ValueError("logits: expected finite numbers, got NaN or Inf")
    parts = logits.tensor_split(max(1, round(len(logits) / split)))
    scores = []
    for part in parts:
        each = part.double().log_softmax(dim=1)
        together = each.logsumexp(dim=0) - torch.tensor(len(part), dtype=torch.float64).log()
        scores.append((each.exp() * (each - together)).sum(dim=1).mean().exp())
    stacked = torch.stack(scores)
    return InceptionScore(float(stacked.mean()), float(stacked.std(correction=0)), len(parts))


def precision_and_recall(
    samples: Tensor, reference: Tensor, neighbours: int = NEIGHBOURS, progress: bool = False
) -> tuple[float, float]:
    """Return the shares of samples among reference images, and of reference images among samples.

    An image is among others if its features are as close to those of one of them as that one's
    `neighbours`-th neighbour is. Distances are computed in blocks, so that memory does not grow
    with the product of the numbers of images.

    Args:
        samples: [N, D] in float32, on the device that computes.
        reference: [M, D] on the same device.
        neighbours: which neighbour of an image is the farthest of its surroundings.
        progress: whether to show a bar.

    Returns:
        (precision, recall).

    Raises:
        ValueError: there are too few images to have that many neighbours.

    Source: Kynkaanniemi et al. 2019, equations 1 and 2, on the features of Dhariwal & Nichol 2021.
    """
    fewest = min(len(samples), len(reference))
    if fewest <= neighbours:
        expected = f"expected more than {neighbours} for precision and recall"
        raise ValueError(f"images: {expected}, got {fewest}")
    centre = reference.mean(dim=0)  # nearer to 0, features lose less in the squares of distances
    samples, reference = samples - centre, reference - centre
    found, covered = [], torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    total = 2 * len(samples) + len(reference)
    settings = dict(unit="image", desc="precision and recall", disable=not progress, delay=1)
    with tqdm(total=total, **settings) as bar:
        reference_radii = _radii(reference, neighbours, bar)
        radii = _radii(samples, neighbours, bar)
        for rows, own in zip(*(_blocks(t, len(reference)) for t in (samples, radii)), strict=True):
            between = _squared_distances(rows, reference)
            found.append((between <= reference_radii).any(dim=1))
            covered |= (between <= own[:, None]).any(dim=0)
            bar.update(len(rows))
    return float(torch.cat(found).double().mean()), float(covered.double().mean())


def _blocks(rows: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Cut rows into blocks whose distances to so many columns fit into memory."""
    return rows.split(max(1, _DISTANCES // columns))


def _radii(features: Tensor, neighbours: int, bar: tqdm) -> Tensor:
    """Return the squared distance of each row to its neighbour of that rank."""
    radii = []
    for rows in _blocks(features, len(features)):
        # The nearest is the row itself.
        nearest = _squared_distances(rows, features).topk(neighbours + 1, largest=False).values
        radii.append(nearest[:, -1])
        bar.update(len(rows))
    return torch.cat(radii)


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """Return [N, M], the squared distances between the rows of [N, D] and [M, D]."""
    squares = first.square().sum(dim=1)[:, None] + second.square().sum(dim=1)
    return torch.addmm(squares, first, second.T, alpha=-2).clamp_(min=0)
