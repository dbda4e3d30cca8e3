"""`fastdit sample`: one image of many again, interrupts, and files and batches that do not fit."""

import os
import signal

import numpy as np
import pytest
import torch

import fastdit
from fastdit import DiffusionScheduler, Sampler
from fastdit.cli import memory
from fastdit.cli.memory import bytes_asked_for, is_out_of_memory, largest_batch
from fastdit.data.files import locked
from fastdit.model import DiT
from fastdit.testing import randomize


@pytest.fixture
def draw(run, tmp_path):
    """Sample float32 latents, which show every bit, with the execution that keeps them."""
    model = DiT(img_size=8, in_channels=4, hidden=16, n_layers=1, n_heads=1)
    randomize(model)
    fastdit.save(model, tmp_path / "m", DiffusionScheduler(5, schedule="cosine"))

    def call(arguments):
        out = tmp_path / "s.npz"
        out.unlink(missing_ok=True)
        options = [*arguments.split(), "--execution", "trajectory", "--device", "cpu"]
        done = run("sample", tmp_path / "m", *options, "--out", out)
        assert done.exit_code == 0, done.output
        with np.load(out) as file:
            return file["latents"]

    return call


def test_one_image_of_a_call_is_made_again_by_its_index(draw):
    images = draw("--labels 0,5 --count 3 --seed 9 --batch-size 4")
    again = draw("--labels 5 --count 1 --seed 9 --first-index 4")
    assert again.shape == (1, 4, 8, 8) and np.array_equal(again[0], images[4])
    assert not np.array_equal(draw("--labels 5 --count 1 --seed 9")[0], images[4])


def test_one_image_of_a_call_is_made_again_by_its_seed(draw):
    images = draw("--labels 0,5 --seeds 11,12,13 --batch-size 4")
    assert images.shape[0] == 6
    assert np.array_equal(draw("--labels 5 --seeds 12")[0], images[4])
    assert np.array_equal(draw("--labels 5 --seed 12 --count 1")[0], images[4])


def test_one_image_of_many_is_made_again_by_its_index(draw):
    images = draw("--labels 3,7,1 --num-images 7 --batch-size 4 --seed 2")
    assert len(images) == 7
    again = draw("--labels 3,7,1 --num-images 1 --batch-size 1 --seed 2 --first-index 4")
    assert np.array_equal(again[0], images[4])  # with the label that was its turn
    assert np.array_equal(draw("--labels 7 --count 1 --seed 2 --first-index 4")[0], images[4])


def test_an_unconditional_models_image_is_made_again(run, tmp_path):
    model = DiT(use_class_cond=False, hidden=16, n_layers=1, n_heads=1)
    randomize(model)
    fastdit.save(model, tmp_path / "m", DiffusionScheduler(5, schedule="cosine"))
    images = []
    for options in ("--count 3 --seed 8", "--count 1 --seed 8 --first-index 2", "--seeds 10"):
        out = tmp_path / "s.npz"
        done = run("sample", tmp_path / "m", *options.split(), "--out", out)
        assert done.exit_code == 0, done.output
        with np.load(out) as file:
            images.append(file["arr_0"])
    assert np.array_equal(images[0][2], images[1][0])
    assert np.array_equal(images[0][2], images[2][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 1,x", "--seeds: expected integers from 0, comma-separated, got 'x'"),
        ("--seeds 1,-2", "--seeds: expected integers from 0, comma-separated, got '-2'"),
        ("--seeds 1 --seed 3", "--seeds: expected no --seed beside it, got --seed 3"),
        ("--seeds 1 --count 2", "--seeds: expected no --count beside it, got --count 2"),
        ("--seeds 1 --first-index 2", "--seeds: expected no --first-index beside it"),
        ("--seeds 1 --num-images 2", "--seeds: expected no --num-images beside it"),
        (f"--seeds {2**63}", "--seeds: expected an integer in [0, 2^63), got 9223372036854775808"),
        (f"--first-index {2**32 - 4}", "--first-index: expected at most 2^32 images of a seed"),
    ],
)
def test_noise_that_cannot_be_had_is_one_line(run, checkpoint, tmp_path, arguments, message):
    out = ("--out", tmp_path / "s.npz")
    done = run("sample", checkpoint, *arguments.split(), *out)
    assert done.exit_code == 1 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def interrupted(run, monkeypatch):
    """Sample, and interrupt the process in a step of its second batch."""

    def call(*arguments):
        denoise, calls = DiT.denoise, []

        def interrupting(self, *given):
            calls.append(given)
            if len(calls) == 7:  # of two batches of five steps
                os.kill(os.getpid(), signal.SIGINT)
            return denoise(self, *given)

        with monkeypatch.context() as patched:
            patched.setattr(DiT, "denoise", interrupting)
            done = run("sample", *arguments, "--execution", "eager", "--batch-size", 2)
        assert done.exit_code == 130 and len(calls) == 7, done.output
        return done.stderr.splitlines()[-1]

    return call


