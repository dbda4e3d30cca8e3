"""The coloured shapes, and their judge, which also recognises bad samples."""

import time

import pytest
import torch

from fastdit.data.shapes import LABEL_NAMES, classify, coloured_shapes, judge


@pytest.fixture(scope="module")
def clean():
    return coloured_shapes()


def test_the_set_is_balanced_and_in_range(clean):
    images, labels = clean
    assert images.shape == (3200, 3, 16, 16) and images.dtype == torch.float32
    assert torch.equal(labels.bincount(), torch.full((16,), 200))
    assert images.min() >= -1 and images.max() <= 1
    assert LABEL_NAMES[0] == "red circle" and LABEL_NAMES[15] == "yellow cross"


def test_the_set_is_a_function_of_its_seed(clean):
    assert torch.equal(coloured_shapes().images, clean.images)
    other = coloured_shapes(seed=1)
    assert not torch.equal(other.images, clean.images)
    assert torch.equal(other.labels, clean.labels)


def test_images_of_a_class_differ(clean):
    assert len(clean.images.flatten(1).unique(dim=0)) == 3200


def test_making_the_set_takes_well_under_a_second():
    times = []
    for _ in range(3):
        start = time.process_time()
        coloured_shapes()
        times.append(time.process_time() - start)
    assert min(times) < 0.7


def test_the_judge_is_right_on_clean_images_of_another_seed():
    assert judge(*coloured_shapes(seed=9)) == (1.0, 1.0)


def add_noise(images, sigma):
    return images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def test_the_judge_tolerates_noise_up_to_a_point(clean):
    images, labels = clean
    some, more, flooded = (judge(add_noise(images, s), labels) for s in (0.5, 1.0, 3.0))
    assert some.colour > 0.99 and some.shape > 0.99
    assert more.colour > 0.95 and 0.9 < more.shape < some.shape
    assert flooded.colour < 0.25 and flooded.shape < 0.25


def test_the_judge_sees_each_wrong_label(clean):
    images, labels = clean
    wrong_shape = labels // 4 * 4 + (labels + 1) % 4
    assert judge(images, wrong_shape) == (1.0, 0.0)
    wrong_colour = (labels + 4) % 16
    assert judge(images, wrong_colour) == (0.0, 1.0)
    shuffled = labels[torch.randperm(3200, generator=torch.Generator().manual_seed(0))]
    assert judge(images, shuffled).colour == pytest.approx(0.25, abs=0.04)
    assert judge(images, shuffled).shape == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("nothing", ["noise", "blank", "inverted", "flat", "too-bright", "faint"])
def test_the_judge_sees_nothing_where_there_is_nothing(clean, nothing):
    images = {
        "noise": add_noise(torch.zeros_like(clean.images), 1.0),
        "blank": torch.full_like(clean.images, -0.9),
        "inverted": -clean.images,
        "flat": torch.rand(len(clean.images), 3, 1, 1).mul(2).sub(1).expand_as(clean.images),
        "too-bright": clean.images + 5,
        "faint": 0.5 + 1e-5 * clean.images,
    }[nothing]
    colour, shape = classify(images)
    assert (colour == -1).all() and (shape == -1).all()


def test_colour_and_shape_are_judged_apart(clean):
    """A recoloured circle is judged to have the new colour and the old shape."""
    red_circle, green_cross = clean.images[0], clean.images[7 * 200]
    recoloured = red_circle[[1, 0, 2]]
    colour, shape = classify(torch.stack([recoloured, green_cross]))
    assert colour.tolist() == [1, 1] and shape.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 8, 8), [0, 1], "images: expected shape [n, 3, 16, 16]"),
        (torch.zeros(2, 3, 16, 16), [0], "labels: expected shape [2]"),
        (torch.zeros(0, 3, 16, 16), [], "labels: expected shape [0] and not empty"),
        (torch.zeros(2, 3, 16, 16), [0, 16], "labels: expected values in [0, 16), got 0 to 16"),
        (torch.full((2, 3, 16, 16), float("nan")), [0, 1], "images: expected finite pixels"),
    ],
)
def test_bad_input_is_a_value_error(images, labels, message):
    with pytest.raises(ValueError) as error:
        judge(images, torch.tensor(labels, dtype=torch.int64))
    assert message in str(error.value)


@pytest.mark.parametrize("labels", [torch.tensor([-0.5]), torch.tensor([True])])
def test_labels_that_are_no_integers_are_an_error(clean, labels):
    with pytest.raises(ValueError, match="labels: expected integers, got torch"):
        judge(clean.images[:1], labels)


def test_an_empty_set_is_an_error():
    with pytest.raises(ValueError, match="per_class: expected at least 1, got 0"):
        coloured_shapes(per_class=0)
