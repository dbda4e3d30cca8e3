"""Atomic writing of files."""

from __future__ import annotations

import errno
import glob
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOTSUP)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to, which is renamed to `path` once it is on disk.

    Whatever stops the writing, `path` is either the old file or the whole new one. Each writer has
    its own temporary file, and removes those that killed processes left. Links are followed.

    Raises:
        OSError: writing failed; the temporary file is removed.
    """
    target = Path(os.path.realpath(path))
    aside = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, glob.escape(target.name))
        aside.unlink(missing_ok=True)
        yield aside
        _sync(aside)
        os.replace(aside, target)
    except BaseException as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"{path}: not written ({error}); an older file is as it was") from error
        raise
    try:
        _sync(target.parent)  # so that the new name survives a power failure
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:  # some file systems cannot sync a folder
            raise


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove the temporary files that killed writers left in a folder, for names of a pattern."""
    for leftover in folder.glob(f".{name}.*-*.tmp"):
        pid = leftover.name.split(".")[-2].split("-")[0]
        try:
            os.kill(int(pid), 0)  # only asks whether the process is alive
        except ProcessLookupError:
            leftover.unlink(missing_ok=True)
        except (PermissionError, OverflowError, ValueError):
            pass  # it is alive, or the name is another program's


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
