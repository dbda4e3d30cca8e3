"""Files that are written whole or not at all, and folders with one writer at a time."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fastdit.data import files
from fastdit.data.files import atomic_path, check_writable, locked

HOLD = """
import fcntl, os, sys, time
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print(os.getpid(), "on elsewhere", file=lock, flush=True)
print("locked", flush=True)
time.sleep(60)
"""


def test_a_locked_folder_is_refused_with_the_others_id(tmp_path):
    folder = tmp_path / "new" / "folder"
    with locked(folder, "sampling"):
        message = f"another sampling is going on in .*folder .process {os.getpid()}.; wait"
        with pytest.raises(FileExistsError, match=message), locked(folder, "sampling"):
            pass
    for _ in range(2):  # a lock that has ended, and its file, are in nobody's way
        with locked(folder, "sampling"):
            pass
    assert [p.name for p in folder.iterdir()] == [".lock"]


def test_a_lock_dies_with_its_process(tmp_path):
    command = [sys.executable, "-S", "-c", HOLD, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        message = f"process {holder.pid} on elsewhere"
        with pytest.raises(FileExistsError, match=message), locked(tmp_path, "run"):
            pass
        holder.kill()
        holder.wait()
        with locked(tmp_path, "run"):
            assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} on ")


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def refuse(file):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "_lock", refuse)
    with pytest.warns(UserWarning, match="not locked for this run .*No locks available"):
        with locked(tmp_path, "run"):
            pass


def test_a_locked_folder_is_removed_if_nothing_else_is_left_in_it(tmp_path):
    for left in (True, False):
        with locked(tmp_path / "parts", "sampling", remove=True):
            (tmp_path / "parts" / "a").touch()
            if not left:
                (tmp_path / "parts" / "a").unlink()
        assert (tmp_path / "parts").exists() == left


def test_a_lock_that_its_holder_removes_meanwhile_is_made_anew(tmp_path, monkeypatch):
    """Whoever locks a file that nobody finds any more has locked nothing."""
    lock, calls = files._lock, []

    def late(file):
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        lock(file)

    monkeypatch.setattr(files, "_lock", late)
    with locked(tmp_path, "run"):
        assert len(calls) == 2
        with pytest.raises(FileExistsError), locked(tmp_path, "run"):
            pass


def test_what_can_be_written_is_known_before_and_leaves_nothing(tmp_path):
    (tmp_path / "old").write_text("old")
    check_writable(tmp_path / "old")
    check_writable(tmp_path / "new" / "er" / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "old"


@pytest.mark.parametrize("name", ["file/s.png", "file/a/b/s.png", "x" * 300 + "/s.png"])
def test_what_cannot_be_written_is_known_before(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="is not a folder$|(?i:name too long)"):
        check_writable(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="only Linux has /proc")
@pytest.mark.parametrize("name", ["s.png", "new/s.png"])
def test_a_folder_that_takes_no_files_is_known_before(name):
    with pytest.raises(OSError, match="no file can be made in /proc: "):
        check_writable(Path("/proc") / name)


def test_a_pipe_or_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match="is a device or a pipe, which a file would replace"):
            check_writable(tmp_path / name)
        with pytest.raises(OSError, match="is a device or a pipe"), atomic_path(tmp_path / name):
            raise AssertionError("nothing is written")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
