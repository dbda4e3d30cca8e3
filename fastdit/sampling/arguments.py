"""Checks of `Sampler`'s arguments; each returns its argument in the form that the loop takes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastdit.config import DiTConfig
from fastdit.errors import FLOAT_DTYPES, check_finite, check_range
from fastdit.flow import FlowMatching, Process
from fastdit.sampling.predictors import ClassLabels
from fastdit.sampling.text import PromptRows
from fastdit.text import Prompts
from fastdit.text_config import MMDiTConfig, TextConfig
from fastdit.update import Guidance

Labels: TypeAlias = int | np.integer | Sequence[int] | Tensor | np.ndarray
Embeds: TypeAlias = Prompts | Tensor | Sequence[Tensor]
Generators: TypeAlias = torch.Generator | Sequence[torch.Generator]


def sample_shape(
    given: tuple[int, int, int] | None, cfg: DiTConfig | TextConfig | None
) -> tuple[int, int, int]:
    """Return an image's (C, H, W): the given one, or the model's own, which a DiT needs."""
    if given is not None:
        if not isinstance(given, Sequence):
            got = type(given).__name__
            raise ValueError(f"sample_shape: expected three positive integers, got {got}")
        given = tuple(given)  # type: ignore[assignment]
    is_text = isinstance(cfg, TextConfig)
    shape = given if given is not None and is_text else cfg.sample_shape if cfg else given
    if shape is None:
        raise ValueError("sample_shape: expected (C, H, W), since the model is not a DiT, got None")
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"sample_shape: expected three positive integers, got {shape}")
    if given not in (None, shape):
        raise ValueError(f"sample_shape: expected the model's {shape}, got {given}")
    if isinstance(cfg, TextConfig):
        if shape[0] != cfg.in_channels:
            expected = f"the model's {cfg.in_channels} channels"
            raise ValueError(f"sample_shape: expected {expected}, got {shape[0]} of {shape}")
        try:
            cfg.grid_of(*shape[1:])
        except ValueError as error:
            message = str(error).removeprefix("size: ")
            raise ValueError(f"sample_shape: {message}") from None
    return shape


def check_guidance(
    guidance: Guidance | None, cfg: DiTConfig | TextConfig | None, process: Process
) -> None:
    """Raise a ValueError for guidance that a model or its process cannot have."""
    if guidance is None:
        return
    if not isinstance(guidance, Guidance):
        raise ValueError(f"guidance: expected fastdit.Guidance(scale), got {guidance!r}")
    if cfg is None or not (isinstance(cfg, TextConfig) or cfg.null_class):
        raise ValueError("guidance: expected none, since the model is not a DiT with a null class")
    if guidance.channels is not None and guidance.channels > cfg.in_channels:
        raise ValueError(
            f"guidance.channels: expected at most the model's {cfg.in_channels}, got "
            f"{guidance.channels}"
        )
    if guidance.interval is None:
        return
    integers = all(isinstance(bound, int) for bound in guidance.interval)
    if isinstance(process, FlowMatching):
        if guidance.interval[1] > 1:
            raise ValueError(
                "guidance.interval: expected times from 0 to 1, since the model's process is a "
                f"FlowMatching, got {guidance.interval}"
            )
    elif not integers:
        raise ValueError(
            "guidance.interval: expected integers, since the model's process is a "
            f"DiffusionScheduler of {process.T} timesteps, got {guidance.interval}"
        )


def check_dtype(dtype: torch.dtype | None, own: torch.dtype, copies: bool) -> None:
    """Raise a ValueError for a forward's dtype, unless a model has it or can be copied to it."""
    if dtype is None:
        return
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, FLOAT_DTYPES))}, got {dtype}")
    if dtype != own and not copies:
        raise ValueError(
            f"dtype: expected {own} or None, since the model is not a fastdit.DiT, got {dtype}"
        )


