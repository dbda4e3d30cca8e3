"""What the commands share: errors of one line, and the device to compute on."""

from __future__ import annotations

import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastdit.cli.memory import bytes_asked_for, is_out_of_memory
from fastdit.data.files import check_writable
from fastdit.data.shards import count_shards

DEFAULT_OUT = Path("runs/toy")


def option(text: str, *names: str, **settings: Any) -> Any:
    """Return a command's `typer.Option` with a help text, its names and its other settings."""
    return typer.Option(*names, help=text, **settings)


Device = Annotated[str | None, option("Such as cpu or cuda:1.  [the GPU, if any]")]


@contextmanager
def plain_errors(
    context: typer.Context | None = None,
    *,
    flags: Mapping[str, str | None] | None = None,
    kept: Callable[[], str] = lambda: "nothing was written",
    less_memory: str | None = None,
) -> Iterator[None]:
    """Print errors and warnings that a user can act on as one line each, without a traceback.

    Args:
        context: of the command. A ValueError that begins with the name of an argument in Python,
            such as `batch_size: ...`, then begins with the command's flag for it.
        flags: flags of arguments that the command's function names otherwise; None for one that has
            no flag although the command has an option of its name.
        kept: returns what an interrupted command has kept, and how to go on.
        less_memory: what needs less memory, for the error where there is too little.
    """
    with warnings.catch_warnings():
        warnings.showwarning = lambda text, *_, **__: print(f"warning: {text}", file=sys.stderr)
        warnings.simplefilter("default", UserWarning)
        try:
            yield
        except (ValueError, OSError, FloatingPointError) as error:
            print(f"error: {_with_flag(error, context, flags or {})}", file=sys.stderr)
            raise typer.Exit(1) from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            _end_progress_bars(error)
            asked = bytes_asked_for(error)
            what = "" if asked is None else f" for {asked:,} bytes more"
            less = "" if less_memory is None else f"; {less_memory}"
            print(f"error: there is too little memory{what}{less}", file=sys.stderr)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            _end_progress_bars(error)
            if os.environ.get("RANK", "0") == "0":  # set by torchrun
                print(f"interrupted; {kept()}", file=sys.stderr)
            raise typer.Exit(130) from None


def kept_shards(folder: Path) -> str:
    """Say what an interrupted command that writes shards has kept, and how to go on."""
    count = count_shards(folder)
    if not count:
        return "no batch was finished"
    what = "1 finished batch is" if count == 1 else f"{count} finished batches are"
    return f"{what} kept in {folder}; the same command goes on from there"


def check_out(out: Path, file: str | None = None) -> None:
    """Raise a ValueError, before any work, if a file could not be written in the end.

    Args:
        out: the file, or the folder that `file` names a file in.
    """
    try:
        check_writable(out if file is None else out / file)
    except OSError as error:
        what = "file" if file is None else "folder"
        reason = f"expected a {what} that can be written, got {out} ({error})"
        raise ValueError(f"--out: {reason}") from error


def _with_flag(
    error: Exception, context: typer.Context | None, flags: Mapping[str, str | None]
) -> str:
    """Return an error's message; the argument that it begins with is replaced by its flag."""
    message = str(error)
    if context is None or isinstance(error, FloatingPointError):
        return message
    own = {p.name: max(p.opts, key=len) for p in context.command.params if _is_option(p)}
    name, colon, rest = message.partition(":")
    flag = {**own, **flags}.get(name)
    return f"{flag}:{rest}" if colon and flag else message


def _is_option(parameter: Any) -> bool:
    return parameter.param_type_name == "option"


def _end_progress_bars(error: BaseException) -> None:
    """Free what the failed calls hold, and so close their progress bars, which ends their lines."""
    traceback.clear_frames(error.__traceback__)


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
        reason = textwrap.shorten(str(error).splitlines()[0], 150)
        raise ValueError(f"--device: expected one that is here, got {name} ({reason})") from error
