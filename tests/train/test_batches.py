"""Batches of one's own `Source`: what is refused, and which pixels are warned of."""

import warnings

import pytest
import torch

from fastdit import DiTConfig
from fastdit.train.recipe import Recipe
from fastdit.train.runtime import Runtime
from fastdit.train.sources import ImageBatch, Shapes
from fastdit.train.trainer import Trainer

CONFIG = DiTConfig(img_size=8, hidden=8, n_layers=1, n_heads=2, num_classes=10, null_class=True)


class Own:
    """Forty images in [-1, 1] with labels 0 to 9, or what `change` makes of a batch of them."""

    sample_shape = (3, 8, 8)
    label_names = tuple("abcdefghij")
    identity = {"kind": "own"}

    def __init__(self, change=lambda mean, std, labels: (mean, std, labels), channels=3):
        self.sample_shape = (channels, 8, 8)
        self.images = torch.rand(40, channels, 8, 8, generator=torch.Generator().manual_seed(0))
        self.images = self.images * 2 - 1
        self.change = change

    def __len__(self):
        return 40

    def take(self, rows):
        return ImageBatch(*self.change(self.images[rows], None, rows % 10))


def run(change, config=CONFIG, channels=3, runtime=None):
    recipe = Recipe(steps=5, batch_size=20, T=25, schedule="cosine", label_dropout=0.1)
    if not config.null_class:
        recipe = Recipe(steps=5, batch_size=20, T=25, schedule="cosine")
    return Trainer(config, recipe, Own(change, channels), None, runtime).run().losses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m, s, y: (m, s, y + 1),
            "data: labels: expected 0 to 9 for 10 classes, counted from 0, got 10 of image ",
        ),
        (lambda m, s, y: (m, s, y - 1), "counted from 0, got -1 of image "),
        (lambda m, s, y: (m, s, y.float()), "labels: expected [20] integers, got torch.float32 of"),
        (lambda m, s, y: (m, s, y > 5), "labels: expected [20] integers, got torch.bool of shape"),
        (
            lambda m, s, y: (m, s, y[:-1]),
            "labels: expected [20] integers, got torch.int64 of",
        ),
        (
            lambda m, s, y: (m, s, torch.nn.functional.one_hot(y, 10)),
            "of shape [20, 10]; argmax(1) turns one-hot rows into labels",
        ),
        (lambda m, s, y: (m, s, y.tolist()), "labels: expected a tensor, got list"),
        (lambda m, s, y: (m.numpy(), s, y), "images: expected a tensor, got ndarray"),
        (lambda m, s, y: (m.to("meta"), s, y), "images: expected a tensor on the host, got meta"),
        (
            lambda m, s, y: (m.movedim(1, 3), s, y),
            "images: expected shape [20, 3, 8, 8], got [20, 8, 8, 3]; permute(0, 3, 1, 2) puts",
        ),
        (lambda m, s, y: (m[:-1], s, y), "expected shape [20, 3, 8, 8], got [19, 3, 8, 8]"),
        (lambda m, s, y: (m, m[..., :4], y), "deviations: expected shape [20, 3, 8, 8], got [20, "),
        (
            lambda m, s, y: ((m * 127.5 + 127.5).byte(), s, y),
            "images: expected floats in [-1, 1], got torch.uint8; x / 127.5 - 1 scales pixels of",
        ),
        (lambda m, s, y: (m.where(m < 0.9, torch.nan), s, y), "holds NaN or Inf"),
        (lambda m, s, y: (m, m.where(m < 0.9, torch.inf), y), "deviations: image "),
    ],
)
def test_what_a_source_may_not_return_is_one_clear_error(change, message):
    with pytest.raises(ValueError) as error:
        run(change)
    assert message in str(error.value)


def test_a_label_that_counts_from_one_is_named_with_its_image_and_the_fix():
    source = Own(lambda m, s, y: (m, s, y + 1))
    with pytest.raises(ValueError, match="got 10 of image [0-9]*9; subtract 1 if yours count from"):
        Trainer(CONFIG, Recipe(steps=1, batch_size=40, T=25), source).run()


