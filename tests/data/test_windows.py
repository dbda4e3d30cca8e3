"""What Windows lacks, or refuses, taken from Linux: files, training and sampling do without it.

This is a simulation; nothing here has run on Windows.
"""

import errno
import fcntl
import os
import sys
import threading
import time
import types

import numpy as np
import pytest
from typer.testing import CliRunner

import fastdit
from fastdit.cli.app import app
from fastdit.data import files
from fastdit.data.files import atomic_path, locked
from fastdit.kernels.cpu.build import library
from fastdit.ops import definitions, dispatch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to simulate Windows")


def is_open(path):
    """Whether this process has a file open, or mapped."""
    path = os.path.realpath(path)
    links = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
    if any(os.path.realpath(link) == path for link in links if os.path.lexists(link)):
        return True
    with open("/proc/self/maps") as maps:
        return any(line.rstrip().endswith(path) for line in maps)


@pytest.fixture
def windows(monkeypatch, tmp_path):
    """Windows' locks, no fcntl, no compiler, and no changes to files that are open."""
    monkeypatch.setattr(files, "_WINDOWS", True)
    monkeypatch.setattr(files, "_PATIENCE", 0.5)
    monkeypatch.setitem(sys.modules, "fcntl", None)

    def locking(descriptor, mode, count):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    msvcrt = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)

    def kill(pid, number):
        pytest.fail("os.kill ends a process on Windows, whatever the signal")

    monkeypatch.setattr(os, "kill", kill)
    fsync = os.fsync

    def fsync_what_is_writable(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_what_is_writable)
    for name in ("replace", "unlink", "remove"):
        real = getattr(os, name)

        def change(*paths, real=real, **options):
            if any(os.path.isfile(path) and is_open(path) for path in paths):
                raise PermissionError(errno.EACCES, "The file is open", str(paths[-1]))
            return real(*paths, **options)

        monkeypatch.setattr(os, name, change)

    def build():
        with monkeypatch.context() as patched:
            patched.setattr(sys, "platform", "win32")
            patched.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
            library.__wrapped__()

    monkeypatch.setattr(definitions, "build_cpp", build)
    dispatch.has_cpp.cache_clear()
    yield
    dispatch.has_cpp.cache_clear()


def test_the_toy_is_trained_resumed_and_sampled(windows, tmp_path, monkeypatch):
    def run(*arguments):
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        assert done.exit_code == 0, done.output
        return done

    small = fastdit.DiTConfig(hidden=8, n_layers=1, n_heads=1, null_class=True)
    monkeypatch.setitem(fastdit.PRESETS, "toy", small)
    brief = "--steps 3 --save-every 1 --per-class 2 --batch-size 4 --diffusion-steps 5".split()
    out = tmp_path / "run"
    done = run("train", *brief, "--schedule", "cosine", "--out", out)
    assert "without its C++ kernels: they are written for g++" in done.stderr
    (out / "checkpoints" / "step-00000003.safetensors").unlink()
    done = run("train", "--resume", "auto", "--out", out)
    assert "resuming at step 2 of 3" in done.stderr
    assert len(os.listdir(out / "checkpoints")) == 2
    out, many = tmp_path / "s.npz", "--num-images 5 --batch-size 2".split()
    run("sample", tmp_path / "run" / "model.safetensors", *many, "--out", out)
    with np.load(out) as file:
        assert len(file["arr_0"]) == 5
    assert sorted(os.listdir(tmp_path)) == ["run", "s.npz"]


def test_a_locked_folder_is_refused(windows, tmp_path):
    folder = tmp_path / "parts"
    with locked(folder, "sampling", remove=True):
        with pytest.raises(FileExistsError, match=f"process {os.getpid()}"):
            with locked(folder, "sampling", remove=True):
                pass
    assert not folder.exists()


def test_leftovers_are_judged_by_their_age(windows, tmp_path):
    old, new = (tmp_path / f".s.npz.{pid}-1.tmp" for pid in (1, 2))
    old.touch()
    new.touch()
    day_ago = time.time() - 25 * 3600
    os.utime(old, (day_ago, day_ago))
    with atomic_path(tmp_path / "s.npz") as aside:
        aside.write_text("new")
    assert sorted(os.listdir(tmp_path)) == [new.name, "s.npz"]


def test_a_file_that_is_open_is_waited_for(windows, tmp_path):
    path = tmp_path / "s.npz"
    path.write_text("old")
    reader = open(path)
    threading.Timer(0.1, reader.close).start()
    with atomic_path(path) as aside:
        aside.write_text("new")
    assert path.read_text() == "new"
    with open(path), pytest.raises(OSError, match=r"not written .*is open.*; an older file is as"):
        with atomic_path(path) as aside:
            aside.write_text("newer")
    assert os.listdir(tmp_path) == ["s.npz"] and path.read_text() == "new"
