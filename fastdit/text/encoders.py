"""Prompts to embeddings, by the text encoders in the folder of a diffusers pipeline."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastdit.errors import FLOAT_DTYPES, check_finite, warn
from fastdit.text.prompts import Prompts
from fastdit.text_config import PixArtConfig, TextConfig

_SD3_T5_TOKENS = 256  # of the 512 that T5 can take, diffusers' pipeline asks for these
_CLIP_TOKENS = 77


class TextEncoder:
    """The tokenizers and text encoders of a model, which make embeddings of prompts.

        encoder = TextEncoder("PixArt-XL-2-512x512", model.cfg)
        prompts = encoder.prompts(["a red fox", "a blue bird"])

    The embeddings are those of diffusers' `encode_prompt`. Each prompt is encoded by itself, so
    that its embedding does not depend on the prompts beside it. PixArt's prompts become lower case,
    as in its pipeline; what the pipeline calls `clean_caption`, which removes marks and addresses
    where two more packages are installed, is not done.

    Attributes:
        folder: the pipeline's folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        cfg: TextConfig,
        device: torch.device | str = "cpu",
        text_dtype: torch.dtype | None = None,
    ) -> None:
        """Load the text encoders; nothing is ever downloaded.

        Args:
            folder: of a pipeline, with its model_index.json, tokenizers and text encoders.
            cfg: of the model that takes the embeddings.
            device: where prompts are encoded.
            text_dtype: of the encoders; None keeps that of their files.

        Raises:
            ValueError: a package is missing, the folder is not a pipeline's, or its text encoders
                are not those of the model.
        """
        self.folder, self._cfg = Path(folder), cfg
        _check_folder(self.folder, cfg)
        if text_dtype not in (None, *FLOAT_DTYPES):
            raise ValueError(f"text_dtype: expected a float dtype or None, got {text_dtype}")
        with _quietly():
            self._pipe = _load(self.folder, cfg, text_dtype)
        needed = ["text_encoder", "tokenizer"]
        if not isinstance(cfg, PixArtConfig):
            needed += ["text_encoder_2", "tokenizer_2"]
        for name in needed:
            if getattr(self._pipe, name) is None:
                kind = "a PixArt" if isinstance(cfg, PixArtConfig) else "an MMDiT"
                raise ValueError(f"{self.folder}: expected a {name}, which {kind} needs, got none")
        self._device = torch.device(device)
        for part in self._pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(self._device)

    def encode(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        """Return a prompt's embeddings.

        Returns:
            (embeds, pooled): [M, text_width] of the prompt's tokens, and [P] or None, on the CPU.

        Raises:
            ValueError: the embeddings do not fit the model, or are not finite.
        Warns:
            UserWarning: the prompt has more tokens than the model takes, and its end is left out.
        """
        self._warn_of_end(prompt)
        with torch.no_grad(), _quietly():
            embeds, pooled = self._encode(prompt)
        width = embeds.shape[-1]
        if width != self._cfg.text_width:
            expected = f"text encoders of width {self._cfg.text_width}, which the model takes"
            raise ValueError(f"{self.folder}: expected {expected}, got {width}")
        made = {"the embedding": embeds} | ({} if pooled is None else {"the pooled one": pooled})
        # Some weights of T5 overflow in float16.
        check_finite(f"text_dtype: in {embeds.dtype} the embeddings of {prompt!r:.40}", made)
        return embeds, pooled

    def prompts(self, texts: Sequence[str]) -> Prompts:
        """Return the embeddings of several prompts, as `fastdit.Sampler` takes them.

        Raises and warns: as `encode` does.
        """
        return stacked([self.encode(text) for text in texts])

    def _encode(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        options: dict[str, Any] = dict(device=self._device, do_classifier_free_guidance=False)
        if isinstance(self._cfg, PixArtConfig):
            most = self._cfg.text_tokens
            embeds, mask, *_ = self._pipe.encode_prompt(prompt, max_sequence_length=most, **options)
            return embeds[0, mask[0] != 0].cpu(), None
        embeds, _, pooled, _ = self._pipe.encode_prompt(
            prompt, None, None, max_sequence_length=self._t5_tokens, **options
        )
        return embeds[0].cpu(), pooled[0].cpu()

    @property
    def _t5_tokens(self) -> int:
        return min(_SD3_T5_TOKENS, self._cfg.text_tokens - _CLIP_TOKENS)

    def _warn_of_end(self, prompt: str) -> None:
        """Warn where no text encoder of the model reads a prompt to its end."""
        if isinstance(self._cfg, PixArtConfig):
            tokenizer, most = self._pipe.tokenizer, self._cfg.text_tokens
            prompt = prompt.lower().strip()
        elif self._pipe.text_encoder_3 is not None:
            tokenizer, most = self._pipe.tokenizer_3, self._t5_tokens
        else:
            tokenizer, most = self._pipe.tokenizer, _CLIP_TOKENS
        with _quietly():
            count = len(tokenizer(prompt).input_ids)
        if count > most:
            shown = prompt if len(prompt) <= 40 else f"{prompt[:40]}..."
            warn(f"prompt: {shown!r} has {count} tokens, of which the model reads {most}")


def stacked(encoded: Sequence[tuple[Tensor, Tensor | None]]) -> Prompts:
    """Return the embeddings of several prompts, each as `TextEncoder.encode` returns it."""
    pooled = [p for _, p in encoded if p is not None]
    return Prompts([embeds for embeds, _ in encoded], torch.stack(pooled) if pooled else None)


def encode_once(
    encoder: TextEncoder,
    texts: Iterable[str],
    progress: Callable[[list[str]], Iterable[str]] = list,
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return what `encoder.encode` returns for each different text.

    Args:
        encoder: the text encoder.
        texts: prompts, among which the same one may occur several times.
        progress: wraps the list of different texts, to show how far the work is.
    """
    return {text: encoder.encode(text) for text in progress(list(dict.fromkeys(texts)))}


def _check_folder(folder: Path, cfg: TextConfig) -> None:
    if not folder.is_dir():
        raise ValueError(
            f"text_encoder: expected a folder of a diffusers pipeline, got {folder}, which is "
            "none; download one first: hf download REPOSITORY --local-dir FOLDER"
        )
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"text_encoder: expected a folder with a model_index.json, as diffusers' pipelines "
            f"have, got {folder}"
        )
    try:
        name = str(json.loads((folder / "model_index.json").read_text())["_class_name"])
    except (ValueError, LookupError, TypeError):
        name = ""  # which diffusers says in its own words
    own, other = "PixArt", "StableDiffusion3"
    if not isinstance(cfg, PixArtConfig):
        own, other = other, own
    if name.startswith(other):
        expected = f"the folder of a {own} pipeline, whose text encoders the model takes"
        raise ValueError(f"text_encoder: expected {expected}, got {folder}, which is of a {name}")
    parts = [""] if isinstance(cfg, PixArtConfig) else ["", "_2"]
    if len(parts) == 2 and (folder / "text_encoder_3").is_dir():
        parts.append("_3")
    for part in parts:  # transformers makes an empty tokenizer where there is none
        for name in (f"text_encoder{part}", f"tokenizer{part}"):
            if not (folder / name).is_dir():
                raise ValueError(f"text_encoder: expected a folder {name} in {folder}, got none")


def _load(folder: Path, cfg: TextConfig, dtype: torch.dtype | None) -> Any:
    """Load a pipeline of diffusers without anything but tokenizers and text encoders."""
    try:
        import diffusers
        import transformers  # noqa: F401
    except ImportError as error:
        missing = f"text_encoder: needs the package {error.name}; pip install 'fastdit[text]'"
        raise ValueError(missing) from error
    pixart = isinstance(cfg, PixArtConfig)
    kind: Any = diffusers.PixArtAlphaPipeline if pixart else diffusers.StableDiffusion3Pipeline
    without = ["transformer", "vae", "scheduler"]
    without += [] if pixart else ["image_encoder", "feature_extractor"]
    options: dict[str, Any] = dict.fromkeys(without)
    if not pixart and not (folder / "text_encoder_3").is_dir():
        warn(f"{folder}: it has no text_encoder_3 (T5); prompts are encoded by CLIP alone")
        options |= dict(text_encoder_3=None, tokenizer_3=None)
    if dtype is not None:
        options["torch_dtype"] = dtype
    try:
        pipe = kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        expected = f"expected the text encoders of {kind.__name__} in {folder}"
        raise ValueError(f"text_encoder: {expected} ({reason})") from error
    if not pixart:
        # Without T5 the pipeline fills up with zeros, of the width that the transformer has.
        widths = SimpleNamespace(joint_attention_dim=cfg.text_width)
        object.__setattr__(pipe, "transformer", SimpleNamespace(config=widths))
    return pipe


@contextmanager
def _quietly() -> Iterator[None]:
    """Let the libraries say only errors: what a user can act on is said here."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
