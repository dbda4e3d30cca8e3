"""Features of an encoder: which files are read, row by row, and which are refused."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from fastdit.data.features import Features


def rows(dtype=np.float16, count=7):
    return np.random.default_rng(0).standard_normal((count, 4, 5)).astype(dtype)


@pytest.fixture
def write(tmp_path):
    def write(array, name="f.npy", **others):
        path = tmp_path / name
        if path.suffix == ".npy":
            np.save(path, array)
        else:
            save_file({"features": array, **others}, path)
        return path

    return write


@pytest.mark.parametrize("name", ["f.npy", "f.safetensors"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_are_those_of_the_file_in_its_dtype(write, name, dtype):
    array = rows(dtype)
    features = Features(write(array, name))
    assert features.shape == (7, 4, 5) and len(features) == 7
    taken = features.take(torch.tensor([6, 0, 6]))
    assert taken.dtype == torch.from_numpy(array).dtype
    assert torch.equal(taken, torch.from_numpy(array[[6, 0, 6]]))


def test_other_orders_of_bytes_and_of_axes_are_read_too(write):
    array = rows(np.float32)
    plain = Features(write(array, "a.npy"))
    for stored in (array.astype(">f4"), np.asfortranarray(array)):
        other = Features(write(stored, "b.npy"))
        assert torch.equal(other.take(torch.arange(7)), plain.take(torch.arange(7)))
        assert other.identity == plain.identity


def test_a_file_is_known_by_its_contents_and_not_by_its_name_or_kind(write):
    array = rows()
    features = Features(write(array, "a.npy"))
    assert Features(write(array, "b.safetensors")).identity == features.identity
    assert Features(write(array + 1, "c.npy")).identity != features.identity
    assert Features(write(array[:6], "d.npy")).identity != features.identity


@pytest.mark.parametrize(
    ("array", "name", "message"),
    [
        (
            rows(np.float64),
            "f.npy",
            r"expected \[images, tokens, width\] in float16 or float32, got",
        ),
        (rows()[0], "f.safetensors", r"expected \[images, tokens, width\] in .* got \[4, 5\] in"),
        (rows()[:0], "f.npy", r"got \[0, 4, 5\]"),
        (np.array([None]), "f.npy", "expected a .npy or .safetensors file of one array, got "),
    ],
)
def test_other_arrays_are_refused(write, array, name, message):
    with pytest.raises(ValueError, match=f"^features: .*{message}"):
        Features(write(array, name))


def test_other_files_are_refused(write, tmp_path):
    np.savez(tmp_path / "archive.npz", rows())
    archive = (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    for path, reason in (
        (tmp_path / "none.npy", "No such file"),
        (tmp_path / "none.safetensors", "No such file"),
        (tmp_path / "f.pt", "its name ends in .pt"),
        (archive, "it is an archive of arrays"),
        (write(rows(), "two.safetensors", other=rows()), "it holds 2 tensors"),
    ):
        with pytest.raises(ValueError, match=f"^features: expected a .npy or .*{reason}"):
            Features(path)
    for name in ("cut.npy", "cut.safetensors"):
        whole = write(rows(), name)
        whole.write_bytes(whole.read_bytes()[:150])
        with pytest.raises(ValueError, match="^features: expected a .npy or .safetensors file"):
            Features(whole)


def test_a_row_that_is_not_finite_is_named(write):
    array = rows()
    array[3, 0, 0] = np.inf
    features = Features(write(array))
    features.take(torch.tensor([2, 4]))
    with pytest.raises(ValueError, match="^features: row 3 of .*f.npy holds NaN or Inf"):
        features.take(torch.tensor([2, 3]))
