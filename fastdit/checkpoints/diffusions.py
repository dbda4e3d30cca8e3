"""The diffusion or flow that a checkpoint's model was trained on, as plain options.

Options with a "path" are those of a `FlowMatching`, others those of a `DiffusionScheduler`. They
are stored in fastdit's own files. Of another project's file its layout tells them, the arguments of
its training, or the name that the file was published under; where none of these does, they stay
open, and `diffusion=` (`--diffusion`) answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import PurePath
from typing import Any, NamedTuple, get_type_hints

from fastdit.checkpoints.projects import JIT, LIGHTNING, REPA, projects_of
from fastdit.config import DiTConfig
from fastdit.diffusion import PREDICTIONS, SCHEDULES
from fastdit.errors import check_positive, unknown_name
from fastdit.flow import FlowMatching, process_of, published_flow

# Peebles & Xie 2023, section 4: the linear schedule of ADM.
PUBLISHED_DIFFUSION = {"T": 1000, "schedule": "linear", "prediction": "epsilon"}
# The argument by which `fastdit.save` notes it in other projects' layouts.
NOTE = "fastdit_diffusion"
# What `diffusion=` and `--diffusion` take in place of options.
NAMES = ("flow", "ddpm")

_DIFFUSION_TYPES = {key: type(value) for key, value in PUBLISHED_DIFFUSION.items()}
_FLOW_TYPES = get_type_hints(FlowMatching)
_FIELDS = [*PUBLISHED_DIFFUSION, *(f.name for f in fields(FlowMatching) if f.name != "prediction")]

# SiT's and LightningDiT's names of paths and predictions, and REPA's "cosine" and "v".
_THEIR_PATHS = {"linear": "linear", "gvp": "gvp", "vp": "vp", "cosine": "gvp"}
_THEIR_PREDICTIONS = {
    "velocity": "velocity",
    "v": "velocity",
    "noise": "epsilon",
    "score": "score",
}
_JIT_ARGUMENTS = {"noise_scale": "noise_scale", "t_eps": "min_noise"}


class Found(NamedTuple):
    """What a file tells of its training's diffusion.

    Attributes:
        options: of the diffusion; None where nothing tells them.
        by_name: whether nothing but the file's name tells them.
    """

    options: dict[str, Any] | None
    by_name: bool = False


def told_by_file(
    tensors: Mapping[str, Any], arguments: Mapping[str, Any], file: str, cfg: DiTConfig
) -> Found:
    """Return what a file of facebookresearch/DiT's names tells of its diffusion.

    Args:
        tensors: by names, which tell the project.
        arguments: the training run's arguments, where the file has them.
        file: its name, or "".
        cfg: the model's config.
    """
    stored = arguments.get(NOTE)
    if isinstance(stored, Mapping):
        return Found(checked(dict(stored), None))
    projects = projects_of(tensors)
    model = str(arguments.get("model", ""))
    if len(projects) > 1:
        return Found(None)
    if JIT in projects:
        flow = _published("JiT", cfg)
        given = {own: arguments.get(name) for name, own in _JIT_ARGUMENTS.items()}
        return Found(checked({k: v for k, v in given.items() if v is not None}, flow))
    if REPA in projects or (model.startswith("SiT") and "encoder_depth" in arguments):
        return Found(_with_arguments(_published("REPA", cfg), arguments))
    of_lightning = str(arguments.get("model_type", "")).startswith("LightningDiT")
    if LIGHTNING in projects or of_lightning or not cfg.modulation_shift:
        return Found(_with_arguments(_published("LightningDiT", cfg), arguments))
    if cfg.qk_norm != "none":
        return Found(None)  # REPA's or LightningDiT's, whose times run against each other
    if model.startswith("SiT"):
        return Found(_with_arguments(_published("SiT", cfg), arguments))
    if model.startswith("DiT"):
        return Found(dict(PUBLISHED_DIFFUSION))
    if named := re.match(r"(SiT|DiT)-", PurePath(file).name, re.IGNORECASE):
        of_sit = named[1].lower() == "sit"
        return Found(_published("SiT", cfg) if of_sit else dict(PUBLISHED_DIFFUSION), True)
    return Found(None)


def _published(project: str, cfg: DiTConfig) -> dict[str, Any]:
    flow = published_flow(project, cfg.sample_shape[1])
    assert flow is not None
    return flow.options


def _with_arguments(options: dict[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a flow's options as training arguments say; None if they say something unknown."""
    for name, argument, known in (
        ("path", "path_type", _THEIR_PATHS),
        ("prediction", "prediction", _THEIR_PREDICTIONS),
    ):
        value = arguments.get(argument)
        if value is not None and str(value).lower() not in known:
            return None
        options[name] = options[name] if value is None else known[str(value).lower()]
    return options


