"""Loading and saving models, and fastdit's own files: safetensors with the config in the header."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from fastdit.checkpoints import folders, pickles, translation
from fastdit.config import DiTConfig
from fastdit.data.files import atomic_path
from fastdit.diffusion import DiffusionScheduler
from fastdit.errors import FLOAT_DTYPES, check_positive, unknown_name
from fastdit.model import DiT, config_of, unwrap

SAVED_LAYOUTS = ("fastdit", "facebookresearch/DiT", "diffusers")

_HEADER = "fastdit"  # the metadata entry that holds the header, as JSON
_SHOWN_KEYS = 4
# Peebles & Xie 2023, section 4: the linear schedule of ADM.
_PUBLISHED_DIFFUSION = {"T": 1000, "schedule": "linear", "prediction": "epsilon"}
_DIFFUSION_TYPES = {key: type(value) for key, value in _PUBLISHED_DIFFUSION.items()}


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds besides its weights.

    Attributes:
        config: the model's config.
        diffusion: keyword arguments of the `DiffusionScheduler` that the model was trained with, or
            None if they are not stored. For other projects' checkpoints they are the published
            ones, 1000 linear steps; a pipeline's folder of diffusers has its own.
        labels: the names of the classes, or None if they are not stored.
    """

    config: DiTConfig
    diffusion: dict[str, Any] | None = None
    labels: tuple[str, ...] | None = None


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    scheduler: DiffusionScheduler | None = None,
    labels: Sequence[str] | None = None,
    *,
    layout: str = "fastdit",
) -> None:
    """Write a model to a file, atomically.

    Args:
        model: a `fastdit.DiT`, which may be compiled or wrapped; its state dict and config are
            stored.
        path: the file to write; an older file is replaced once the new one is whole on disk. In a
            diffusers folder this holds for each file, and the config is missing in between.
        scheduler: the diffusion that the model was trained with, for sampling from the file.
        labels: names of the classes, `num_classes` of them.
        layout: "fastdit", a safetensors file; "facebookresearch/DiT", a .pt file of the state dict
            that its code loads; or "diffusers", a folder for its `from_pretrained`. The latter two
            store neither scheduler nor labels, and only models that their projects can express.

    Raises:
        ValueError: the model is not a DiT, its weights do not fit its config, the labels are not
            num_classes strings, or the layout cannot hold the model.
        OSError: the file cannot be written; an older file is left as it was.
    """
    if layout not in SAVED_LAYOUTS:
        raise unknown_name("layout", layout, SAVED_LAYOUTS)
    inner = unwrap(model)
    cfg = config_of(inner)
    if cfg is None:
        raise ValueError(f"model: expected a fastdit.DiT, got {type(inner).__name__}")
    _check_labels("labels", labels, cfg)
    state = inner.state_dict()
    check_keys("model", _empty_model("model", cfg).state_dict(), state)
    if layout == "fastdit":
        diffusion, names = scheduler and scheduler.options, labels and list(labels)
        header = {"config": cfg.to_dict(), "diffusion": diffusion, "labels": names}
        write_tensors(path, state, header)
        return
    if scheduler or labels:
        raise ValueError(f"layout: {layout!r} stores neither scheduler nor labels")
    if layout == "diffusers":
        _save_folder(cfg, state, Path(path))
        return
    theirs = translation.to_facebook(state)
    stored, _ = translation.from_facebook(theirs, cfg.n_heads)
    if replace(stored, init=cfg.init) != cfg:
        raise ValueError(f"layout: {layout!r} can store such a DiT only as {stored}, got {cfg}")
    content = io.BytesIO()  # torch.save reports a full disk as an error of its own
    torch.save({name: t.detach().cpu() for name, t in theirs.items()}, content)
    with atomic_path(path) as aside:
        aside.write_bytes(content.getbuffer())