def class_labels(labels: Labels | None, cfg: DiTConfig | TextConfig | None) -> Tensor | None:
    """Return the labels as [B] int64 on the CPU, in range if the config is known.

    A single integer is one label.
    """
    if labels is None:
        return None
    if isinstance(cfg, TextConfig):
        raise ValueError(
            "labels: expected None, since the model takes prompts: pass prompt_embeds, got "
            f"{labels!r}"
        )
    if cfg is not None and not cfg.use_class_cond:
        raise ValueError("labels: expected None, since the model has use_class_cond=False")
    expected = "labels: expected a non-empty list of integers, one an image"
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()  # torch refuses negative strides
    try:
        y = torch.as_tensor(labels, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{expected}; got {labels!r}") from error
    if y.layout != torch.strided or y.is_meta:
        raise ValueError(f"{expected}; got {'a meta tensor' if y.is_meta else y.layout}")
    numbers = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    if y.dim() == 0 and numbers:
        y = y[None]
    if y.dim() != 1 or not numbers or not len(y):
        raise ValueError(f"{expected}; got {y.dtype} of shape {list(y.shape)}")
    y = y.to(torch.int64)
    if cfg is not None:
        check_range("labels", y, cfg.num_classes)
    return y


def conditions(
    labels: Labels | None,
    embeds: Embeds | None,
    negative: Embeds | None,
    guidance: Guidance | None,
    cfg: DiTConfig | TextConfig | None,
) -> tuple[ClassLabels | PromptRows | None, int | None]:
    """Return what the images are of, with null labels or negative prompts last, and their number.

    Both are None where there are neither labels nor prompts.
    """
    y, text = class_labels(labels, cfg), _all_prompts(embeds, negative, guidance, cfg)
    if isinstance(cfg, TextConfig):
        assert text is not None
        return text, len(text) // (1 if guidance is None else 2)
    return _with_null(y, guidance, cfg), None if y is None else len(y)


def _with_null(
    y: Tensor | None, guidance: Guidance | None, cfg: DiTConfig | None
) -> ClassLabels | None:
    """Return the labels, and where there is guidance as many null labels after them."""
    if guidance is None:
        return None if y is None else ClassLabels(y.tolist())
    assert cfg is not None
    if y is None:
        raise ValueError("labels: guidance needs labels, got None")
    return ClassLabels(y.tolist() + [cfg.num_classes] * len(y))


def _all_prompts(
    embeds: Embeds | None,
    negative: Embeds | None,
    guidance: Guidance | None,
    cfg: DiTConfig | TextConfig | None,
) -> PromptRows | None:
    """Return the prompts, and where there is guidance as many negative prompts after them.

    They are cut to the longest of them. A model that takes no prompts must get none.
    """
    names = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    if not isinstance(cfg, TextConfig):
        for name, value in names.items():
            if value is not None:
                expected = "None, since the model is no fastdit.PixArt or fastdit.MMDiT"
                raise ValueError(f"{name}: expected {expected}, got {type(value).__name__}")
        return None
    if embeds is None:
        raise ValueError("prompt_embeds: expected embeddings, one prompt an image, got None")
    if (negative is None) != (guidance is None):
        got = "None" if negative is None else type(negative).__name__
        expected = "None, since guidance is None" if guidance is None else f"some, for {guidance}"
        raise ValueError(f"negative_prompt_embeds: expected {expected}, got {got}")
    own = _prompts("prompt_embeds", embeds, cfg)
    if negative is None:
        return PromptRows.of(own, None)
    others = _prompts("negative_prompt_embeds", negative, cfg)
    if len(others) not in (1, len(own)):
        raise ValueError(
            f"negative_prompt_embeds: expected 1 prompt for all, or {len(own)}, as prompt_embeds "
            f"has; got {len(others)}"
        )
    return PromptRows.of(own, others)


def _prompts(name: str, value: Embeds, cfg: TextConfig) -> Prompts:
    """Return embeddings as a model takes them."""
    try:
        given = value if isinstance(value, Prompts) else Prompts(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    width, pooled = given.embeds.shape[2], given.pooled
    if width != cfg.text_width:
        raise ValueError(f"{name}: expected the model's text_width={cfg.text_width}, got {width}")
    if max(given.lengths) > cfg.text_tokens:
        raise ValueError(
            f"{name}: expected at most the model's text_tokens={cfg.text_tokens} tokens, got "
            f"{max(given.lengths)}"
        )
    if not isinstance(cfg, MMDiTConfig):
        if pooled is not None:
            expected = "no pooled embeddings, since a PixArt takes none"
            raise ValueError(f"{name}: expected {expected}, got {list(pooled.shape)}")
    elif pooled is None or pooled.shape[1] != cfg.pooled_width:
        expected = f"Prompts(..., pooled=) of the model's pooled_width={cfg.pooled_width}"
        got = "none" if pooled is None else pooled.shape[1]
        raise ValueError(f"{name}: expected {expected}, got {got}")
    return given


def from_generator(
    generator: Generators | None, seed: int | None, seeds: Sequence[int] | None
) -> tuple[int, Sequence[int] | None]:
    """Return the seed and the seeds, which a generator or several replace by their initial seeds.

    Without either, the seed is 0.
    """
    if generator is None:
        return 0 if seed is None else seed, seeds
    if seed is not None or seeds is not None:
        other = "seed" if seed is not None else "seeds"
        raise ValueError(f"generator: expected none beside {other}, which it stands for")
    found: list[object] = list(generator) if isinstance(generator, list | tuple) else [generator]
    initial = []
    for one in found:
        if not isinstance(one, torch.Generator):
            what = type(one).__name__
            raise ValueError(
                f"generator: expected a torch.Generator, or a list of them, got {what}"
            )
        initial.append(one.initial_seed())
        if initial[-1] >= 2**63:  # a negative number was its seed
            raise ValueError(f"generator: expected a seed in [0, 2^63), got {initial[-1]}")
    return (initial[0], None) if isinstance(generator, torch.Generator) else (0, initial)


def batch_size(B: int | None, seeds: Sequence[int] | None, x_T: Tensor | None) -> int:
    """Return the number of labels or prompts, or else of the seeds, or else the length of x_T."""
    if seeds is not None and not isinstance(seeds, Sequence | Tensor | np.ndarray):
        raise ValueError(f"seeds: expected a sequence of integers, got {type(seeds).__name__}")
    if isinstance(seeds, Tensor | np.ndarray) and seeds.ndim != 1:
        raise ValueError(f"seeds: expected a sequence of integers, got shape {list(seeds.shape)}")
    if isinstance(seeds, Tensor) and seeds.is_meta:
        raise ValueError("seeds: expected a sequence of integers, got a meta tensor")
    if x_T is not None and not isinstance(x_T, Tensor):
        raise ValueError(f"x_T: expected a float tensor, got {type(x_T).__name__}")
    if B is not None:
        return B
    given = seeds if seeds is not None else x_T
    if given is None or (given is x_T and not x_T.dim()) or not len(given):
        raise ValueError(
            "labels: expected labels, or seeds or x_T to tell the batch size, got none"
        )
    return len(given)


def noise_keys(
    B: int, seed: int, seeds: Sequence[int] | None, first_index: int, prompts: bool = False
) -> Tensor:
    """Return the (key, stream) of each image's noise: [B, 2] int64."""
    if seeds is None:
        first = _integer("first_index", first_index, bits=32)
        if first + B > 2**32:
            raise ValueError(f"first_index: expected at most 2^32 - {B}, got {first}")
        key = _integer("seed", seed, bits=63)
        rows = [(key, first + i) for i in range(B)]
    elif len(seeds) != B:
        of = "a prompt of prompt_embeds" if prompts else "an image"
        raise ValueError(f"seeds: expected {B}, one {of}; got {len(seeds)}")
    elif first_index:
        raise ValueError("first_index: expected 0 where seeds names every image's key")
    else:
        rows = [(_integer("seeds", key, bits=63), 0) for key in seeds]
    return torch.tensor(rows, dtype=torch.int64)


def check_tensor(name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless a tensor is None, or finite floats of a shape."""
    if value is None:
        return
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected a float tensor, got {got}")
    if value.layout != torch.strided or value.is_meta:
        kind = "a meta tensor" if value.is_meta else str(value.layout)
        raise ValueError(f"{name}: expected values in a strided tensor, got {kind}")
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
    check_finite(name, {"it": value})


def _integer(name: str, value: int, bits: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 2**bits:
        raise ValueError(f"{name}: expected an integer in [0, 2^{bits}), got {value}")
    return number
