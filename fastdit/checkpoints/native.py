"""fastdit's own files: safetensors whose header holds config, diffusion, labels and digests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from fastdit.checkpoints import diffusions
from fastdit.checkpoints.digests import check_digests, digests_of
from fastdit.checkpoints.matching import MODELS, ModelConfig, describe_layout, kind_of
from fastdit.config import DiTConfig
from fastdit.data.files import atomic_path
from fastdit.errors import unknown_name
from fastdit.flow import FlowMatching
from fastdit.model import DiT

_HEADER = "fastdit"  # the metadata entry that holds the header, as JSON
_ATTEMPTS = 20


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds besides its weights.

    Attributes:
        config: the model's config.
        diffusion: options of the `DiffusionScheduler` or, with a "path", of the `FlowMatching` that
            the model was trained with; None if they are not known.
        labels: the names of the classes, or None if they are not stored.
        assumed: names of options of the config, and "diffusion", that the checkpoint does not tell;
            their values are those of the published models.
        by_name: "diffusion", if only the name of the file tells it.
    """

    config: ModelConfig
    diffusion: dict[str, Any] | None = None
    labels: tuple[str, ...] | None = None
    assumed: tuple[str, ...] = ()
    by_name: tuple[str, ...] = ()


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: dict[str, Any]
) -> None:
    """Write tensors and a JSON header, with digests of both, to a safetensors file, atomically."""
    contiguous = {name: t.detach().contiguous() for name, t in tensors.items()}
    header = {name: value for name, value in header.items() if name != "digest"}
    header["digest"] = digests_of(contiguous, header)
    try:
        # The header is a single entry, since the order of two, and so the file's bytes, would vary.
        content = serialize(contiguous, {_HEADER: json.dumps(header)})
    except RuntimeError as error:
        raise ValueError(f"{path}: expected tensors with memory of their own ({error})") from error
    with atomic_path(path) as aside:
        aside.write_bytes(content)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, mapped from disk, and the header of a file that write_tensors wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or damaged, or has no fastdit header.
    """
    tensors, header = read_safetensors(path)
    if header is None:
        layout = describe_layout(list(tensors))
        raise ValueError(f"{path}: expected a fastdit header, got none; {layout}")
    check_digests(str(path), tensors, header)
    return tensors, header


def read_safetensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the tensors of any safetensors file, mapped from disk, and fastdit's header or None.

    Digests are not checked. The errors are as for `read_tensors`.
    """
    # safetensors opens a file twice, for its header and for its tensors, so that one which is
    # replaced in between would give those of two files.
    for _ in range(_ATTEMPTS):
        before = _identity(path) if os.path.isfile(path) else None
        with _open(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            text = (file.metadata() or {}).get(_HEADER)
        if before == _identity(path):
            break
    else:
        raise ValueError(f"{path}: it was replaced {_ATTEMPTS} times while it was read")
    if text is None:
        return tensors, None
    try:
        header = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON in the fastdit header ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: expected a JSON object as the fastdit header, got {text[:40]}")
    return tensors, header


def header_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the fastdit header of a file, or an empty one for a file or a folder without it."""
    if not Path(path).is_file():
        return {}
    try:
        return read_safetensors(path)[1] or {}
    except ValueError:  # a file of another kind
        return {}


def info_of(path: str | os.PathLike[str], header: Mapping[str, Any]) -> CheckpointInfo:
    """Return what a header says of a model; the header may be that of a training run's checkpoint.

    Raises:
        ValueError: something is missing or cannot be.
    """
    if "config" not in header:
        raise ValueError(f"{path}: expected a config in the fastdit header, got {list(header)}")
    config = _saved_config(path, header)
    diffusion, labels = header.get("diffusion"), header.get("labels")
    recipe, assumed = header.get("recipe"), header.get("assumed", [])
    if isinstance(recipe, dict):  # of a run, which has a path where it trains a flow
        of_flow = [field.name for field in fields(FlowMatching)]
        names = ["T", "schedule"] if recipe.get("path") is None else of_flow
        diffusion = {name: recipe.get(name) for name in names}
    check_labels(f"{path}: labels", labels, config)
    if not isinstance(assumed, list) or not all(isinstance(name, str) for name in assumed):
        raise ValueError(f"{path}: expected names of what was assumed, got {assumed!r:.80}")
    named = None if labels is None else tuple(labels)
    diffusion = diffusions.from_header(path, diffusion)
    return CheckpointInfo(config, diffusion, named, tuple(assumed))


def _saved_config(path: str | os.PathLike[str], header: Mapping[str, Any]) -> ModelConfig:
    """Return the config in a header, which names the model's class unless it is a DiT."""
    known = {kind.__name__: config for config, kind in MODELS.items()}
    name = header.get("class", DiT.__name__)
    if name not in list(known):
        raise unknown_name(f"{path}: class", name, known)
    return known[name].from_saved(header["config"])


def check_labels(what: str, labels: Any, config: ModelConfig) -> None:
    """Raise a ValueError unless labels are None, or one name for each class."""
    if labels is None:
        return
    if not isinstance(config, DiTConfig):
        reason = f"as {kind_of(config)} has no classes"
        raise ValueError(f"{what}: expected None, {reason}, got {labels!r:.80}")
    names = isinstance(labels, list | tuple) and all(isinstance(n, str) for n in labels)
    if not names or len(labels) != config.num_classes:
        raise ValueError(f"{what}: expected {config.num_classes} names, got {labels!r:.80}")


def _identity(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """Return what tells a file from one that replaces it."""
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns, status.st_size


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    # A tensor without elements may have a dimension that PyTorch has no integer for.
    except (SafetensorError, TypeError, OverflowError) as error:
        got = f"one that is truncated or of another kind ({error})"
        raise ValueError(f"{path}: expected a whole safetensors file, got {got}") from error
