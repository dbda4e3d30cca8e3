"""Build the library of the CPU kernels when it is first needed, and cache it for every process."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastdit.kernels.columns import COLUMNS
from fastdit.kernels.cpu.structs import STRUCTS, Struct

SOURCES = Path(__file__).parent
# There is no -march, since the instruction set is chosen at run time and a cached library must run
# on every machine that shares the cache. There is no -ffast-math, since NaN must stay NaN and its
# start-up code would flush denormals in the whole process. OpenMP uses PyTorch's threads. PyTorch
# 2.11 would compile as C++17, which lacks `std::atomic::wait`.
FLAGS = [
    *"-std=c++20 -O3 -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast".split(),
    *"-Wno-psabi -Wno-ignored-attributes -Wno-unknown-pragmas".split(),
    f"-DFASTDIT_COLUMNS={','.join(COLUMNS)}",
]

logger = logging.getLogger("fastdit")


class BuildError(RuntimeError):
    """The CPU kernels cannot be built here; the message says why and what helps."""


def cache_folder() -> Path:
    """Return the folder of the library, below XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fastdit")


@functools.cache
def library() -> ctypes.CDLL:
    """Load the library. If it is not in the cache it is built first, which takes some seconds.

    Raises:
        BuildError: there is no compiler, it fails, the cache cannot be written, or the library
            cannot be loaded.
    """
    path = cache_folder() / f"cpu-{_digest()}.so"
    if not path.exists():
        _build(path)
    try:
        loaded = ctypes.CDLL(str(path))  # calls release the GIL
    except OSError as error:
        raise BuildError(f"{error}; XDG_CACHE_HOME names another folder to build in") from error
    _check_sizes(loaded, path)
    loaded.fastdit_instruction_set.restype = ctypes.c_char_p
    loaded.fastdit_peak.restype = ctypes.c_double
    loaded.fastdit_peak.argtypes = [ctypes.c_int64, ctypes.c_int64]
    integers = [ctypes.c_int64] * 4
    loaded.fastdit_normal.argtypes = [*[ctypes.c_void_p] * 2, *integers, ctypes.c_void_p]
    for name in ("trajectory", "update", "linear", "adaln", "adaln_backward"):
        getattr(loaded, f"fastdit_{name}").argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    return loaded


def _check_sizes(loaded: ctypes.CDLL, path: Path) -> None:
    """Raise a BuildError unless Python and the library agree on the size of every struct."""
    loaded.fastdit_struct_size.restype = ctypes.c_int64
    for name, struct in STRUCTS.items():
        size = loaded.fastdit_struct_size(name.encode())
        if size != ctypes.sizeof(struct):
            raise BuildError(
                f"{path} has a {name} of {size} bytes, where Python's is "
                f"{ctypes.sizeof(struct)}; delete that file, and it is built anew"
            )


def call(function: Any, argument: Struct, instruction_set: str | None) -> None:
    """Call a function of the library, and raise an error for the code that it returns."""
    name = None if instruction_set is None else instruction_set.encode()
    code = function(ctypes.byref(argument), name)
    if code == 1:
        raise MemoryError("fastdit's C++ kernels: too little memory; take a smaller batch")
    if code == 2:
        raise ValueError(f"instruction_set: expected one this CPU has, got {instruction_set!r}")


def _digest() -> str:
    """Return a hash of everything that decides what is built and whether it can be loaded."""
    parts = [platform.machine(), *platform.libc_ver(), torch.__version__, *FLAGS]
    files = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])
    parts += [file.name + file.read_text() for file in files]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _build(path: Path) -> None:
    """Build in a folder aside and rename the result, so that a killed build leaves no library."""
    if sys.platform == "win32":
        raise BuildError("they are written for g++ and clang, not for Windows")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(path.with_suffix(".lock")):
            if path.exists():
                return
            with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as folder:
                logger.warning(
                    "fastdit: building the C++ kernels for this CPU, once, some ten seconds; "
                    "they are cached as %s",
                    path,
                )
                os.replace(_compile(folder), path)
    except OSError as error:
        raise BuildError(f"{error}; XDG_CACHE_HOME names another folder to build in") from error


def _compile(folder: str) -> Path:
    from torch.utils import cpp_extension  # late, since its import takes long

    compiler = os.environ.get("CXX", "c++")
    if shutil.which((shlex.split(compiler) or [""])[0]) is None:
        raise BuildError(f"no C++ compiler {compiler!r} was found; install g++, or set CXX")
    sources = sorted(str(f) for f in SOURCES.glob("*.cpp"))
    options = dict(extra_cflags=FLAGS, extra_ldflags=["-fopenmp"], is_python_module=False)
    try:
        with _ninja_on_path():
            cpp_extension.load("fastdit_cpu", sources, build_directory=folder, **options)
    except (RuntimeError, subprocess.SubprocessError) as error:
        raise BuildError(f"the compiler {compiler!r} failed: {error}") from error
    return next(Path(folder).glob("*.so"))


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Hold a lock file, which the system unlocks if the process dies."""
    import fcntl

    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Put ninja, which PyTorch runs by name, on PATH in case the environment is not activated."""
    if shutil.which("ninja") is not None:
        yield
        return
    import ninja

    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
