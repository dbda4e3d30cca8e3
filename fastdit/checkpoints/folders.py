"""Folders of diffusers: a transformer's config and weights, or a pipeline's that holds one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdit.checkpoints.lora import ADAPTER_FILES, adapter_error
from fastdit.diffusion import PREDICTIONS, SCHEDULES
from fastdit.errors import first_few
from fastdit.flow import FlowMatching

FOLDER_WEIGHTS = "diffusion_pytorch_model.safetensors"

# One file, or an index of several: "NAME.safetensors", "NAME.fp16.safetensors",
# "NAME.safetensors.index.json" and "NAME.safetensors.index.fp16.json", and the same with "bin".
_NAMES = "(?:diffusion_pytorch_model|model)"
_WEIGHTS = re.compile(
    rf"{_NAMES}(?:\.(?P<variant>[^.]+))?\.(?:safetensors|bin)"
    rf"|{_NAMES}\.(?:safetensors|bin)\.index(?:\.(?P<of_index>[^.]+))?\.json"
)
_SHARD = re.compile(r".*-\d+-of-\d+")
_SHOWN_FILES = 4

# What diffusers' schedulers add to the betas of their config; fastdit has no such diffusion.
_OTHER_PROCESSES = ("rescale_betas_zero_snr", "use_flow_sigmas")
# Their times are the noise's part of the mixture, times the number of training steps.
_FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


def read_folder(path: Path) -> tuple[dict[str, Any], list[Path]]:
    """Return the config and the weights' files in diffusers' folder of a transformer or a pipeline.

    Weights without a variant are preferred to those with one, such as "fp16".

    Raises:
        ValueError: config or weights are missing, there are several variants to choose from, the
            config is not a JSON object, or the index of the weights' files is damaged.
    """
    if (path / "transformer").is_dir() and not (path / "config.json").is_file():
        path = path / "transformer"
    source, by_variant = path / "config.json", _weights_by_variant(path)
    if not by_variant:
        for name in ADAPTER_FILES:
            if (path / name).is_file():
                raise ValueError(f"{path}: {adapter_error(name)}")
    if not by_variant or not source.is_file():
        names = f"config.json and {FOLDER_WEIGHTS} or another file of weights"
        raise ValueError(f"{path}: expected {names}, as diffusers' save_pretrained writes them")
    if None not in by_variant and len(by_variant) > 1:
        names = ", ".join(sorted(str(name) for name in by_variant))
        advice = "leave the files of one of them in the folder, or remove the variant from names"
        raise ValueError(f"{path}: expected weights of one variant, got {names}; {advice}")
    weights = min(by_variant.get(None) or next(iter(by_variant.values())), key=_preference)
    config = _read_object(source)
    return config, _shards(weights) if weights.suffix == ".json" else [weights]


def weight_files(path: Path) -> list[Path]:
    """Return the files that a model at `path`, a file or a folder, is read from."""
    if path.is_file():
        return [path]
    _, weights = read_folder(path)
    return [weights[0].with_name("config.json"), *weights]


def indices(path: Path) -> Iterator[Path]:
    """Yield the indices of shards in a folder, which diffusers prefers to a single file."""
    return (file for files in _weights_by_variant(path).values() for file in files if _index(file))


def folder_labels(path: Path, num_classes: int) -> tuple[str, ...] | None:
    """Return the names of the classes if `path` is a pipeline's folder that has all of them."""
    try:
        names = json.loads((path / "model_index.json").read_text())["id2label"]
        return tuple(str(names[str(i)]) for i in range(num_classes))
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError):
        return None


def pipeline_folder(path: Path) -> Path:
    """Return the pipeline's folder around `path` if that is its transformer's, else `path`."""
    around = path.absolute().parent
    is_part = path.absolute().name == "transformer" and (around / "model_index.json").is_file()
    return around if is_part else path


def folder_pipeline(path: Path) -> str | None:
    """Return the name of the class of the pipeline whose folder `path` is, if it is one's."""
    try:
        name = json.loads((path / "model_index.json").read_text())["_class_name"]
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError):
        return None
    return name if isinstance(name, str) else None


