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
from safetensors.torch import save as serialize
from torch import Tensor, nn

from fastdit import reference
from fastdit.config import DiTConfig
from fastdit.diffusion import DiffusionScheduler
from fastdit.errors import from_options
from fastdit.files import atomic_path
from fastdit.model import DiT, unwrap

_HEADER = "fastdit"  # the metadata entry that holds the JSON below
_SHOWN_KEYS = 4

_DIFFUSION = {"T", "schedule", "prediction"}  # of a DiffusionScheduler

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
    model: nn.Module,
    path: str | os.PathLike[str],
    scheduler: DiffusionScheduler | None = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Write a model to a safetensors file, atomically.

    Args:
        model: its state dict and config are stored; a compiled or wrapped one is unwrapped.
        path: the file; an older one is replaced only once the new one is whole on disk.
        scheduler: the diffusion the model was trained on, so that sampling can find it.
        labels: names of the classes, one for each of `num_classes`.

    Raises:
        ValueError: the model is no DiT, its weights are not those of its config, or the labels are
            not num_classes strings.
        OSError: the file cannot be written; an older one is left as it was.
    """
    inner = unwrap(model)
    if not isinstance(inner, reference.DiT):
        raise ValueError(f"model: expected a fastdit.DiT, got {type(inner).__name__}")
    _check_labels("labels", labels, inner.cfg)
    expected = _empty_model("model", inner.cfg).state_dict()
    check_keys("model", expected, inner.state_dict())
    header = {
        "config": inner.cfg.to_dict(),
        "diffusion": scheduler and scheduler.options,
        "labels": labels and list(labels),
    }
    write_tensors(path, inner.state_dict(), header)


def load(path: str | os.PathLike[str]) -> DiT:
    """Read a model that `fastdit.save` wrote, on the CPU, in its stored dtype.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or foreign; the message says what it looks like.
    """
    with _open(path) as file:
        info = _read_info(path, file)
        tensors = _get_tensors(file)
    model = _empty_model(str(path), info.config)
    check_keys(str(path), model.state_dict(), tensors)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: expected float weights, but {name} is {tensor.dtype}")
    model.load_state_dict(tensors, assign=True)
    return model


def inspect(path: str | os.PathLike[str]) -> CheckpointInfo:
    """What a checkpoint holds, from its header alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or foreign; the message says what it looks like.
    """
    with _open(path) as file:
        return _read_info(path, file)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: dict[str, Any]
) -> None:
    """Write tensors and a JSON header to a safetensors file, atomically."""
    contiguous = {name: t.detach().contiguous() for name, t in tensors.items()}
    try:
        # One metadata entry: with two, their order in the file, and so its bytes, would vary.
        content = serialize(contiguous, {_HEADER: json.dumps(header)})
    except RuntimeError as error:
        raise ValueError(f"{path}: expected tensors with memory of their own ({error})") from error
    with atomic_path(path) as aside:
        aside.write_bytes(content)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON header of a file that write_tensors wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or foreign.
    """
    with _open(path) as file:
        header = _read_header(path, file)
        return _get_tensors(file), header


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


def _read_header(path: str | os.PathLike[str], file: Any) -> dict[str, Any]:
    text = (file.metadata() or {}).get(_HEADER)
    if text is None:
        layout = _describe_layout(list(file.keys()))
        raise ValueError(f"{path}: expected a fastdit header, got none; {layout}")
    try:
        header = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON in the fastdit header ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: expected a JSON object as the fastdit header, got {text[:40]}")
    return header


def _read_info(path: str | os.PathLike[str], file: Any) -> CheckpointInfo:
    header = _read_header(path, file)
    if "recipe" in header:
        raise ValueError(f"{path}: expected a model, got a resume file; the model is beside it")
    if "config" not in header:
        raise ValueError(f"{path}: expected a config in the fastdit header, got {list(header)}")
    config = from_options(DiTConfig, header["config"], complete=True)
    diffusion, labels = header.get("diffusion"), header.get("labels")
    if diffusion is not None:
        if (
            not isinstance(diffusion, dict)
            or not {"T", "schedule"} <= diffusion.keys() <= _DIFFUSION
        ):
            raise ValueError(f"{path}: expected a diffusion of T and schedule, got {diffusion!r}")
        diffusion = {"prediction": "epsilon"} | diffusion  # the only one there was at first
    _check_labels(f"{path}: labels", labels, config)
    return CheckpointInfo(config, diffusion, None if labels is None else tuple(labels))


def _check_labels(what: str, labels: Any, config: DiTConfig) -> None:
    if labels is None:
        return
    names = isinstance(labels, list | tuple) and all(isinstance(n, str) for n in labels)
    if not names or len(labels) != config.num_classes:
        raise ValueError(f"{what}: expected {config.num_classes} names, got {labels!r:.80}")


def _empty_model(source: str, config: DiTConfig) -> DiT:
    """The config's model without storage, and without drawing random numbers."""
    try:
        with torch.device("meta"):
            return DiT.from_config(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"{source}: a model of this config cannot be built ({error})") from error


def _get_tensors(file: Any) -> dict[str, Tensor]:
    """Copies: a tensor that stays mapped to its file changes, or dies, when the file does."""
    return {name: file.get_tensor(name).clone() for name in file.keys()}


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
