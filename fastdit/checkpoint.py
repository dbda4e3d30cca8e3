"""Weights on disk: safetensors with the config in the header, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdit.config import DiTConfig
from fastdit.diffusion import DiffusionScheduler
from fastdit.model import DiT

_HEADER = "fastdit"  # the metadata entry that holds the JSON below
_SHOWN_KEYS = 4

_LAYOUTS = {
    "patch_embed.": "fastdit",
    "x_embedder.": "facebookresearch/DiT",
    "transformer_blocks.": "diffusers",
}


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself.

    Attributes:
        config: the model's.
        diffusion: keyword arguments of the `DiffusionScheduler` it was trained on, if stored.
        labels: the names of its classes, if stored.
    """

    config: DiTConfig
    diffusion: dict[str, Any] | None = None
    labels: tuple[str, ...] | None = None


def save(
    model: DiT,
    path: str | os.PathLike[str],
    scheduler: DiffusionScheduler | None = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Write a model to a safetensors file, atomically.

    Args:
        model: its state dict and config are stored.
        path: the file; an older one is replaced only once the new one is whole on disk.
        scheduler: the diffusion the model was trained on, so that sampling can find it.
        labels: names of the classes, one for each of `num_classes`.

    Raises:
        ValueError: the number of labels is not num_classes.
        OSError: the file cannot be written; an older one is left as it was.
    """
    if labels is not None and len(labels) != model.cfg.num_classes:
        raise ValueError(f"labels: expected {model.cfg.num_classes} names, got {len(labels)}")
    header = {
        "config": model.cfg.to_dict(),
        "diffusion": scheduler and {"T": scheduler.T, "schedule": scheduler.schedule},
        "labels": labels and list(labels),
    }
    write_tensors(path, model.state_dict(), header)


def load(path: str | os.PathLike[str]) -> DiT:
    """Read a model that `fastdit.save` wrote, on the CPU, in its stored dtype.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or foreign; the message says what it looks like.
    """
    tensors, _ = read_tensors(path)
    info = inspect(path)
    with torch.device("meta"):
        model = DiT.from_config(info.config)
    check_keys(str(path), model.state_dict(), tensors)
    model.load_state_dict(tensors, assign=True)
    return model


def inspect(path: str | os.PathLike[str]) -> CheckpointInfo:
    """What a checkpoint holds, from its header alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or foreign; the message says what it looks like.
    """
    with _open(path) as file:
        header, keys = _header(file.metadata()), list(file.keys())
    if header is None:
        raise ValueError(f"{path}: expected a fastdit header, got none; {_describe_layout(keys)}")
    labels = header.get("labels")
    return CheckpointInfo(
        config=DiTConfig.from_dict(header["config"]),
        diffusion=header.get("diffusion"),
        labels=labels and tuple(labels),
    )


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: dict[str, Any]
) -> None:
    """Write tensors and a JSON header to a safetensors file, atomically."""
    contiguous = {name: t.detach().contiguous() for name, t in tensors.items()}
    with atomic_path(path) as aside:
        save_file(contiguous, aside, metadata={"format": "pt", _HEADER: json.dumps(header)})


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors and the JSON header (None where there is none) of a safetensors file."""
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _header(file.metadata())


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, which becomes `path` once all of it is on disk.

    Whatever stops the writing, a full disk or a kill, `path` is the old file or the new one.

    Raises:
        OSError: writing failed; what was written aside is removed.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        _fsync(aside)
        os.replace(aside, path)
        _fsync(path.parent)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"{path}: not written ({error}); an older file is as it was") from error
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def check_keys(source: str, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that names what is missing, unexpected or of another shape."""
    problems = []
    for what, keys in (
        ("missing", [name for name in expected if name not in tensors]),
        ("unexpected", [name for name in tensors if name not in expected]),
    ):
        if keys:
            problems.append(f"{what} {_some(keys)}")
    for name, tensor in expected.items():
        if name in tensors and tensors[name].shape != tensor.shape:
            want, got = list(tensor.shape), list(tensors[name].shape)
            problems.append(f"{name}: expected shape {want}, got {got}")
    if problems:
        raise ValueError(
            f"{source}: the tensors do not fit the config: {'; '.join(problems[:_SHOWN_KEYS])}; "
            f"{_describe_layout(tensors)}"
        )


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a whole safetensors file ({error}); it is truncated, or of another "
            "kind: a PyTorch .pt is a pickle, which fastdit.load does not open"
        ) from error


def _header(metadata: Mapping[str, str] | None) -> dict[str, Any] | None:
    text = (metadata or {}).get(_HEADER)
    return None if text is None else json.loads(text)


def _describe_layout(keys: Mapping[str, Any] | Sequence[str]) -> str:
    layout = next(
        (name for p, name in _LAYOUTS.items() if any(k.startswith(p) for k in keys)), None
    )
    if layout is None:
        return f"the keys ({_some(list(keys))}) are of no layout known here"
    if layout == "fastdit":
        return (
            "the keys look like fastdit's: build fastdit.DiT with this checkpoint's options, call "
            "load_state_dict on it, then fastdit.save"
        )
    return f"the keys look like {layout}'s, which fastdit.load does not read yet"


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return ", ".join(keys[:_SHOWN_KEYS]) + more


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
