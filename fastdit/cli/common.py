"""What the commands share: errors of one line, and the device to compute on."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

DEFAULT_OUT = Path("runs/toy")


def option(text: str, *names: str, **settings: Any) -> Any:
    """Return a command's `typer.Option` with a help text, its names and its other settings."""
    return typer.Option(*names, help=text, **settings)


Device = Annotated[str | None, option("Such as cpu or cuda:1.  [the GPU, if any]")]


@contextmanager
def plain_errors(interrupted: str = "interrupted; finished batches are kept") -> Iterator[None]:
    """Print errors and warnings that a user can act on as one line each, without a traceback."""

    with warnings.catch_warnings():
        warnings.showwarning = lambda text, *_, **__: print(f"warning: {text}", file=sys.stderr)
        warnings.simplefilter("default", UserWarning)
        try:
            yield
        except (ValueError, OSError, FloatingPointError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            print(interrupted, file=sys.stderr)
            raise typer.Exit(130) from None


def device_of(name: str | None) -> torch.device:
    """Return the named device; None takes the process's own GPU, or the CPU without one."""
    if name in (None, "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # set by torchrun
    if name is None:
        return torch.device("cpu")
    if name.startswith("meta"):
        raise ValueError(f"--device: expected one that computes, got {name}")
    try:
        return torch.empty(0, device=name).device
    # The type of the error depends on how PyTorch was built.
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: expected one that is here, got {name} ({reason})") from error
