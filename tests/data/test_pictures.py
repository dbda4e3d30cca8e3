"""Pictures of folders, NPZ files and Hugging Face data sets: what is listed, read and refused."""

import sys

import numpy as np
import pytest
from PIL import Image

from fastdit.data.pictures import centre_crop, open_pictures, read_cropped


def squares(path, size=8):
    """Return a set's listing, and its pictures read."""
    pictures = open_pictures(path)
    listing = pictures.listing()
    return listing, np.stack([read_cropped(pictures, name, size)[0] for name in listing.names])


def test_a_folders_pictures_are_its_files(pictures):
    listing, read = squares(pictures)
    assert listing.names == [
        *("cat/a.png", "cat/b.jpg", "cat/c.webp"),
        *("dog/d.png", "dog/e.png", "dog/grey.png"),
    ]
    assert (listing.labels, listing.classes) == ([0, 0, 0, 1, 1, 1], ["cat", "dog"])
    for name, pixels in zip(listing.names, read, strict=True):
        with Image.open(pictures / name) as image:
            assert np.array_equal(pixels, centre_crop(image, 8)), name
    assert np.ptp(read[-1], axis=2).max() == 0, "a grey picture has three equal channels"


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_sixteen_bits_are_rounded_to_eight(tmp_path, kind):
    levels = np.array([[0, 128, 129, 257], [32768, 40000, 65406, 65535]], dtype=kind)
    path = tmp_path / ("deep.png" if kind == np.uint16 else "deep.tiff")
    Image.fromarray(np.tile(levels, (2, 1))).save(path)
    with Image.open(path) as image:
        assert image.mode.startswith("I")
        pixels = centre_crop(image, 4)
    expected = np.round(np.tile(levels, (2, 1)) / 65535 * 255)
    assert np.array_equal(pixels, np.stack([expected] * 3, axis=2))


@pytest.mark.parametrize("level", [-1, 2**16])
def test_levels_of_no_known_depth_are_refused(level):
    image = Image.fromarray(np.full((4, 4), level, dtype=np.int32))
    with pytest.raises(ValueError, match=f"expected 16 bits per channel, got {level}"):
        centre_crop(image, 4)


def test_the_hash_follows_the_content_and_not_the_name(pictures, draw):
    draw(pictures / "dog" / "again.png", 0)
    draw(pictures / "cat" / "a.png", 0)
    files = open_pictures(pictures)
    hashes = [read_cropped(files, n, 8)[1] for n in ("dog/again.png", "cat/a.png", "dog/d.png")]
    assert hashes[0] == hashes[1] != hashes[2]


def test_splits_taken_for_classes_are_a_warning(pictures):
    (pictures / "cat").rename(pictures / "train")
    (pictures / "dog").rename(pictures / "val")
    with pytest.warns(UserWarning, match=r"named like splits \(train, val\)"):
        open_pictures(pictures).listing()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("key", ["arr_1", "labels", None])
def test_an_npz_files_pictures_are_its_arrays_rows(tmp_path, channels, key):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, channels), dtype=np.uint8)
    labels = {} if key is None else {key: np.array([2, 0, 0, 1], np.int32)}
    np.savez(tmp_path / "p.npz", arr_0=pixels, **labels)
    listing, read = squares(tmp_path / "p.npz")
    assert np.array_equal(read, np.broadcast_to(pixels, (4, 8, 8, 3)))
    expected = ([0, 0, 0, 0], ["0"]) if key is None else ([2, 0, 0, 1], ["0", "1", "2"])
    assert (listing.labels, listing.classes) == expected
    assert len(set(listing.names)) == 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "expected an NPZ file with arr_0"),
        ({"arr_0": np.zeros((2, 8, 8, 3))}, "expected arr_0 of uint8, .* got float64 of"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"3\], got uint8 of \[2, 3, 8, 8\]"),
        (
            {"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.zeros(3, int)},
            r"expected 2 labels, which are integers, got int64 of \[3\]",
        ),
    ],
)
def test_npz_files_without_pictures_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "p.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_pictures(tmp_path / "p.npz")
    (tmp_path / "torn.npz").write_bytes(b"PK torn")
    with pytest.raises(ValueError, match="torn.npz: expected an NPZ file"):
        open_pictures(tmp_path / "torn.npz")


@pytest.fixture
def saved_set(pictures, tmp_path):
    """Return a function that saves the folder of pictures as a set of Hugging Face's `datasets`."""
    datasets = pytest.importorskip("datasets")
    listing = open_pictures(pictures).listing()
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=listing.classes)}
    )
    rows = {"image": [str(pictures / name) for name in listing.names], "label": listing.labels}

    def save(split=None, **changes):
        found = datasets.Dataset.from_dict(rows | changes, features=features)
        whole = found if split is None else datasets.DatasetDict({split: found})
        whole.save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"

    return save


@pytest.mark.parametrize("split", [None, "train"])
def test_a_saved_data_set_has_the_same_pictures(pictures, saved_set, split):
    listing, read = squares(saved_set(split))
    folder, expected = squares(pictures)
    assert (listing.labels, listing.classes) == (folder.labels, folder.classes)
    assert np.array_equal(read, expected)


def test_data_sets_that_cannot_be_read_are_refused(saved_set, monkeypatch):
    path = saved_set("test")
    with pytest.raises(ValueError, match="saved: expected a split train, got test"):
        open_pictures(path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets; pip install 'fastdit\[d"):
        open_pictures(path)


def test_pictures_without_a_class_are_refused(saved_set):
    path = saved_set(label=[0, 1, None, 0, 1, 0])
    with pytest.raises(ValueError, match="expected a class for each picture, some have none"):
        open_pictures(path)
