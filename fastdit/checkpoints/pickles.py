"""PyTorch's pickles (.pt, .pth, .ckpt, .bin), read without running anything in them."""

from __future__ import annotations

import argparse
import errno
import os
import pickle
import re
import struct

import torch
from torch import Tensor

# What torch.load raises for a file that is truncated, of another kind, or would run code.
_REFUSED = (pickle.UnpicklingError, struct.error, EOFError, RuntimeError, ValueError)
_DAMAGED = (LookupError, TypeError, AttributeError, OverflowError, AssertionError)


def pickled_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights in a .pt file without running anything in it.

    Where the file is a training checkpoint, the weights are its "ema", or else its "model" or
    "state_dict". The prefix of a data parallel wrapper is removed from the names.

    Raises:
        ValueError: the file is truncated, is not a dict, or holds code.
    """
    # The published training code stores its command line beside the weights, as a Namespace.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (*_REFUSED, *_DAMAGED, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # from a bad offset
                raise
            # PyTorch's own message is not passed on, since it advises to run the file.
            reason = "it is truncated or damaged, or holds more than tensors, which is not run"
            if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
                reason = f"it holds more than tensors ({code[1]}), which is refused and not run"
            raise ValueError(f"{path}: expected a PyTorch file of tensors; {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(content).__name__}")
    for key in ("ema", "model", "state_dict"):
        if isinstance(content.get(key), dict) and content[key]:
            content = content[key]
            break
    return {str(k).removeprefix("module."): t for k, t in content.items() if isinstance(t, Tensor)}