def test_an_interrupted_grid_promises_nothing(interrupted, checkpoint, tmp_path):
    out = tmp_path / "s.png"
    said = interrupted(checkpoint, "--labels", "3", "--out", out)
    assert said.startswith(f"interrupted; {out} was not written; with --num-images")
    assert not out.exists()


def test_an_interrupted_call_for_many_goes_on_with_what_it_kept(
    interrupted, run, checkpoint, tmp_path
):
    out = tmp_path / "s.npz"
    many = (checkpoint, "--num-images", 5, "--out", out)
    said = interrupted(*many)
    folder = f"{out}.parts"
    assert said == (
        f"interrupted; 1 finished batch is kept in {folder}; the same command goes on from there"
    )
    kept = os.stat(f"{folder}/00000000.npy").st_mtime_ns
    said = interrupted(*many)
    assert "3 finished batches are kept" not in said and "2 finished batches are kept" in said
    assert os.stat(f"{folder}/00000000.npy").st_mtime_ns == kept
    done = run("sample", *many, "--execution", "eager", "--batch-size", 2)
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "s.npz"]


def test_two_calls_do_not_share_their_shards(run, checkpoint, tmp_path):
    out = tmp_path / "s.npz"
    with locked(tmp_path / "s.npz.parts", "sampling"):
        done = run("sample", checkpoint, "--num-images", 2, "--out", out)
    message = f"error: --out: another sampling is going on in {out}.parts (process {os.getpid()})"
    assert done.exit_code == 1 and message in done.stderr
    assert os.listdir(f"{out}.parts") == [".lock"]  # not even a plan was written


@pytest.mark.parametrize("many", [(), ("--num-images", 2)], ids=["grid", "many"])
@pytest.mark.parametrize("folder", ["m.safetensors", "m.safetensors/new", "/proc"])
def test_a_file_that_cannot_be_written_is_known_before(
    run, checkpoint, tmp_path, monkeypatch, folder, many
):
    monkeypatch.setattr(Sampler, "__call__", None)  # never reached
    done = run("sample", checkpoint, *many, "--out", tmp_path / folder / "s.npz")
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    assert "error: --out: expected a file that can be written, got " in done.stderr
    assert os.listdir(tmp_path) == ["m.safetensors"]


def limit_memory(monkeypatch, images, error):
    denoise = DiT.denoise

    def limited(self, x, *given):
        if len(x) > images:
            raise error
        return denoise(self, x, *given)

    monkeypatch.setattr(DiT, "denoise", limited)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()], ids=["cuda", "host"]
)
@pytest.mark.parametrize("many", [(), ("--num-images", 16)], ids=["grid", "many"])
def test_a_batch_that_is_too_large_is_one_line_with_one_that_fits(
    run, checkpoint, tmp_path, monkeypatch, error, many
):
    limit_memory(monkeypatch, 5, error)
    options = ("--execution", "eager", "--batch-size", 16, "--out", tmp_path / "s.npz")
    done = run("sample", checkpoint, *options, *many)
    assert done.exit_code == 1
    last = done.stderr.splitlines()[-1]
    assert last == (
        "error: --batch-size: 16 images at once do not fit into the memory of cpu; "
        "--batch-size 4 fits"
    )
    done = run("sample", checkpoint, *options, *many, "--batch-size", 4)
    assert done.exit_code == 0, done.output


def test_a_model_that_is_too_large_for_one_image_says_so(run, checkpoint, tmp_path, monkeypatch):
    limit_memory(monkeypatch, 0, MemoryError())
    options = ("--execution", "eager", "--out", tmp_path / "s.npz")
    done = run("sample", checkpoint, *options)
    assert done.exit_code == 1 and "not even one does; take a 16-bit --dtype" in done.stderr


def test_other_errors_are_not_taken_for_too_little_memory(run, checkpoint, tmp_path, monkeypatch):
    limit_memory(monkeypatch, 3, RuntimeError("a defect"))
    done = run("sample", checkpoint, "--execution", "eager", "--out", tmp_path / "s.npz")
    assert isinstance(done.exception, RuntimeError) and str(done.exception) == "a defect"


def test_pytorchs_own_error_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value) and bytes_asked_for(caught.value) == 2**52
    on_cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has")
    assert is_out_of_memory(on_cuda) and bytes_asked_for(on_cuda) == 3 * 2**29
    assert not is_out_of_memory(RuntimeError("memory"))


def test_no_batch_is_tried_that_needs_more_than_there_is(monkeypatch):
    """A system that promises more memory than it has would end the process."""
    tried = []

    def works(size):
        tried.append(size)
        return size <= 8

    assert largest_batch(64, None, works) == 8 and tried == [32, 16, 8]
    tried.clear()
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    assert largest_batch(64, 1000, works) == 8 and tried == [16, 8]
    assert largest_batch(64, None, lambda size: False) == 0