def test_something_else_than_three_tensors_is_refused():
    source = Own()
    source.take = lambda rows: source.images[rows]
    with pytest.raises(ValueError, match=r"expected take to return \(mean, std, labels\), got Ten"):
        Trainer(CONFIG, Recipe(steps=1, T=25), source).run()


@pytest.mark.parametrize(
    "change",
    [
        lambda m, s, y: (m.double(), s, y),
        lambda m, s, y: (m, s, y.int()),
        lambda m, s, y: (m, s, y.to(torch.uint8)),
    ],
    ids=["float64", "int32", "uint8"],
)
def test_other_dtypes_of_the_same_values_train_the_same(change):
    assert torch.equal(run(change), run(lambda *batch: batch))


def test_half_images_train_in_float32_and_under_autocast():
    for precision in ("float32", "bfloat16"):
        losses = run(lambda m, s, y: (m.half(), s, y), runtime=Runtime(precision=precision))
        assert losses.isfinite().all()


def test_without_classes_labels_are_not_looked_at():
    config = DiTConfig(img_size=8, hidden=8, n_layers=1, n_heads=2, use_class_cond=False)
    expected = run(lambda *batch: batch, config)
    assert torch.equal(run(lambda m, s, y: (m, s, y + 100.5), config), expected)
    assert torch.equal(run(lambda m, s, y: (m, s, None), config), expected)


@pytest.mark.parametrize(
    ("change", "channels", "message"),
    [
        (lambda m: m * 127.5 + 127.5, 3, "from [0-9.]+ to 255, but .*; x / 127.5 - 1 scales"),
        (lambda m: m * 127.5 + 127.5, 1, "x / 127.5 - 1 scales pixels of 0 to 255"),
        (lambda m: m / 2 + 0.5, 3, r"from [0-9.e-]+ to (1|0.999), but .*; 2 \* x - 1 scales"),
    ],
    ids=["255", "grey", "1"],
)
def test_pixels_of_another_range_are_warned_of_once(change, channels, message):
    config = DiTConfig(
        img_size=8, in_channels=channels, hidden=8, n_layers=1, n_heads=2, num_classes=10
    )
    with pytest.warns(UserWarning, match=message) as seen:
        run(lambda m, s, y: (change(m), s, y), config, channels)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("change", "channels"),
    [
        (lambda m, s, y: (m, s, y), 3),
        (lambda m, s, y: (m * 1.3, s, y), 3),
        (lambda m, s, y: (m * 0.1 + 0.3, s, y), 3),
        (lambda m, s, y: (m * 9, s, y), 4),
        (lambda m, s, y: (m * 9, m.abs(), y), 3),
    ],
    ids=["pixels", "overshooting", "uniform", "latents", "distributions"],
)
def test_other_images_are_not_warned_of(change, channels):
    config = DiTConfig(
        img_size=8, in_channels=channels, hidden=8, n_layers=1, n_heads=2, num_classes=10
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(change, config, channels)


def test_the_coloured_shapes_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config = DiTConfig(hidden=8, n_layers=1, n_heads=2)
        recipe = Recipe(steps=6, batch_size=32, schedule="cosine")
        Trainer(config, recipe, Shapes(12)).run()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sample_shape", [3, 8, 8], "data: sample_shape: expected a tuple"),
        ("sample_shape", None, "data: sample_shape: expected a tuple"),
        ("label_names", None, "data: label_names: expected one name a class, got None"),
        ("identity", None, "data: identity: expected a dict, got None"),
        ("images", (), "data: expected at least one image, got none"),
    ],
)
def test_a_source_without_what_a_run_needs(monkeypatch, name, value, message):
    monkeypatch.setattr(Own, "__len__", lambda self: len(self.images))
    source = Own()
    setattr(source, name, value)
    with pytest.raises(ValueError, match=message):
        Trainer(CONFIG, Recipe(steps=2, T=25, schedule="cosine"), source).run()


def test_a_sparse_batch_is_refused():
    with pytest.raises(ValueError, match="data: images: expected a strided tensor, got torch.sp"):
        run(lambda m, s, y: (m.to_sparse(), s, y))
