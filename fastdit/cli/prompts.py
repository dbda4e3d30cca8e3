"""`fastdit sample` for models of text: prompts, their embeddings, and what is written of both."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from tqdm import tqdm

import fastdit
from fastdit.checkpoints import load
from fastdit.cli.batches import parse_noise, within_memory
from fastdit.cli.checkpoints import parse_size
from fastdit.cli.common import option
from fastdit.cli.outputs import Finish, write_images
from fastdit.cli.solvers import parse_solver
from fastdit.data.latents import load_vae
from fastdit.diffusion import DiffusionScheduler
from fastdit.errors import height_and_width, unknown_name
from fastdit.flow import FlowMatching, Process, process_of
from fastdit.sampling.executions import EXECUTIONS
from fastdit.sampling.loop import Progress
from fastdit.sampling.sampler import Sampler
from fastdit.solvers import Dopri5, Euler, FlowSolver, Solver
from fastdit.text import TextModel
from fastdit.text.encoders import TextEncoder, encode_once, stacked
from fastdit.text_config import PixArtConfig, TextConfig
from fastdit.update import Guidance

# What diffusers' pipelines do without options.
PIXART_STEPS, PIXART_SCALE = 20, 4.5
SD3_STEPS, SD3_SCALE, SD3_SHIFT = 28, 7.0, 3.0
_PIXELS_PER_LATENT = 8  # where there is no autoencoder, as in the pipelines
_KEYS = ("prompt", "negative_prompt", "seed")
_NO_VAE = "none"

Prompt = Annotated[
    list[str] | None,
    option("For a model of text: what the image shows. Give it several times for several images."),
]
PromptFile = Annotated[
    Path | None,
    option(
        "File of prompts, one a line; or, if its name ends in .jsonl, of JSON objects with prompt "
        "and, if you like, negative_prompt and seed.",
        "--prompts",
    ),
]
NegativePrompt = Annotated[
    str | None, option("What guidance leads away from.  [an empty prompt]", "--negative-prompt")
]
Size = Annotated[
    str | None, option("HEIGHTxWIDTH in pixels of a model of text.  [that of its training]")
]
TextEncoderFolder = Annotated[
    Path | None,
    option(
        "Folder of a diffusers pipeline with tokenizers and text encoders.  [the checkpoint's own "
        "folder]",
        "--text-encoder",
    ),
]
TextDtype = Annotated[
    str | None, option("Of the text encoders: float32, bfloat16, float16.  [their files']")
]


Line = tuple[str, str | None, int | None]  # prompt, negative prompt and seed


@dataclass(frozen=True)
class Row:
    """One image to make."""

    prompt: str
    negative_prompt: str
    seed: int


@dataclass(frozen=True)
class TextOptions:
    """The options of `fastdit sample` that only models of text take.

    The default of each says that it was not given.
    """

    prompt: list[str] | None = None
    prompts: Path | None = None
    negative_prompt: str | None = None
    size: str | None = None
    text_encoder: Path | None = None
    text_dtype: str | None = None

    def refuse(self) -> None:
        """Raise a ValueError if any is given, since the model is one of labels."""
        for name, value in asdict(self).items():
            if value not in (None, []):
                flag = name.replace("_", "-")
                reason = "since the model is a DiT, which takes --labels"
                raise ValueError(f"--{flag}: expected none, {reason}, got {value}")


@dataclass(frozen=True)
class SampleOptions:
    """The options of `fastdit sample` that models of text share with those of labels."""

    checkpoint: Path
    told: dict[str, Any]
    out: Path
    count: int | None
    seed: int
    seeds: str | None
    batch_size: int
    solver: str | None
    steps: int | None
    clip: float | None
    shift: float | None
    solver_options: str | None
    guidance: Guidance | None
    dtype: str | None
    execution: str
    vae: str | None
    device: torch.device


def refuse_label_options(cfg: TextConfig, options: Mapping[str, Any]) -> None:
    """Raise a ValueError if an option that a model of text does not take is given."""
    for flag, value in options.items():
        if value not in (None, 0):
            reason = f"since the model is {_kind(cfg)}, which takes --prompt, --count and --seeds"
            raise ValueError(f"{flag}: expected none, {reason}, got {value}")


def _kind(cfg: TextConfig) -> str:
    return "a PixArt" if isinstance(cfg, PixArtConfig) else "an MMDiT"


def sample_prompts(
    cfg: TextConfig, trained_on: dict[str, Any], text: TextOptions, o: SampleOptions
) -> None:
    """Sample images of prompts, and write them with prompts, seeds and settings."""
    process = process_of(trained_on)
    name, solver, steps = _solver(cfg, o, process)
    solver.table(process, steps)  # an error here rather than after minutes of encoding
    if o.execution not in ("auto", *EXECUTIONS):
        raise unknown_name("--execution", o.execution, ("auto", *EXECUTIONS))
    guidance = o.guidance or Guidance(_published(cfg)[1])
    guided = None if guidance.scale == 1 else guidance
    rows, columns = _rows(text, o, guided is not None)
    source = _vae_source(o)
    finish = Finish(None, None if source is None else load_vae(source, o.device, shifted=True))
    finish.check(cfg.in_channels)
    shape = (cfg.in_channels, *_latent_size(text.size, cfg, finish))
    encoded = _encoded(cfg, text, o, rows, guided is not None)
    model = load(o.checkpoint, **o.told)
    assert isinstance(model, TextModel)
    sampler = Sampler(
        model.to(o.device),
        process,
        solver,
        steps,
        guidance=guided,
        dtype=None if o.dtype is None else getattr(torch, o.dtype),
        execution=o.execution,
        sample_shape=shape,
    )
    batches = []
    with tqdm(total=len(rows), unit="image", disable=len(rows) <= o.batch_size) as bar:
        for i in range(0, len(rows), o.batch_size):
            some = rows[i : i + o.batch_size]
            batches.append(_sample(sampler, some, encoded).cpu())
            bar.update(len(some))
    images = finish(torch.cat(batches))
    settings = dict(solver=name, steps=steps, shift=getattr(solver, "shift", None))
    settings |= dict(guidance_scale=guidance.scale, size=list(images.shape[-2:]), dtype=o.dtype)
    rest: dict[str, Any] = dict(
        clip=o.clip, solver_options=o.solver_options, text_dtype=text.text_dtype
    )
    rest |= dict(guidance_interval=guidance.interval, guidance_channels=guidance.channels)
    settings |= {key: value for key, value in rest.items() if value is not None}
    write_images(o.out, images, columns, _metadata(rows, o, cfg, settings))
    print(f"wrote {len(rows)} image{'s' * (len(rows) > 1)} to {o.out}")


def _metadata(
    rows: Sequence[Row], o: SampleOptions, cfg: TextConfig, settings: dict[str, Any]
) -> dict[str, Any]:
    kind = "PixArt" if isinstance(cfg, PixArtConfig) else "MMDiT"
    made_by = {"version": fastdit.__version__, "checkpoint": str(o.checkpoint), "model": kind}
    return {**made_by, **settings, "images": [asdict(row) for row in rows]}


def _published(cfg: TextConfig) -> tuple[int, float]:
    """Return the steps and the scale of guidance of the model's pipeline."""
    pixart = isinstance(cfg, PixArtConfig)
    return (PIXART_STEPS, PIXART_SCALE) if pixart else (SD3_STEPS, SD3_SCALE)


