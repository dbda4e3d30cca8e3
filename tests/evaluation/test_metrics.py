"""FID, Inception Score, precision and recall against closed forms and plain loops."""

import math

import numpy as np
import pytest
import torch

from fastdit.evaluation import metrics
from fastdit.evaluation.metrics import (
    Moments,
    frechet_distance,
    inception_score,
    moments,
    precision_and_recall,
)


def covariance(size, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(size, 2 * size, generator=g, dtype=dtype)
    return a @ a.T / (2 * size)


def centred(covariance):
    return Moments(torch.zeros(len(covariance), dtype=torch.float64), covariance)


def test_moments_are_those_of_numpy(monkeypatch):
    monkeypatch.setattr(metrics, "_ROWS", 3)  # so that ten rows are four blocks
    features = torch.randn(10, 4) * 3 + 100
    found = moments(features)
    assert np.allclose(found.mean, features.double().numpy().mean(axis=0), rtol=1e-14)
    assert np.allclose(found.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-12)


def test_commuting_covariances_have_the_distance_of_their_deviations():
    basis = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0]
    first, second = torch.rand(2, 16, dtype=torch.float64) + 0.1
    shift = torch.randn(16, dtype=torch.float64)
    a = Moments(shift, (basis * first) @ basis.T)
    b = centred((basis * second) @ basis.T)
    expected = shift.square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_two_by_two_covariances_have_the_closed_form(seed):
    """The root of a 2 x 2 matrix M has the trace (tr M + 2 det(M)^(1/2))^(1/2)."""
    first, second = covariance(2, 2 * seed), covariance(2, 2 * seed + 1)
    product = first @ second
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = float(first.trace() + second.trace()) - 2 * root
    assert frechet_distance(centred(first), centred(second)) == pytest.approx(expected, rel=1e-10)


def test_fewer_images_than_features_have_the_distance_of_their_singular_values():
    """With S = X X^T, the trace of (S1 S2)^(1/2) is the sum of the singular values of X1^T X2."""
    sets = torch.randn(5, 32, dtype=torch.float64), torch.randn(7, 32, dtype=torch.float64) + 1
    factors = [(x - x.mean(dim=0)) / math.sqrt(len(x) - 1) for x in sets]
    shared = np.linalg.svd((factors[0] @ factors[1].T).numpy(), compute_uv=False).sum()
    between = (sets[0].mean(dim=0) - sets[1].mean(dim=0)).square().sum()
    expected = float(between + sum(f.square().sum() for f in factors)) - 2 * shared
    assert frechet_distance(*map(moments, sets)) == pytest.approx(expected, rel=1e-6)


def test_a_distribution_is_at_distance_0_from_itself_and_never_below():
    for rows in (3, 10, 200):
        found = moments(torch.randn(rows, 24))
        distance = frechet_distance(found, found)
        assert 0 <= distance < 1e-5


def test_distributions_without_a_common_direction_are_apart_by_their_traces():
    first = torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64))
    second = torch.diag(torch.tensor([0.0, 0.0, 3.0, 4.0], dtype=torch.float64))
    assert frechet_distance(centred(first), centred(second)) == pytest.approx(10.0, rel=1e-12)


def test_statistics_that_were_rounded_to_float32_are_taken():
    first, second = covariance(40, 0), covariance(40, 1)
    exact = frechet_distance(centred(first), centred(second))
    low = torch.linalg.qr(torch.randn(40, 3, dtype=torch.float64))[0]
    deficient = (low @ low.T).float().double()  # its eigenvalues are 0 but for float32's rounding
    eps = torch.finfo(torch.float32).eps
    rounded = Moments(torch.zeros(40, dtype=torch.float64), first.float().double(), eps)
    assert frechet_distance(rounded, centred(second)) == pytest.approx(exact, rel=1e-4)
    with pytest.raises(ValueError, match="has the eigenvalue -"):
        frechet_distance(centred(deficient), centred(second))
    frechet_distance(centred(deficient)._replace(rounding=eps), centred(second))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m._replace(mean=m.mean * math.nan), "expected finite numbers, got NaN"),
        (lambda m: m._replace(covariance=m.covariance * math.inf), "expected finite numbers"),
        (lambda m: m._replace(covariance=m.covariance.triu()), "a symmetric covariance"),
        (lambda m: m._replace(covariance=-m.covariance), "has the eigenvalue -"),
        (lambda m: Moments(m.mean[:3], m.covariance[:3, :3]), "same number of features, got"),
    ],
    ids=["nan", "inf", "asymmetric", "negative", "size"],
)
def test_what_is_no_covariance_is_refused(change, message):
    good = centred(covariance(4, 0))
    for pair in ((change(good), good), (good, change(good))):
        with pytest.raises(ValueError, match=message):
            frechet_distance(*pair)


