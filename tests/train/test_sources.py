"""The training sets: their images and identities, and the models that fit them."""

import json
import re

import numpy as np
import pytest
import torch

from fastdit import DiTConfig
from fastdit.data.shapes import coloured_shapes
from fastdit.train.sources import (
    Images,
    Latents,
    Shapes,
    check_fits,
    check_same_data,
    open_data,
    open_source,
    variants_of,
)


def test_shapes_are_the_coloured_shapes():
    source = Shapes(per_class=3, seed=5)
    images, labels = coloured_shapes(3, 5)
    rows = torch.tensor([40, 0, 7])
    samples = source.take(rows)
    assert torch.equal(samples.mean, images[rows]) and torch.equal(samples.labels, labels[rows])
    assert samples.std is None and len(source) == 48


def test_latents_are_the_shards_rows(latents):
    folder, means, stds = latents
    source = Latents(folder)
    assert (len(source), source.sample_shape) == (10, (4, 8, 8))
    assert source.label_names == ("cat", "dog", "eel")
    mean, std, labels = source.take(torch.tensor([9, 0, 4]))
    assert torch.equal(mean, torch.from_numpy(means[[9, 0, 4]]))
    assert torch.equal(std, torch.from_numpy(stds[[9, 0, 4]]))
    assert mean.is_contiguous() and std.is_contiguous(), "as pinned memory must be"
    assert labels.tolist() == [2, 0, 1] and labels.dtype == torch.int64


def test_the_second_half_of_the_rows_are_the_flips(flipped_latents):
    folder, means, _ = flipped_latents
    source = Latents(folder)
    assert (len(source), variants_of(source), source.sample_shape) == (10, 2, (4, 8, 8))
    mean, std, labels = source.take(torch.tensor([4, 14, 19]))
    assert torch.equal(mean, torch.from_numpy(np.stack([means[4], -means[4], -means[9]])))
    assert labels.tolist() == [1, 1, 2]
    change(folder, 1, lambda s: np.where(s == s[1, 1, 0, 0, 0], np.nan, s))
    with pytest.raises(ValueError, match="the latent of image 5 is not finite"):
        source.take(torch.tensor([15]))
    change(folder, 0, lambda s: s[:, 0])
    with pytest.raises(ValueError, match=r"expected float32 of shape \[4, 8, 8, 8\]"):
        Latents(folder)


def test_a_source_is_opened_again_from_its_identity(latents):
    for source in (Shapes(2, 1), Latents(latents[0])):
        identity = json.loads(json.dumps(source.identity))
        again = open_source(identity)
        rows = torch.arange(3)
        assert torch.equal(again.take(rows).mean, source.take(rows).mean)
        assert again.identity == source.identity


def test_pictures_are_opened_again_with_their_flips(pictures, tmp_path):
    for flip in (None, True, False):
        source = open_data(pictures, tmp_path / "cache", 8, flip)
        assert (len(source), source.sample_shape) == (6, (3, 8, 8))
        assert variants_of(source) == (1 if flip is False else 2)
        again = open_source(json.loads(json.dumps(source.identity)))
        assert again.identity == source.identity
        rows = torch.arange(6 * variants_of(again))
        batch = source.take(rows)
        assert torch.equal(again.take(rows).mean, batch.mean) and batch.labels[:6].tolist() == (
            [0, 0, 0, 1, 1, 1]
        )
    (tmp_path / "cache").rename(tmp_path / "moved")
    check_same_data(Images(tmp_path / "moved", False).identity, source.identity)
    with pytest.raises(ValueError, match="data: the run was started on"):
        check_same_data(Images(tmp_path / "moved", True).identity, source.identity)
    with pytest.raises(ValueError, match="cache: expected a folder for the pixels of"):
        open_data(pictures, image_size=8)


def test_other_data_are_refused_and_a_moved_folder_is_not(latents, tmp_path):
    folder = latents[0]
    before = Latents(folder).identity
    moved = folder.rename(tmp_path / "moved")
    check_same_data(Latents(moved).identity, before)
    with pytest.raises(ValueError, match="expected the shards of `fastdit encode`, found none"):
        open_source(before)
    plan = json.loads((moved / "plan.json").read_text())
    (moved / "plan.json").write_text(json.dumps(plan | {"labels": [0] * 10}))
    with pytest.raises(ValueError, match="data: the run was started on"):
        check_same_data(Latents(moved).identity, before)
    with pytest.raises(ValueError, match="expected the identity of shapes, latents or images"):
        open_source({"kind": "movies"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DiTConfig(img_size=32), "the data are 3 x 16 x 16, expected in_channels=3, img_size=16"),
        (DiTConfig(num_classes=10), "the data have 16 classes, got num_classes=10"),
    ],
)
def test_models_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ValueError) as error:
        check_fits(config, Shapes(1))
    assert message in str(error.value)


def change(folder, i, make):
    path = folder / f"{i:08d}.npy"
    shard = np.load(path)
    np.save(path, make(shard))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: s[:1], "expected float32 of shape [4, 8, 8, 8], got float32 of [1, 8, 8, 8]"),
        (lambda s: s.astype(np.float16), "expected float32 of shape [4, 8, 8, 8], got float16"),
        (
            lambda s: s[..., :4],
            "expected float32 of shape [4, 8, 8, 8], got float32 of [4, 8, 8, 4]",
        ),
        (lambda s: np.where(s == s[1, 0, 0, 0], np.nan, s), "the latent of image 5 is not finite"),
    ],
)
def test_damaged_latents_are_one_clear_error(latents, make, message):
    change(latents[0], 1, make)
    with pytest.raises(ValueError) as error:
        Latents(latents[0]).take(torch.tensor([0, 5]))
    assert message in str(error.value)


@pytest.mark.parametrize("labels", [[0] * 9, [0] * 9 + [3], [-1] + [0] * 9])
def test_labels_are_of_the_classes(latents, labels):
    plan = json.loads((latents[0] / "plan.json").read_text())
    (latents[0] / "plan.json").write_text(json.dumps(plan | {"labels": labels}))
    with pytest.raises(ValueError, match="expected 10 labels of its classes"):
        Latents(latents[0])


def test_images_that_are_not_square_need_a_model_of_their_shape():
    source = Shapes(1)
    source.sample_shape = (3, 16, 8)
    check_fits(DiTConfig(img_size=(16, 8)), source)
    for size in (16, (8, 16)):
        message = "data are 3 x 16 x 8, expected in_channels=3, img_size=(16, 8), got in_channels"
        with pytest.raises(ValueError, match=re.escape(message) + ".*" + re.escape(str(size))):
            check_fits(DiTConfig(img_size=size), source)


def test_a_model_without_classes_takes_any():
    check_fits(DiTConfig(use_class_cond=False), Shapes(1))


@pytest.mark.parametrize("per_class", [0, -1, 2.0, True])
def test_shapes_need_a_number(per_class):
    with pytest.raises(ValueError, match="per_class: expected a positive integer"):
        Shapes(per_class)
