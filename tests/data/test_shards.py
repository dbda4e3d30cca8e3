"""Sharded arrays: the same bytes for any number of processes and restarts."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, Sampler
from fastdit.data.images import to_pixels
from fastdit.data.shards import write_sharded_npz, write_shards
from fastdit.testing import randomize

STEPS = 8
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = fastdit.DiT.from_config(DiTConfig(hidden=32, n_layers=1, n_heads=2))
    randomize(model)
    path = tmp_path_factory.mktemp("many") / "m.safetensors"
    fastdit.save(model, path, DiffusionScheduler(STEPS, schedule="cosine"))
    return path


def arguments(checkpoint, out, num=22, seed=5):
    options = f"--num-images {num} --batch-size 4 --labels 3,7,1 --seed {seed} --clip 1"
    return ["sample", str(checkpoint), *options.split(), "--device", "cpu", "--out", str(out)]


def run(processes, *arguments):
    launcher = [sys.executable]
    if processes > 1:
        launcher += "-m torch.distributed.run --standalone --nproc-per-node".split()
        launcher.append(str(processes))
    command = [*launcher, "-m", "fastdit", *arguments]
    return subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True)


def test_the_file_does_not_depend_on_the_number_of_processes(checkpoint, tmp_path):
    files = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.npz"
        done = run(processes, *arguments(checkpoint, out))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote 22 images") == 1
        files.append(out.read_bytes())
    assert files[0] == files[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.npz", "2.npz"]
    with np.load(tmp_path / "2.npz") as file:
        assert file.files == ["arr_0"]
        pixels = file["arr_0"]
    assert pixels.shape == (22, 16, 16, 3) and pixels.dtype == np.uint8
    scheduler = DiffusionScheduler(STEPS, schedule="cosine")
    sampler = Sampler(fastdit.load(checkpoint), scheduler, fastdit.solvers.DDPM(clip=1.0))
    labels = [(3, 7, 1)[i % 3] for i in range(22)]
    expected = to_pixels(sampler(labels, seed=5)).astype(int)
    assert np.abs(pixels - expected).max() <= 1  # other batch sizes may round to the next level


def test_a_killed_run_keeps_the_finished_shards(checkpoint, tmp_path):
    whole, out = tmp_path / "whole.npz", tmp_path / "killed.npz"
    num = 400
    assert run(1, *arguments(checkpoint, whole, num)).returncode == 0
    folder, kept = tmp_path / "killed.npz.parts", set()
    for _ in range(3):
        command = [sys.executable, "-m", "fastdit", *arguments(checkpoint, out, num)]
        process = subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.DEVNULL)
        had = len(kept)
        while process.poll() is None and len(list(folder.glob("*.npy"))) <= had:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = {p: p.stat().st_mtime_ns for p in folder.glob("*.npy")}
        assert len(now) > had and all(now[path] == made for path, made in kept)
        kept = set(now.items())
    assert not out.exists()
    done = run(1, *arguments(checkpoint, out, num))
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == whole.read_bytes() and not folder.exists()


def test_batches_of_another_plan_are_not_mixed(checkpoint, tmp_path):
    def stop(first):
        if first:
            raise KeyboardInterrupt
        return np.zeros((2, 1))

    out = tmp_path / "s.npz"
    with pytest.raises(KeyboardInterrupt):
        write_sharded_npz(out, stop, {"num": 5, "batch_size": 2, "seed": 1}, "arr_0")
    with pytest.raises(
        ValueError, match="parts: it holds shards of another call, which differ in seed;"
    ):
        write_sharded_npz(out, stop, {"num": 5, "batch_size": 2, "seed": 2}, "arr_0")
    done = run(1, *arguments(checkpoint, out))
    assert done.returncode == 1 and "remove the folder" in done.stderr
    done = run(1, *arguments(checkpoint, tmp_path / "s.png"))
    assert done.returncode == 1 and "--num-images: expected --out to end in .npz" in done.stderr


def test_a_plan_without_shards_is_in_nobodys_way(tmp_path):
    """Such as that of a batch which was too large for the memory."""

    def fail(first):
        raise MemoryError

    out = tmp_path / "s.npz"
    with pytest.raises(MemoryError):
        write_sharded_npz(out, fail, {"num": 5, "batch_size": 4}, "arr_0")
    write_sharded_npz(out, lambda first: np.zeros((2, 1)), {"num": 5, "batch_size": 2}, "arr_0")
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


def test_the_last_batch_is_computed_whole_and_cut(tmp_path):
    starts = []

    def make(first):
        starts.append(first)
        return np.arange(first, first + 4, dtype=np.float32)[:, None]

    write_sharded_npz(tmp_path / "s.npz", make, {"num": 10, "batch_size": 4}, "latents")
    assert starts == [0, 4, 8]
    with np.load(tmp_path / "s.npz") as file:
        assert np.array_equal(file["latents"], torch.arange(10.0)[:, None].numpy())


@pytest.mark.parametrize("damage", ["empty", "torn", "short"])
def test_a_damaged_shard_is_computed_again(tmp_path, damage):
    def make(first):
        return np.arange(first, first + 4, dtype=np.float32)[:, None]

    out, plan = tmp_path / "s.npz", {"num": 10, "batch_size": 4, "guidance": (1, 2)}
    parts = write_shards(tmp_path / "s.npz.parts", make, plan)
    if damage == "short":
        np.save(parts[1], make(4)[:2])
    else:
        os.truncate(parts[1], 0 if damage == "empty" else 130)
    write_sharded_npz(out, make, plan, "latents")
    with np.load(out) as file:
        assert np.array_equal(file["latents"][:, 0], np.arange(10))


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from fastdit.data.shards import write_shards
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
try:
    write_shards(Path(sys.argv[1]), lambda i: np.ones((4, 200)), {"num": 8, "batch_size": 4})
except OSError as error:
    print(error)
"""


def test_a_full_disk_leaves_no_shard_behind(tmp_path):
    folder = tmp_path / "parts"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder)], capture_output=True, text=True
    )
    assert "00000000.npy: not written" in done.stdout, done.stderr
    assert [p.name for p in folder.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_a_damaged_plan_is_named(tmp_path, content):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "plan.json").write_text(content)
    with pytest.raises(ValueError, match="plan.json: it is damaged.*remove"):
        write_shards(tmp_path / "p", None, {"num": 1, "batch_size": 1})
    with pytest.raises(ValueError, match="expected at least 1 image"):
        write_shards(tmp_path / "q", None, {"num": 0, "batch_size": 1})