def _solver(cfg: TextConfig, o: SampleOptions, process: Process) -> tuple[str, Solver, int | None]:
    """Return the solver and its steps; what is not named is as in the model's pipeline."""
    default = "dpm++" if isinstance(process, DiffusionScheduler) else "euler"
    name, solver = parse_solver(o.solver or default, process, o.clip, o.shift, o.solver_options)
    steps = _published(cfg)[0] if o.steps is None and not isinstance(solver, Dopri5) else o.steps
    if isinstance(process, FlowMatching) and isinstance(solver, FlowSolver):
        shift = 1 / _scheduler_shift(o.checkpoint) if o.shift is None else solver.shift
        if name == "euler" and o.solver_options is None:
            solver = replace(Euler.from_diffusers(1 / shift), clip=o.clip)
        else:
            solver = replace(solver, shift=shift)
    return name, solver, steps


def _scheduler_shift(checkpoint: Path) -> float:
    """Return the shift of a pipeline's scheduler; that of Stable Diffusion 3 where it has none."""
    path = checkpoint / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return SD3_SHIFT
    shift = json.loads(path.read_text()).get("shift", 1.0)
    if not isinstance(shift, int | float) or isinstance(shift, bool) or not 0 < shift < math.inf:
        raise ValueError(f"{path}: expected a positive shift, got {shift!r}; pass --shift")
    return float(shift)


