"""An encoder's features of a set of images, mapped from one file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES = {"F16": "float16", "F32": "float32"}  # as safetensors names them
_DIGESTED = 16  # rows, spread over the file, since a whole file may be too large to read


class Features:
    """Rows of features, of which only those that are asked for are read.

    Attributes:
        path: the file.
        shape: (rows, tokens, width).
        identity: JSON values that identify the features.
    """

    def __init__(self, path: str | Path) -> None:
        """Map a file.

        Args:
            path: a .npy file, or a .safetensors file with one tensor, of [rows, tokens, width] in
                float16 or float32.

        Raises:
            ValueError: it is no such file.
        """
        self.path = Path(path).resolve()
        try:
            self._rows, shape, dtype = _mapped(self.path)
        except (OSError, ValueError, EOFError, SafetensorError) as error:
            expected = "expected a .npy or .safetensors file of one array"
            raise ValueError(f"features: {expected}, got {path} ({error})") from error
        if dtype not in _DTYPES.values() or len(shape) != 3 or 0 in shape:
            expected = "expected [images, tokens, width] in float16 or float32"
            raise ValueError(f"features: {expected}, got {list(shape)} in {dtype} ({path})")
        self.shape: tuple[int, int, int] = (shape[0], shape[1], shape[2])
        self._dtype = dtype
        self.identity = {"shape": list(shape), "dtype": dtype, "digest": self._digest()}

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, rows: Tensor) -> Tensor:
        """Return some rows: [b] int64 on the host -> [b, tokens, width] in the file's dtype.

        Raises:
            ValueError: a feature is NaN or Inf.
        """
        taken = torch.from_numpy(np.stack([self._row(row) for row in rows.tolist()]))
        if not taken.isfinite().all():
            row = int(rows[(~taken.flatten(1).isfinite()).any(1)][0])
            raise ValueError(f"features: row {row} of {self.path} holds NaN or Inf")
        return taken

    def _row(self, row: int) -> np.ndarray:
        # The dtype is in the byte order of this machine, which the file's need not be.
        return np.ascontiguousarray(self._rows[row : row + 1], dtype=self._dtype)[0]

    def _digest(self) -> str:
        spread = np.linspace(0, self.shape[0] - 1, min(_DIGESTED, self.shape[0])).round()
        digest = hashlib.blake2b(digest_size=16)
        for row in spread.astype(int).tolist():
            digest.update(self._row(row).tobytes())
        return digest.hexdigest()


def _mapped(path: Path) -> tuple[Any, tuple[int, ...], str]:
    """Return what can be sliced by rows, its shape, and the name of its dtype."""
    if path.suffix == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive of arrays")
        return array, array.shape, array.dtype.name
    if path.suffix != ".safetensors":
        raise ValueError(f"its name ends in {path.suffix or 'nothing'}")
    file = safe_open(path, framework="np")
    names = list(file.keys())
    if len(names) != 1:
        raise ValueError(f"it holds {len(names)} tensors")
    rows = file.get_slice(names[0])
    return rows, tuple(rows.get_shape()), _DTYPES.get(rows.get_dtype(), rows.get_dtype())