def _save_folder(cfg: DiTConfig, state: Mapping[str, Tensor], path: Path) -> None:
    """Write the two files that diffusers' from_pretrained reads."""
    config, tensors = translation.to_diffusers(cfg, state)
    if (path / "model_index.json").exists():
        raise ValueError(f"{path}: it is a pipeline's; save to its folder 'transformer'")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: not written, since it exists and is not a folder")
    path.mkdir(parents=True, exist_ok=True)
    # Old and new files are never read together, since a folder without a config is no checkpoint.
    (path / "config.json").unlink(missing_ok=True)
    for index in folders.indices(path):
        index.unlink()
    with atomic_path(path / folders.FOLDER_WEIGHTS) as aside:
        aside.write_bytes(serialize({n: t.detach().contiguous() for n, t in tensors.items()}))
    with atomic_path(path / "config.json") as aside:
        aside.write_text(json.dumps(config, indent=2) + "\n")


def load(
    source: str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module, *, n_heads: int | None = None
) -> DiT:
    """Load a model to the CPU in its stored dtype; the layout is recognised by the keys.

    Args:
        source: a file that `fastdit.save` wrote; a checkpoint of facebookresearch/DiT, which is a
            .pt or safetensors file or a state dict, where a training checkpoint's "ema" is
            preferred to its "model"; a folder of diffusers' DiT or of a pipeline with one; or a
            live module of any of the three projects.
        n_heads: number of attention heads; needed only for a model of facebookresearch/DiT whose
            depth and width are not published ones.

    Returns:
        A fastdit.DiT with its own copy of the weights; `model.cfg` is the config that was read or
        inferred.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the source is truncated, holds code, or is not a DiT of a known layout; the
            message says what it looks like.
    """
    if n_heads is not None:
        check_positive("n_heads", n_heads)
    if isinstance(source, nn.Module):
        inner = unwrap(source)
        config = config_of(inner)
        n_heads = getattr(inner, "num_heads", None) if n_heads is None else n_heads
        name, tensors = type(inner).__name__, inner.state_dict()
        foreign_config = getattr(inner, "config", None)
    elif isinstance(source, Mapping):
        name, config, foreign_config, tensors = "state dict", None, None, dict(source)
    else:
        name = str(source)
        info, foreign_config, tensors = _read(source)
        config = info.config if info else None
    if config is None:
        config, tensors = _translate(name, tensors, foreign_config, n_heads)
    elif n_heads not in (None, config.n_heads):
        raise ValueError(f"n_heads: {name} says {config.n_heads}, got {n_heads}")
    model = _empty_model(name, config)
    check_keys(name, model.state_dict(), tensors)
    for key, t in tensors.items():
        if t.dtype not in FLOAT_DTYPES or t.layout != torch.strided or t.is_meta:
            kind = "a meta tensor" if t.is_meta else f"{t.dtype}, {t.layout}"
            raise ValueError(f"{name}: expected float weights, but {key} is {kind}")
        # Copied, since the file may change, tensors may share a storage, and a live model goes on.
        tensors[key] = t.detach().cpu().clone(memory_format=torch.contiguous_format)
    model.load_state_dict(tensors, assign=True)
    model.pos_embed.requires_grad_(config.pos_embed == "learned")
    return model