def _rows(text: TextOptions, o: SampleOptions, guided: bool) -> tuple[list[Row], int]:
    """Return the images to make, prompt after prompt, and how many a row of the grid has."""
    if text.negative_prompt is not None and not guided:
        raise ValueError("--negative-prompt: expected guidance beside it, got --guidance-scale 1")
    given: list[Line] = [(p, None, None) for p in text.prompt or ()]
    given += read_prompts(text.prompts) if text.prompts is not None else []
    if not given:
        raise ValueError("--prompt: expected a prompt, or a file of them by --prompts, got none")
    noise = parse_noise(o.seed, 0, o.seeds, o.count, None)
    rows = []
    for prompt, negative, own in given:
        if not prompt.strip():
            raise ValueError(f"--prompt: expected words, got {prompt!r}")
        for one in (prompt, negative or text.negative_prompt or ""):
            if any("\ud800" <= letter <= "\udfff" for letter in one):
                raise ValueError(f"--prompt: expected Unicode, got half a character in {one!r:.60}")
        if own is not None and o.seeds is not None:
            raise ValueError(
                f"--seeds: expected none, since {text.prompts} has seeds, got {o.seeds}"
            )
        if negative is not None and not guided:
            raise ValueError(f"--prompts: {text.prompts} has negative prompts, which need guidance")
        if negative is None:
            negative = text.negative_prompt or ""
        first = o.seed if own is None else own
        seeds = noise.seeds or range(first, first + (o.count or 1))
        rows += [Row(prompt, negative, seed) for seed in seeds]
    per_prompt = len(noise.seeds) or o.count or 1
    return rows, per_prompt if per_prompt > 1 else math.ceil(len(rows) ** 0.5)


def read_prompts(path: Path) -> list[Line]:
    """Return (prompt, negative prompt, seed) of each line of a file; blank lines are passed over.

    Raises:
        ValueError: there is no such file, it is not UTF-8, or a line is not what it should be.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--prompts: expected a text file in UTF-8, got {path} ({error})"
        ) from error
    numbered = [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"--prompts: expected a prompt on each line, got none in {path}")
    if path.suffix != ".jsonl":
        return [(line, None, None) for _, line in numbered]
    return [_from_json(f"--prompts: {path}, line {i}", line) for i, line in numbered]


def _from_json(where: str, line: str) -> Line:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON object ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected a JSON object, got {line:.40}")
    for key in found:
        if key not in _KEYS:
            raise unknown_name(where, key, _KEYS)
    prompt, negative, seed = (found.get(key) for key in _KEYS)
    if not isinstance(prompt, str) or not isinstance(negative, str | None):
        raise ValueError(f"{where}: expected texts as prompt and negative_prompt, got {line:.80}")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise ValueError(f"{where}: expected an integer from 0 as seed, below 2^63, got {seed!r}")
    return prompt, negative, seed


def _vae_source(o: SampleOptions) -> str | Path | None:
    """Return the autoencoder: the named one, the pipeline's own, or None for latents."""
    own = o.checkpoint / "vae"
    source = o.vae if o.vae is not None else str(o.checkpoint) if own.is_dir() else None
    if source == _NO_VAE:
        source = None
    if source is None and o.out.suffix == ".png":
        raise ValueError("--vae: expected an autoencoder to decode a PNG by, got none")
    return source


def _latent_size(size: str | None, cfg: TextConfig, finish: Finish) -> tuple[int, int]:
    if size is None:
        height, width = cfg.sample_shape[1:]
        return height, width
    factor = _PIXELS_PER_LATENT
    if finish.decoder is not None:
        channels: Any = finish.decoder.config
        factor = 2 ** (len(channels.block_out_channels) - 1)
    parsed = parse_size("--size", size)
    height, width = height_and_width("--size", parsed, factor * cfg.patch_size)
    try:
        cfg.grid_of(height // factor, width // factor)
    except ValueError as error:
        raise ValueError(
            f"--size: {size} pixels are latents that the model lacks: {error}"
        ) from error
    return height // factor, width // factor


def _encoded(
    cfg: TextConfig, text: TextOptions, o: SampleOptions, rows: Sequence[Row], guided: bool
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return the embeddings of all prompts; the text encoders are gone afterwards."""
    folder = text.text_encoder
    if folder is None:
        folder = o.checkpoint
        if not (folder / "model_index.json").is_file():
            raise ValueError(
                "--text-encoder: expected the folder of a pipeline with text encoders, since "
                f"{folder} is none, got none"
            )
    dtype = None if text.text_dtype is None else getattr(torch, text.text_dtype)
    texts = [row.prompt for row in rows]
    texts += [row.negative_prompt for row in rows] if guided else []

    def shown(some: list[str]) -> Iterable[str]:
        return tqdm(some, desc="encoding", unit="prompt", disable=len(some) < 3)

    return encode_once(TextEncoder(folder, cfg, o.device, dtype), texts, shown)


def _sample(
    sampler: Sampler, rows: Sequence[Row], encoded: dict[str, tuple[Tensor, Tensor | None]]
) -> Tensor:
    def make(size: int, progress: Progress) -> Tensor:
        some = rows[:size]
        negative = None
        if sampler.guidance is not None:
            different = {row.negative_prompt for row in some}
            names = [*different] if len(different) == 1 else [r.negative_prompt for r in some]
            negative = stacked([encoded[name] for name in names])
        return sampler(
            prompt_embeds=stacked([encoded[row.prompt] for row in some]),
            negative_prompt_embeds=negative,
            seeds=[row.seed for row in some],
            progress=progress,
        )

    return within_memory(sampler, make, len(rows), progress=True)
