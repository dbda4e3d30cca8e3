"""What a command says where memory does not suffice."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}
_ASKED = re.compile(rf"allocate ([\d.]+) ({'|'.join(_UNITS)})")
# A sampling step holds several tensors as large as the largest one, in which the allocation failed.
_TENSORS = 4


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory could not be allocated, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # PyTorch's allocator on a CPU has no error of its own.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator:" in str(error)


def bytes_asked_for(error: BaseException) -> int | None:
    """Return the size of the allocation that failed, if the error says it."""
    found = _ASKED.search(str(error))
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def available_bytes() -> int | None:
    """Return how much of the host's memory can be used; None where the system does not say it."""
    try:
        table = Path("/proc/meminfo").read_text()
    except OSError:  # only Linux has it
        return None
    found = re.search(r"^MemAvailable: +(\d+) kB$", table, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def largest_batch(failed: int, asked: int | None, works: Callable[[int], bool]) -> int:
    """Return the largest of some smaller batches that works, each half of the one before; or 0.

    Args:
        failed: the batch for which there was too little memory.
        asked: size of the allocation on the host that failed, if it is known and was on the host.
            Batches that would need more memory than there is are not tried, since a system that
            promises more memory than it has ends a process that uses it.
        works: tries a batch.
    """
    size, free = failed // 2, available_bytes() if asked else None
    while size > 0:
        too_large = asked and free and _TENSORS * asked * size / failed > free
        if not too_large and works(size):
            return size
        size //= 2
    return 0
