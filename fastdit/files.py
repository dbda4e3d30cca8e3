"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOTSUP)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, which becomes `path` once all of it is on disk.

    Whatever stops the writing, a full disk or a kill, `path` is the old file or the new one. What a
    kill leaves aside has one name, so that the next write replaces it.

    Raises:
        OSError: writing failed; what was written aside is removed.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        _sync(aside)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"{path}: not written ({error}); an older file is as it was") from error
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    try:
        _sync(path.parent)  # so that the new name survives a power cut
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:  # some file systems cannot sync a folder
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