def checked(given: Mapping[str, Any] | str, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a diffusion's options, those that are not given as they are known or published.

    Args:
        given: some or all options of a `FlowMatching` or a `DiffusionScheduler`; or "flow" or
            "ddpm", the known or published ones of either.
        known: all options, if the file tells them.

    Raises:
        ValueError: an option is unknown or out of range, or the two kinds are mixed.
    """
    if isinstance(given, str):
        if given not in NAMES:
            raise unknown_name("diffusion", given, NAMES)
        flow, given = given == "flow", {}
    elif not isinstance(given, Mapping):
        expected = f"{' or '.join(map(repr, NAMES))}, or a dict of options"
        raise ValueError(f"diffusion: expected {expected}, got {type(given).__name__}")
    else:
        flow = _is_flow(given, known)
    if known is not None and ("path" in known) != flow:
        known = None
    if not flow:
        options = {**(known or PUBLISHED_DIFFUSION), **given}
        check_positive("diffusion: T", options["T"])
        for name, known_names in (("schedule", SCHEDULES), ("prediction", PREDICTIONS)):
            if options[name] not in list(known_names):
                raise unknown_name(f"diffusion: {name}", options[name], known_names)
        return options
    options = {**(known or FlowMatching().options), **given}
    has_bound = options["path"] == "linear" and options["prediction"] == "sample"
    if not has_bound and "min_noise" not in given:
        options["min_noise"] = None
    try:
        return process_of(options).options
    except ValueError as error:
        raise ValueError(f"diffusion: {error}") from error


def _is_flow(given: Mapping[str, Any], known: Mapping[str, Any] | None) -> bool:
    """Return whether options are a flow's; some belong to either kind."""
    for name in given:
        if name not in _FIELDS:
            raise unknown_name("diffusion", name, _FIELDS)
    of_flow = [name for name in given if name not in PUBLISHED_DIFFUSION]
    of_ddpm = [name for name in given if name not in _FLOW_TYPES]
    if of_flow and of_ddpm:
        kinds = f"{of_flow[0]} is a flow's and {of_ddpm[0]} a discrete diffusion's"
        raise ValueError(f"diffusion: expected options of one kind, but {kinds}")
    return bool(of_flow) or (not of_ddpm and known is not None and "path" in known)


def from_header(path: Any, diffusion: Any) -> dict[str, Any] | None:
    """Return the options that a fastdit header holds, in one order.

    Raises:
        ValueError: they are not those of a diffusion or a flow.
    """
    if diffusion is None:
        return None
    if isinstance(diffusion, dict) and "path" in diffusion:
        return process_of(diffusion).options
    if isinstance(diffusion, dict):
        diffusion = {"prediction": "epsilon"} | diffusion  # the only one in older releases
    types = isinstance(diffusion, dict) and {k: type(v) for k, v in diffusion.items()}
    if types != _DIFFUSION_TYPES:
        expected = "a diffusion of T and schedule, or a flow of a path"
        raise ValueError(f"{path}: expected {expected}, got {diffusion!r}")
    return {name: diffusion[name] for name in PUBLISHED_DIFFUSION}


def in_words(options: Mapping[str, Any]) -> str:
    """Return a short name of a diffusion, for messages."""
    if "path" in options:
        return f"({options['path']} flow, {options['prediction']})"
    return "({T} {schedule} steps, {prediction})".format_map(options)


def parse(text: str) -> str | dict[str, Any]:
    """Return what a text such as "flow" or "T=1000,schedule=linear" stands for, as `checked` takes.

    Raises:
        ValueError: it is neither a name nor pairs of an option and a value of its kind.
    """
    if text.strip() in NAMES:
        return text.strip()
    parsed: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            expected = f"{', '.join(NAMES)}, or name=value, comma-separated"
            raise ValueError(f"--diffusion: expected {expected}, got {part!r}")
        if name not in _FIELDS:
            raise unknown_name("--diffusion", name, _FIELDS)
        parsed[name] = _value(name, value)
    return parsed


def _value(name: str, text: str) -> Any:
    if name == "T":
        if not text.isdecimal():
            raise ValueError(f"--diffusion: expected T to be a number of steps, got {text!r}")
        return int(text)
    if name not in _FLOW_TYPES or _FLOW_TYPES[name] not in (int, float, float | None):
        return text
    if text.lower() == "none" and _FLOW_TYPES[name] == float | None:
        return None
    try:
        return int(text) if _FLOW_TYPES[name] is int else float(text)
    except ValueError:
        raise ValueError(f"--diffusion: expected {name} to be a number, got {text!r}") from None
