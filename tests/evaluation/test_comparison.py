"""`evaluate` with a small network, against formulas written out here."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from fastdit.evaluation import (
    Features,
    evaluate,
    inception_score,
    precision_and_recall,
)


def write(path, count, high=256, size=8, **others):
    generator = np.random.default_rng(count)
    images = generator.integers(0, high, (count, size, size, 3), dtype=np.uint8)
    np.savez(path, arr_0=images, **others)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def distance(first, second):
    """The Frechet distance of two sets of features, by singular values."""
    sets = [x.double() for x in (first, second)]
    factors = [(x - x.mean(dim=0)) / math.sqrt(len(x) - 1) for x in sets]
    shared = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    traces = sum(f.square().sum() for f in factors)
    between = (sets[0].mean(dim=0) - sets[1].mean(dim=0)).square().sum()
    return float(between + traces - 2 * shared)


@pytest.fixture
def sets(tmp_path):
    samples, reference = tmp_path / "samples.npz", tmp_path / "reference.npz"
    return samples, reference, write(samples, 30), write(reference, 20, high=230)


def test_images_are_compared_with_images(sets, network):
    samples, reference, own, theirs = sets
    found = evaluate(samples, reference, network, batch_size=7)
    own, theirs = network(own), network(theirs)
    assert found.fid == pytest.approx(distance(own.pool, theirs.pool), rel=1e-6)
    assert found.sfid == pytest.approx(distance(own.spatial, theirs.spatial), rel=1e-6)
    assert found.inception_score == pytest.approx(inception_score(own.logits).mean)
    both = precision_and_recall(own.pool, theirs.pool)
    assert (found.precision, found.recall) == pytest.approx(both)
    assert (found.samples, found.reference_images, found.splits) == (30, 20, 1)
    assert not found.fid_from_statistics and not found.sfid_from_statistics


def test_the_batch_size_changes_nothing(sets, network):
    samples, reference, *_ = sets
    first, second = (evaluate(samples, reference, network, batch_size=n) for n in (1, 64))
    assert first.fid == pytest.approx(second.fid, rel=1e-5)
    assert network.seen == [1] * 50 + [30, 20]


def numpy_statistics(features, suffix=""):
    x = features.numpy()
    return {f"mu{suffix}": x.mean(axis=0), f"sigma{suffix}": np.cov(x, rowvar=False)}


def test_statistics_stand_for_their_images(sets, network, tmp_path):
    samples, reference, _, theirs = sets
    features = network(theirs)
    path = tmp_path / "statistics.npz"
    np.savez(path, **numpy_statistics(features.pool))
    whole, found = (evaluate(samples, r, network) for r in (reference, path))
    assert found.fid == pytest.approx(whole.fid, rel=1e-5)
    assert found.sfid is found.precision is found.recall is None
    assert found.inception_score == whole.inception_score and found.reference_images == 0
    np.savez(path, **numpy_statistics(features.spatial, "_s"))
    found = evaluate(samples, path, network)
    assert found.fid is None and found.sfid == pytest.approx(whole.sfid, rel=1e-5)


def test_adms_batches_give_statistics_for_fid_and_images_for_precision(sets, network, tmp_path):
    samples, reference, own, theirs = sets
    others = network(write(tmp_path / "others.npz", 40, high=200))
    path = tmp_path / "batch.npz"
    given = numpy_statistics(others.pool) | numpy_statistics(others.spatial, "_s")
    np.savez(path, arr_0=theirs.permute(0, 2, 3, 1).numpy(), **given)
    found, images = (evaluate(samples, r, network) for r in (path, reference))
    assert found.fid == pytest.approx(distance(network(own).pool, others.pool), rel=1e-5)
    assert found.sfid == pytest.approx(distance(network(own).spatial, others.spatial), rel=1e-5)
    assert (found.precision, found.recall) == (images.precision, images.recall)
    assert found.fid_from_statistics and found.sfid_from_statistics


def test_a_folder_is_an_npz_of_its_images(sets, network, tmp_path):
    samples, reference, own, _ = sets
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, image in enumerate(own.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    assert evaluate(folder, reference, network) == evaluate(samples, reference, network)
    assert evaluate(folder, reference, network, image_size=8).samples == 30
    with pytest.raises(ValueError, match="image_size: expected a folder of images to crop, got"):
        evaluate(samples, reference, network, image_size=8)
    with pytest.raises(ValueError, match="image_size: expected a positive integer, got 0"):
        evaluate(folder, reference, network, image_size=0)


def test_few_images_are_told(sets, tmp_path, network):
    samples, reference, *_ = sets
    few = tmp_path / "few.npz"
    write(few, 6)
    with pytest.warns(UserWarning, match="few.npz: 6 images are few beside 6 features") as seen:
        evaluate(few, reference, network)
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="few.npz: 6 images are few beside 6 features"):
        evaluate(samples, few, network)


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_images_are_refused_before_the_network_runs(count, sets, tmp_path, network):
    samples, reference, *_ = sets
    few = tmp_path / "few.npz"
    write(few, count)
    for pair in ((few, reference), (samples, few)):
        with pytest.raises(ValueError, match=f"few.npz: expected 4 images or more, got {count}"):
            evaluate(*pair, network)
    assert not network.seen


def test_one_image_has_no_distance_from_statistics(sets, network, tmp_path):
    write(tmp_path / "one.npz", 1)
    np.savez(tmp_path / "s.npz", **numpy_statistics(network(sets[3]).pool))
    with pytest.raises(ValueError, match="one.npz: expected 2 images or more, got 1"):
        evaluate(tmp_path / "one.npz", tmp_path / "s.npz", network)


def test_another_size_of_the_reference_is_told(sets, network, tmp_path):
    write(tmp_path / "large.npz", 20, size=16)
    with pytest.warns(UserWarning, match="images of 8 x 8 and 16 x 16 pixels; the network scales"):
        evaluate(sets[0], tmp_path / "large.npz", network)


def test_statistics_of_another_network_are_refused_after_one_batch(sets, network, tmp_path):
    path = tmp_path / "s.npz"
    np.savez(path, **numpy_statistics(torch.randn(20, 9)))
    with pytest.raises(ValueError, match="statistics of 6 features, got 9"):
        evaluate(sets[0], path, network, batch_size=4)
    assert network.seen == [4]


def test_features_that_are_not_finite_are_refused(sets, network):
    def broken(images):
        found = network(images)
        return Features(found.pool / 0, found.spatial, found.logits)

    with pytest.raises(ValueError, match="features: expected finite numbers"):
        evaluate(*sets[:2], broken)


def test_too_little_memory_names_the_batch_size(sets):
    def large(images):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(ValueError, match="batch_size: .* does not hold 64 images; choose fewer"):
        evaluate(*sets[:2], large)
    with pytest.raises(ValueError, match="batch_size: expected a positive integer, got 0"):
        evaluate(*sets[:2], large, batch_size=0)


def test_convolutions_have_no_tf32(sets, network):
    before, seen = torch.backends.cudnn.allow_tf32, []
    torch.backends.cudnn.allow_tf32 = True

    def watched(images):
        seen.append(torch.backends.cudnn.allow_tf32)
        return network(images)

    try:
        evaluate(*sets[:2], watched)
        assert seen == [False, False] and torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before