def test_wrong_eigenvalues_are_noticed(monkeypatch):
    """Some builds of BLAS have returned them without an error."""
    found = centred(covariance(8, 0))
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (eigh(m)[0] * 1.01, eigh(m)[1]))
    with pytest.raises(ValueError, match="square of a root is off by .* LAPACK"):
        frechet_distance(found, found)
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (eigh(m)[0] * math.nan, eigh(m)[1]))
    with pytest.raises(ValueError, match="square of a root is off by nan"):
        frechet_distance(found, found)
    monkeypatch.undo()
    eigvalsh = torch.linalg.eigvalsh
    for wrong in (
        lambda m: eigvalsh(m) * math.nan,
        lambda m: eigvalsh(m) * 1.001,
        lambda m: eigvalsh(m).mean().expand(8),
    ):
        monkeypatch.setattr(torch.linalg, "eigvalsh", wrong)
        with pytest.raises(ValueError, match="eigenvalues that are off by .* LAPACK is wrong"):
            frechet_distance(found, found)


def test_a_solver_that_fails_is_no_traceback(monkeypatch):
    def fail(matrix):
        raise torch._C._LinAlgError("it did not converge")

    found = centred(covariance(8, 0))
    for name in ("eigvalsh", "eigh"):
        monkeypatch.setattr(torch.linalg, name, fail)
        with pytest.raises(ValueError, match="square roots, but it did not converge"):
            frechet_distance(found, found)


def test_moments_need_two_finite_rows():
    with pytest.raises(ValueError, match="2 images or more for a covariance, got 1"):
        moments(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="finite numbers, got NaN"):
        moments(torch.tensor([[1.0, math.nan], [1.0, 2.0]]))


def test_the_inception_score_of_known_predictions():
    assert inception_score(torch.zeros(30, 7)).mean == pytest.approx(1.0)
    certain = 1e4 * torch.eye(5).repeat(6, 1)  # each class as often, with probabilities of 0 and 1
    assert inception_score(certain).mean == pytest.approx(5.0)


def test_the_inception_score_is_the_mean_over_parts_in_order():
    logits = torch.randn(20, 6) * 2
    p = logits.double().softmax(dim=1).numpy()
    scores = []
    for part in np.split(p, 4):
        kl = (part * np.log(part / part.mean(axis=0))).sum(axis=1)
        scores.append(np.exp(kl.mean()))
    found = inception_score(logits, split=5)
    assert found == pytest.approx((np.mean(scores), np.std(scores), 4), rel=1e-12)
    assert [inception_score(logits[:n], split=5).splits for n in (2, 7, 8, 12, 13)] == [
        1,
        1,
        2,
        2,
        3,
    ]
    with pytest.raises(ValueError, match="logits: expected finite"):
        inception_score(logits * math.nan)


def plain_precision_and_recall(samples, reference, k):
    def inside(points, others):
        count = 0
        for p in points:
            for i, o in enumerate(others):
                own = sorted(np.linalg.norm(o - x) for j, x in enumerate(others) if j != i)
                if np.linalg.norm(p - o) <= own[k - 1]:
                    count += 1
                    break
        return count / len(points)

    return inside(samples, reference), inside(reference, samples)


@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("shift", [0.0, 1000.0], ids=["near 0", "far from 0"])
def test_precision_and_recall_are_those_of_the_plain_loop(neighbours, shift, monkeypatch):
    monkeypatch.setattr(metrics, "_DISTANCES", 50)  # so that there are several blocks
    samples, reference = torch.randn(23, 3), 1.3 * torch.randn(17, 3) + 0.6
    expected = plain_precision_and_recall(samples.numpy(), reference.numpy(), neighbours)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    found = precision_and_recall(samples + shift, reference + shift, neighbours)
    assert found == pytest.approx(expected)


def test_equal_sets_have_precision_and_recall_1_and_distant_ones_0():
    features = torch.randn(9, 5)
    assert precision_and_recall(features, features) == (1.0, 1.0)
    assert precision_and_recall(features, features + 100) == (0.0, 0.0)
    collapsed = features[:1].expand(9, 5)
    precision, recall = precision_and_recall(collapsed, features)
    assert precision == 1.0 and recall <= 1 / 9


def test_precision_and_recall_need_more_images_than_neighbours():
    with pytest.raises(ValueError, match="more than 3 for precision and recall, got 3"):
        precision_and_recall(torch.randn(3, 2), torch.randn(9, 2))
