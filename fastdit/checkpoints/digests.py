"""Digests of a file's tensors and header, by which damage in storage or transfer is noticed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

ALGORITHM = "blake2b"  # about a gigabyte per second and thread
_BYTES = 8  # of a digest, which is to notice damage and not an attacker
_THREADS = min(4, os.cpu_count() or 1)


def digests_of(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry "digest" for a header: digests of each tensor and of the header itself."""
    names = sorted(tensors)
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing releases Python's lock
        found = list(pool.map(_of_tensor, (tensors[name] for name in names)))
    text = json.dumps(header, sort_keys=True).encode()  # as JSON has it, whatever the spacing
    own = hashlib.blake2b(text, digest_size=_BYTES).hexdigest()
    return {
        "algorithm": ALGORITHM,
        "header": own,
        "tensors": dict(zip(names, found, strict=True)),
    }


def check_digests(source: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bool:
    """Return whether a file has digests; raise a ValueError if its content does not fit them."""
    stored = header.get("digest")
    if stored is None:
        return False
    if not isinstance(stored, dict) or stored.get("algorithm") != ALGORITHM:
        raise ValueError(f"{source}: expected digests by {ALGORITHM}, got {stored!r:.60}")
    rest = {name: value for name, value in header.items() if name != "digest"}
    now = digests_of(tensors, rest)
    names = stored.get("tensors")
    if not isinstance(names, dict) or now["header"] != stored.get("header"):
        names, damaged = {}, ["the header"]
    else:
        damaged = [f"the tensor {n}" for n, d in now["tensors"].items() if names.get(n) != d]
        damaged += [f"the tensor {n}" for n in names if n not in tensors]
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise ValueError(
            f"{source}: damaged since it was written ({damaged[0]}{more} does not fit its "
            "digest); copy or download it again"
        )
    return True


def _of_tensor(t: Tensor) -> str:
    content = hashlib.blake2b(f"{t.dtype} {list(t.shape)}".encode(), digest_size=_BYTES)
    flat = t.detach().cpu().contiguous().reshape(-1)
    content.update(flat.view(torch.uint8).numpy().data)
    return content.hexdigest()