def _read(path: str | os.PathLike[str]) -> tuple[CheckpointInfo | None, Any, dict[str, Tensor]]:
    """Return the info of a fastdit file or None, diffusers' config or None, and the tensors."""
    if Path(path).is_dir():
        config, weights = folders.read_folder(Path(path))
        whole: dict[str, Tensor] = {}
        for part in weights:
            tensors = _read(part)[2]
            if twice := _first_few([name for name in tensors if name in whole]):
                raise ValueError(
                    f"{part}: expected other tensors than before it, got {twice} again"
                )
            whole |= tensors
        return None, config, whole
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        start = file.read(9)
    # torch.save writes a zip or a pickle; the JSON of safetensors begins at the ninth byte.
    if start[:1] in (b"P", b"\x80") and start[8:] != b"{":
        return None, None, pickles.pickled_tensors(path)
    with _open(path) as file:
        own = _HEADER in (file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # mapped, not read
        return _read_info(path, file) if own else None, None, tensors


def _translate(
    name: str, tensors: Mapping[str, Tensor], foreign_config: Any, n_heads: int | None
) -> tuple[DiTConfig, dict[str, Tensor]]:
    """Return the config and fastdit's state dict for another project's tensors."""
    layout = translation.layout_of(tensors)
    try:
        if layout == "facebookresearch/DiT":
            return translation.from_facebook(tensors, n_heads)
        if layout == "diffusers" and isinstance(foreign_config, Mapping):
            return translation.from_diffusers(tensors, foreign_config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    raise ValueError(f"{name}: expected a fastdit header, got none; {_describe_layout(tensors)}")


def inspect(path: str | os.PathLike[str], *, n_heads: int | None = None) -> CheckpointInfo:
    """Return what a checkpoint holds besides its weights, stored or inferred from shapes.

    The path is of a file or a folder that `load` reads; n_heads and the errors are as for `load`.
    """
    info, foreign_config, tensors = _read(path)
    if info is not None:
        return info
    config, _ = _translate(str(path), tensors, foreign_config, n_heads)
    names = folders.folder_labels(Path(path), config.num_classes)
    diffusion = folders.folder_diffusion(Path(path)) or dict(_PUBLISHED_DIFFUSION)
    return CheckpointInfo(config, diffusion, names)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: dict[str, Any]
) -> None:
    """Write tensors and a JSON header to a safetensors file, atomically."""
    contiguous = {name: t.detach().contiguous() for name, t in tensors.items()}
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
        ValueError: the file is truncated or has no fastdit header.
    """
    with _open(path) as file:
        header = _read_header(path, file)
        return {name: file.get_tensor(name) for name in file.keys()}, header


def check_keys(source: str, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that names missing, unexpected and misshapen tensors, if there are any."""
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"missing {_first_few(missing)}")
    if unexpected := [name for name in tensors if name not in expected]:
        problems.append(f"unexpected {_first_few(unexpected)}")
    for name, tensor in expected.items():
        if name in tensors and tensors[name].shape != tensor.shape:
            want, got = list(tensor.shape), list(tensors[name].shape)
            problems.append(f"{name}: expected shape {want}, got {got}")
    if problems:
        said = problems[:_SHOWN_KEYS]
        if translation.layout_of(tensors) != "fastdit":
            said.append(_describe_layout(tensors))
        what = "the tensors do not fit the config (in fastdit's names)"
        raise ValueError(f"{source}: {what}: {'; '.join(said)}")


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        got = f"one that is truncated or of another kind ({error})"
        raise ValueError(f"{path}: expected a whole safetensors file, got {got}") from error


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
        advice = "model.safetensors in the run's folder is its model"
        raise ValueError(f"{path}: expected a model, got a checkpoint of a run; {advice}")
    if "config" not in header:
        raise ValueError(f"{path}: expected a config in the fastdit header, got {list(header)}")
    config = DiTConfig.from_saved(header["config"])
    diffusion, labels = header.get("diffusion"), header.get("labels")
    if diffusion is not None:
        if isinstance(diffusion, dict):
            diffusion = {"prediction": "epsilon"} | diffusion  # the only one in older releases
        types = isinstance(diffusion, dict) and {k: type(v) for k, v in diffusion.items()}
        if types != _DIFFUSION_TYPES:
            raise ValueError(f"{path}: expected a diffusion of T and schedule, got {diffusion!r}")
    _check_labels(f"{path}: labels", labels, config)
    return CheckpointInfo(config, diffusion, None if labels is None else tuple(labels))


def _check_labels(what: str, labels: Any, config: DiTConfig) -> None:
    if labels is None:
        return
    names = isinstance(labels, list | tuple) and all(isinstance(n, str) for n in labels)
    if not names or len(labels) != config.num_classes:
        raise ValueError(f"{what}: expected {config.num_classes} names, got {labels!r:.80}")


def _empty_model(source: str, config: DiTConfig) -> DiT:
    """Build the config's model without allocating memory or drawing random numbers."""
    try:
        with torch.device("meta"):
            return DiT.from_config(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"{source}: a model of this config cannot be built ({error})") from error


def _describe_layout(keys: Mapping[str, Any] | Sequence[str]) -> str:
    layout = translation.layout_of(keys)
    if layout is None:
        return f"the keys ({_first_few(list(keys))}) are not of a known layout"
    if layout == "fastdit":
        advice = "build fastdit.DiT with its options, call load_state_dict, then fastdit.save"
        return f"the keys look like fastdit's: {advice}"
    return f"the keys look like those of {layout}: pass the folder, which has a config.json"


def _first_few(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return ", ".join(keys[:_SHOWN_KEYS]) + more
