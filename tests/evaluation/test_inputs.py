"""Which files hold images and statistics, and what is said of the others."""

import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from fastdit.data.pictures import centre_crop
from fastdit.evaluation.inputs import open_images, open_reference


def pixels(count, height=4, width=4, channels=3):
    generator = np.random.default_rng(count)
    return generator.integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def together(images, batch_size=4):
    return np.concatenate(list(images.batches(batch_size)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
@pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
def test_an_npz_is_read_in_batches(save, batch_size, tmp_path):
    images = pixels(10, 3, 5)
    save(tmp_path / "a.npz", images, labels=np.arange(10))
    found = open_images(tmp_path / "a.npz")
    assert (found.count, found.size) == (10, (3, 5))
    sizes = [len(batch) for batch in found.batches(batch_size)]
    assert sum(sizes) == 10 and max(sizes) == min(batch_size, 10)
    assert np.array_equal(together(found, batch_size), images)


def test_grey_images_have_three_equal_channels(tmp_path):
    images = pixels(3, channels=1)
    np.savez(tmp_path / "a.npz", arr_0=images)
    assert np.array_equal(together(open_images(tmp_path / "a.npz")), images.repeat(3, axis=3))


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    images = pixels(5, 3, 5)
    for i, name in enumerate(["a/1.png", "a/2.PNG", "b.png", "c.bmp", "d.webp"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(images[i]).save(path, lossless=True)
    (tmp_path / "notes.txt").write_text("no image")
    found = open_images(tmp_path)
    assert (found.count, found.size) == (5, (3, 5))
    assert np.array_equal(together(found, 2), images)


def test_files_of_other_modes_become_colour(tmp_path):
    Image.new("L", (4, 4), 7).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(tmp_path / "b.png")
    found = together(open_images(tmp_path))
    assert found[0, 0, 0].tolist() == [7, 7, 7] and found[1, 0, 0].tolist() == [1, 2, 3]


def test_a_folder_is_cropped_as_adm_crops(tmp_path):
    sizes = [(40, 20), (20, 31), (9, 8)]
    images = [Image.fromarray(pixels(1, h, w)[0]) for w, h in sizes]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"one size, got 40 x 20 \(0.png\) and 20 x 31 \(1.png\)"):
        open_images(tmp_path)
    found = open_images(tmp_path, image_size=8)
    assert found.size == (8, 8)
    assert np.array_equal(together(found), np.stack([centre_crop(image, 8) for image in images]))


def statistics(size=6, dtype=np.float64):
    x = np.random.default_rng(0).standard_normal((20, size)).astype(dtype)
    return {"mu": x.mean(axis=0), "sigma": np.cov(x, rowvar=False).astype(dtype)}


def test_a_reference_brings_images_statistics_or_both(tmp_path):
    found = statistics()
    spatial = {f"{name}_s": value for name, value in statistics(5, np.float32).items()}
    path = tmp_path / "r.npz"
    np.savez(path, arr_0=pixels(3))
    assert open_reference(path).images.count == 3 and not open_reference(path).statistics
    np.savez(path, **found)
    reference = open_reference(path)
    assert reference.images is None and set(reference.statistics) == {"pool"}
    assert np.array_equal(reference.statistics["pool"].mean, found["mu"])
    assert np.array_equal(reference.statistics["pool"].covariance, found["sigma"])
    np.savez(path, arr_0=pixels(3), **found, **spatial)
    reference = open_reference(path)
    assert reference.images.count == 3 and set(reference.statistics) == {"pool", "spatial"}
    assert reference.statistics["pool"].rounding == np.finfo(np.float64).eps
    assert reference.statistics["spatial"].rounding == np.finfo(np.float32).eps
    widened = {name: value.astype(np.float64) for name, value in spatial.items()}
    np.savez(path, **widened)
    assert open_reference(path).statistics["spatial"].rounding == np.finfo(np.float32).eps


IMAGES = pixels(4)
BAD_ARRAYS = {
    "float": ({"arr_0": IMAGES / 255}, "from 0 to 255, got float64; .*to_pixels"),
    "float16": ({"arr_0": IMAGES.astype(np.float16)}, "got float16"),
    "int64": ({"arr_0": IMAGES.astype(np.int64)}, "got int64"),
    "channels first": ({"arr_0": IMAGES.transpose(0, 3, 1, 2).copy()}, r"transpose\(0, 2, 3, 1\)"),
    "channels": ({"arr_0": pixels(4, channels=4)}, r"got shape \[4, 4, 4, 4\]"),
    "axes": ({"arr_0": IMAGES[0]}, r"got shape \[4, 4, 3\]"),
    "none": ({"arr_0": IMAGES[:0]}, r"got shape \[0, 4, 4, 3\], which holds no pixels"),
    "no pixels": ({"arr_0": IMAGES[:, :0]}, "which holds no pixels"),
    "fortran": ({"arr_0": np.asfortranarray(IMAGES)}, "save np.ascontiguousarray"),
    "objects": ({"arr_0": np.array([IMAGES[0], None], dtype=object)}, r"np.stack\(images\)"),
    "latents": ({"latents": np.zeros((2, 4, 8, 8))}, "got latents; `fastdit sample --vae` decodes"),
    "names": ({"images": IMAGES, "labels": np.arange(4)}, "got the arrays images, labels"),
    "empty": ({}, r"expected images \(arr_0\), got no arrays"),
}


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_an_array_of_another_kind_is_named(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        open_images(tmp_path / "a.npz")
    assert str(caught.value).startswith(str(tmp_path / "a.npz"))


def truncated(path):
    """End the array early, in an archive that is otherwise whole."""
    with zipfile.ZipFile(path) as archive:
        content = archive.read("arr_0.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", content[:-5])


def no_header(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"no header")


def array_only(path):
    with open(path, "wb") as file:
        np.save(file, IMAGES)


def changed(path):
    """Change a pixel, so that the checksum is wrong."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


BAD_FILES = {
    "half": (lambda p: p.write_bytes(p.read_bytes()[:200]), "expected an NPZ of images"),
    "array": (array_only, "expected an NPZ of images"),
    "text": (lambda p: p.write_text("PK"), "expected an NPZ of images"),
    "nothing": (lambda p: p.write_bytes(b""), "expected an NPZ of images"),
    "gone": (lambda p: p.unlink(), "no such file or folder"),
    "truncated": (truncated, "it is damaged; arr_0 ends too early"),
    "no header": (no_header, "arr_0 is no array of pixels"),
    "changed": (changed, "it is damaged"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_damaged_file_is_named(damage, message, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=IMAGES)
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        together(open_images(path))
    assert str(caught.value).startswith(str(path))


def test_a_damaged_image_is_named(tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match="b.png: expected an image"):
        together(open_images(tmp_path))
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(ValueError, match="b.png: expected an image"):
        open_images(tmp_path)


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="expected images .* in this folder, found none"):
        open_images(tmp_path)


GOOD = statistics()
BAD_STATISTICS = {
    "half": ({"mu": GOOD["mu"]}, "expected mu and sigma together"),
    "integers": (GOOD | {"mu": np.zeros(6, dtype=int)}, "mu to be float32 or float64 .* got int64"),
    "axes": (
        GOOD | {"sigma": GOOD["mu"]},
        r"sigma to be .* with 2 axes, got float64 of shape \[6\]",
    ),
    "sizes": (GOOD | {"mu": GOOD["mu"][:5]}, r"got \[5\] and \[6, 6\]"),
    "objects": (GOOD | {"mu": np.array([None] * 6)}, "mu or sigma is damaged"),
    "names": (
        {"mean": GOOD["mu"]},
        r"images \(arr_0\) or statistics \(mu and sigma\), got .* mean",
    ),
    "nan": (GOOD | {"mu": GOOD["mu"] * np.nan}, "a.npz: mu and sigma: expected finite numbers"),
    "asymmetric": (GOOD | {"sigma": np.triu(GOOD["sigma"])}, "expected a symmetric covariance"),
    "images": (GOOD | {"arr_0": IMAGES / 255}, "from 0 to 255, got float64"),
}


@pytest.mark.parametrize(("arrays", "message"), BAD_STATISTICS.values(), ids=BAD_STATISTICS)
def test_statistics_of_another_kind_are_named(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_reference(tmp_path / "a.npz")
