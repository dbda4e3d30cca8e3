"""Files that are written whole or not at all, and folders that one process at a time writes to."""

from __future__ import annotations

import errno
import glob
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from fastdit.errors import warn

LOCK = ".lock"
_WINDOWS = os.name == "nt"
_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOTSUP)
_LOCKED_BYTE = 2**20  # on Windows, where no other process can read a byte that is locked
_ABANDONED = 24 * 3600.0  # seconds; no file takes longer to write
_PATIENCE = 5.0  # seconds to wait for a file that is open on Windows


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to, which is renamed to `path` once it is on disk.

    Whatever stops the writing, `path` is either the old file or the whole new one. Each writer has
    its own temporary file, and removes those that killed processes left. Links are followed.

    Raises:
        OSError: writing failed, and the temporary file is removed; or `path` is a device or a
            pipe, which the file would replace.
    """
    target, aside = _target_and_aside(path)
    _check_replaceable(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, glob.escape(target.name))
        aside.unlink(missing_ok=True)
        yield aside
        _sync(aside)
        _replace(aside, target)
    except BaseException as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"{path}: not written ({error}); an older file is as it was") from error
        raise
    if _WINDOWS:  # it has no way to sync a folder
        return
    try:
        _sync(target.parent, os.O_RDONLY)  # so that the new name survives a power failure
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:  # some file systems cannot sync a folder
            raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise an OSError now if `atomic_path` could not write this file later; leave nothing behind.

    A temporary file is made in the file's folder, or in the one in which that has to be made.
    """
    target, aside = _target_and_aside(path)
    _check_replaceable(target)
    nearest = next(folder for folder in target.parents if _is_there(folder))
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is not a folder")
    try:
        (nearest / aside.name).touch()
        (nearest / aside.name).unlink()
    except OSError as error:
        raise OSError(f"no file can be made in {nearest}: {error.strerror}") from error


def _check_replaceable(path: Path) -> None:
    """Raise an OSError for a device such as /dev/null, which an administrator would lose."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(f"{path} is a device or a pipe, which a file would replace")


def _is_there(path: Path) -> bool:
    """Return whether a path exists; it is an OSError if it cannot, as where a name is too long."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _target_and_aside(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    target = Path(os.path.realpath(path))
    aside = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    return target, aside


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove the temporary files that killed writers left in a folder, for names of a pattern."""
    for leftover in folder.glob(f".{name}.*-*.tmp"):
        if _WINDOWS:  # os.kill would end the process, whatever the signal
            with suppress(OSError):  # it is gone already, or is being written
                if time.time() - leftover.stat().st_mtime > _ABANDONED:
                    leftover.unlink()
            continue
        pid = leftover.name.split(".")[-2].split("-")[0]
        try:
            os.kill(int(pid), 0)  # only asks whether the process is alive
        except ProcessLookupError:
            leftover.unlink(missing_ok=True)
        except (PermissionError, OverflowError, ValueError):
            pass  # it is alive, or the name is another program's


@contextmanager
def locked(folder: Path, what: str, *, remove: bool = False) -> Iterator[None]:
    """Lock a folder for this process, until the block ends or the process dies.

    Args:
        folder: is made if it is missing. The lock is its file `.lock`.
        what: what this process does there, such as "run", for the error's message.
        remove: whether to remove the folder in the end, if nothing but the lock is left in it.

    Raises:
        FileExistsError: another process holds the lock; the message has the other's id.
        OSError: the folder or the file cannot be made.
    Warns:
        UserWarning: the file system does not support locks.
    """
    file = _open_locked(folder, what)
    try:
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
    finally:
        # While it is locked, no other process can come in between. Windows removes no open file,
        # and none that another process has opened by then.
        if remove and not _WINDOWS:
            _remove_lock(folder)
        file.close()
        if remove and _WINDOWS:
            _remove_lock(folder)


def _open_locked(folder: Path, what: str) -> IO[str]:
    """Return the lock file of a folder, open and locked."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = open(folder / LOCK, "a+")
        except FileNotFoundError:  # its holder has just removed the folder
            continue
        try:
            _lock(file)
        except BlockingIOError as error:
            holder = _holder(file)
            file.close()
            message = f"another {what} is going on in {folder} ({holder}); wait or use another"
            raise FileExistsError(f"out: {message} folder") from error
        except OSError as error:
            warn(f"{folder}: not locked for this {what} ({error})")
        if _is_still_at(folder / LOCK, file):
            return file
        file.close()  # its holder removed it before it could be locked here


def _lock(file: IO[str]) -> None:
    """Lock an open file; it is a BlockingIOError if another process has locked it."""
    if not _WINDOWS:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt

    file.seek(_LOCKED_BYTE)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EDEADLK):
            raise BlockingIOError(*error.args) from error
        raise


def _holder(file: IO[str]) -> str:
    """Say which process has locked a file."""
    file.seek(0)
    pid, _, node = file.readline().strip().partition(" on ")
    if not pid:  # it has just locked it
        return "another process"
    return f"process {pid}" if node == platform.node() else f"process {pid} on {node}"


def _is_still_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _remove_lock(folder: Path) -> None:
    """Remove a folder that holds nothing but its lock."""
    with suppress(OSError):  # it holds more, or another process has it now
        if os.listdir(folder) == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


def _replace(aside: Path, target: Path) -> None:
    """Rename a file to another one's name; on Windows wait while a program has that one open."""
    until = time.monotonic() + _PATIENCE if _WINDOWS else 0.0
    while True:
        try:
            os.replace(aside, target)
            return
        except PermissionError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def _sync(path: Path, mode: int = os.O_RDWR) -> None:
    descriptor = os.open(path, mode)  # Windows syncs only what may be written
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
