"""PyTorch's pickles (.pt, .pth, .ckpt, .bin), read without running anything in them.

PyTorch's restricted unpickler builds tensors, numbers, strings and containers. Whatever else a file
names (a `Path`, a numpy scalar, a class of the project that wrote it) becomes a placeholder, which
takes any arguments and ignores them. No function or class that a file names is ever imported.
"""

from __future__ import annotations

import argparse
import errno
import os
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch

# What torch.load raises for a file that is truncated, of another kind, or would run code.
_REFUSED = (pickle.UnpicklingError, struct.error, EOFError, RuntimeError, ValueError)
_DAMAGED = (LookupError, TypeError, AttributeError, OverflowError, AssertionError, MemoryError)
# A file names these modules only to do harm, since they reach the operating system or any code.
_REFUSED_MODULES = ("os", "posix", "nt", "sys", "subprocess", "builtins", "__builtin__")
_HARMLESS_BUILTINS = (
    *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "getattr", "int"),
    *("list", "object", "range", "set", "slice", "str", "tuple"),
)
_BLOCK = 2**20  # bytes
_MAX_NAMES = 200  # a whole model names about ten classes
# A training checkpoint of DiT-XL/2 has about 10^5 instructions, of which 10^4 make tuples.
_MAX_INSTRUCTIONS = 10**7
_MAX_TUPLES = 50_000  # one within another they overflow the stack of Python's own hash
_LEGACY_PICKLES = 5  # before the tensors: magic number, protocol, system, content, keys


class Placeholder:
    """Stands for an object of a class that is not imported; `state` is what it was pickled with."""

    def __new__(cls, *_: Any, **__: Any) -> Placeholder:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class DictPlaceholder:
    """Stands for a subclass of dict, such as a defaultdict; its instances are plain dicts."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """Return the content of a PyTorch file, with placeholders for all that is not plain data.

    The tensors of a file that is not of PyTorch's legacy format are mapped, not read.

    Raises:
        ValueError: the file is truncated or damaged, or holds code.
    """
    known: dict[str, Any] = {"argparse.Namespace": argparse.Namespace}
    mapped = _is_zip(path)
    size = _count_instructions(path, mapped)
    while True:
        allowed: list[Any] = [(stand_in, name) for name, stand_in in known.items()]
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except (*_REFUSED, *_DAMAGED, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # from a bad offset
                raise
            affordable = len(known) < min(_MAX_NAMES, 2 * _MAX_INSTRUCTIONS // size + 1)
            if affordable and _learn(known, str(error)):
                continue  # and read again
            # PyTorch's own message is not passed on, since it advises to run the file.
            reason = "it is truncated or damaged, or holds more than tensors, which is not run"
            if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
                reason = f"it holds more than tensors ({code[1]}), which is refused and not run"
            raise ValueError(f"{path}: expected a PyTorch file of tensors; {reason}") from error


def check_records(path: str | os.PathLike[str]) -> bool:
    """Return whether a PyTorch file has checksums, and raise a ValueError if its bytes do not fit.

    PyTorch writes a CRC-32 for every record of its zip format, unless it is told not to, and does
    not read them.
    """
    if not _is_zip(path):
        return False
    record = ""
    try:
        with zipfile.ZipFile(path) as archive:
            checked = [info for info in archive.infolist() if info.CRC]
            for info in checked:
                record = info.filename
                with archive.open(info) as file:  # compares the checksum at the end
                    while file.read(_BLOCK):
                        pass
    except (zipfile.BadZipFile, NotImplementedError, *_REFUSED, *_DAMAGED, zlib.error) as error:
        where = f"its record {record} does not fit its checksum" if record else str(error)
        raise ValueError(f"{path}: truncated or damaged ({where}); copy it again") from error
    return bool(checked)


def is_pickle(path: str | os.PathLike[str]) -> bool:
    """Return whether a file begins as torch.save writes it, as a zip or a pickle."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        start = file.read(9)
    # The JSON of safetensors begins at the ninth byte.
    return start[:1] in (b"P", b"\x80") and start[8:] != b"{"


def _count_instructions(path: str | os.PathLike[str], zipped: bool) -> int:
    """Return the number of a file's instructions, which cost time and memory before tensors do.

    Raises:
        ValueError: they are damaged or too many, or a record is compressed, which PyTorch's are
            not and which hides how large it is.
    """
    try:
        if not zipped:
            with open(path, "rb") as file:
                # A pickle by another program may be the only one.
                return sum(_count(file) for _ in range(_LEGACY_PICKLES) if file.peek(1))
        count = 1
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"its record {info.filename:.80} is compressed")
                if Path(info.filename).name == "data.pkl":
                    with archive.open(info) as file:
                        count += _count(file)
        return count
    except (zipfile.BadZipFile, NotImplementedError, *_REFUSED, *_DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # from a bad offset
            raise
        raise ValueError(
            f"{path}: expected a PyTorch file of tensors; it is truncated or damaged, or no file "
            f"of PyTorch ({str(error):.200})"
        ) from error


def _count(file: IO[bytes]) -> int:
    count = tuples = 0
    for instruction, _, _ in pickletools.genops(file):
        count += 1
        tuples += instruction.name.startswith("TUPLE")
        if count > _MAX_INSTRUCTIONS or tuples > _MAX_TUPLES:
            raise ValueError(f"after {count:,} instructions it is no longer one of weights")
    return count


def _is_zip(path: str | os.PathLike[str]) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _learn(known: dict[str, Any], message: str) -> bool:
    """Add a placeholder for the name that PyTorch refused; return whether there is a new one."""
    if refused := re.search(r"Unsupported global: GLOBAL ([\w.]+) was not", message):
        name = refused[1]
        module, _, attribute = name.rpartition(".")
        # PyTorch leaves out the module "builtins" in its message.
        if not module or module.partition(".")[0] in _REFUSED_MODULES:
            if attribute not in _HARMLESS_BUILTINS:
                return False
            name = name if module else f"builtins.{name}"
        if name in known:
            return False
        known[name] = type(name, (Placeholder,), {})
        return True
    # A placeholder that gets items stands for a dict.
    if target := re.search(r"Can only SETITEMS? for .*got <class '[\w.]+?pickles\.(.+)'>", message):
        name = target[1]
        if name not in known or known[name] is DictPlaceholder:
            return False
        known[name] = DictPlaceholder
        return True
    return False