def folder_diffusion(path: Path, flows: bool = False) -> dict[str, Any] | None:
    """Return the diffusion that a pipeline's folder says its model was trained on.

    A scheduler of diffusers is a solver and the training's diffusion; the solver does not matter
    here.

    Args:
        path: of the pipeline's folder.
        flows: whether a flow is taken, as the pipelines of text-to-image models have.

    Returns:
        Keyword arguments of a `DiffusionScheduler` or, with a "path", of a `FlowMatching`; None if
            `path` has no scheduler's config.

    Raises:
        ValueError: the config is damaged, or of a diffusion that fastdit does not have.
    """
    source = path / "scheduler" / "scheduler_config.json"
    if not source.is_file():
        return None
    config = _read_object(source)
    T = config.get("num_train_timesteps", 1000)
    if not isinstance(T, int) or isinstance(T, bool) or not 0 < T < 2**20:
        raise ValueError(f"{source}: expected num_train_timesteps from 1 to 2^20, got {T!r:.40}")
    if flows and config.get("_class_name") in _FLOW_SCHEDULERS:
        if config.get("invert_sigmas"):
            raise ValueError(f"{source}: scheduler: expected no invert_sigmas, got it")
        return FlowMatching(clean_at=0, time_scale=T).options
    prediction = config.get("prediction_type", PREDICTIONS[0])  # the only one in old files
    if prediction not in PREDICTIONS:
        known = ", ".join(PREDICTIONS)
        raise ValueError(f"{source}: expected prediction_type of {known}, got {prediction!r:.40}")
    changed = [option for option in _OTHER_PROCESSES if config.get(option)]
    schedule = None if changed else _schedule(config, T)
    if schedule is None:
        low, high = (SCHEDULES["linear"](1000)[i].item() for i in (0, -1))
        known = f"linear betas {low:g} to {high:g} (or these times 1000/T) or squaredcos_cap_v2"
        got = ", ".join([_betas_in_words(config), *changed])
        advice = "diffusion= (--diffusion) replaces it"
        raise ValueError(f"{source}: scheduler: expected {known}, got {got}; {advice}")
    return {"T": T, "schedule": schedule, "prediction": prediction}


def _weights_by_variant(path: Path) -> dict[str | None, list[Path]]:
    """Return the files of whole weights and the indices of shards; None is no variant."""
    found: dict[str | None, list[Path]] = {}
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        match = _WEIGHTS.fullmatch(file.name)
        variant = match and (match["variant"] or match["of_index"])
        if match and not (variant and _SHARD.fullmatch(variant)) and file.is_file():
            found.setdefault(variant, []).append(file)
    return found


def _index(file: Path) -> bool:
    return file.suffix == ".json"


def _preference(file: Path) -> tuple[bool, bool, bool]:
    """Sort a model's own file first, then safetensors, then weights in a single file."""
    return not file.name.startswith("diffusion"), ".safetensors" not in file.name, _index(file)


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names.

    Raises:
        ValueError: the index is damaged, a file is missing, or one lies outside the folder.
    """
    by_name = _read_object(index).get("weight_map")
    if not isinstance(by_name, dict) or not by_name:
        raise ValueError(f"{index}: expected a weight_map of tensors to files, got {by_name!r:.40}")
    for name in by_name.values():
        if not isinstance(name, str) or Path(name).name != name or name == "..":
            raise ValueError(f"{index}: expected names of files beside it, got {name!r:.80}")
    files = [index.with_name(name) for name in sorted(set(by_name.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        count = f"{len(missing)} of its {len(files)} files are missing"
        raise ValueError(f"{index}: {count}: {first_few(missing, _SHOWN_FILES)}")
    return files


def _schedule(config: dict[str, Any], T: int) -> str | None:
    """Return the name of the schedule that has the betas of a scheduler's config, or None."""
    kind = config.get("beta_schedule")
    if config.get("trained_betas") is not None:
        betas = _as_betas(config["trained_betas"], T)
    elif kind == "linear":
        ends = _as_betas([config.get("beta_start", 1e-4), config.get("beta_end", 0.02)], 2)
        betas = None if ends is None else torch.linspace(ends[0], ends[1], T, dtype=torch.float64)
    else:
        return "cosine" if kind == "squaredcos_cap_v2" else None
    for name, make in SCHEDULES.items():
        # "linear-scaled" has no betas for fewer steps.
        if betas is not None and (T > 20 or name != "linear-scaled"):
            if torch.allclose(betas, make(T), rtol=1e-5, atol=0):  # diffusers' are float32
                return name
    return None


def _as_betas(values: Any, count: int) -> Tensor | None:
    if not isinstance(values, list) or len(values) != count:
        return None
    numbers = all(isinstance(value, int | float) for value in values)
    return torch.tensor(values, dtype=torch.float64) if numbers else None


def _betas_in_words(config: dict[str, Any]) -> str:
    if (betas := config.get("trained_betas")) is not None:
        return f"trained_betas {betas!r:.60}"
    name = config.get("_class_name", "a scheduler")
    if (kind := config.get("beta_schedule")) is None:
        return f"{name} without betas"
    ends = (config.get(key) for key in ("beta_start", "beta_end"))
    return f"{kind} {' to '.join(str(end) for end in ends)}"


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {content!r:.40}")
    return content
