"""Latents of an autoencoder: decoding samples, and encoding folders of images for training."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastdit.data.image_shards import planned_size, write_image_shards
from fastdit.data.images import from_pixels
from fastdit.data.mapped_shards import SCALING as SCALING
from fastdit.data.mapped_shards import ImageShards
from fastdit.data.pictures import Size, open_pictures
from fastdit.data.pictures import centre_crop as centre_crop  # an earlier release had them here
from fastdit.data.pictures import image_files as image_files
from fastdit.data.shards import read_plan
from fastdit.errors import height_and_width

# The autoencoders of the published DiTs, by the names that their papers and code use.
VAES = {name: f"stabilityai/{name}" for name in ("sd-vae-ft-ema", "sd-vae-ft-mse")}
VAE_HELP = f"a folder, {' or '.join(VAES)}, or another repository of Hugging Face"

AT_ONCE = 8  # decoding one 512-pixel image takes about a gigabyte


def load_vae(
    source: str | os.PathLike[str], device: torch.device | str = "cpu", *, shifted: bool = False
) -> nn.Module:
    """Load diffusers' `AutoencoderKL` from a folder, or by a name that diffusers can download.

    In the folder of a pipeline the sub-folder `vae` is taken. The names in `VAES` are short for the
    repositories of the published DiTs' autoencoders.

    Args:
        source: the folder or the name.
        device: where it computes.
        shifted: whether its config may have a `shift_factor`, as Stable Diffusion 3's has, which
            `decode` undoes; `encode`, which training uses, knows no shift.

    Raises:
        ValueError: diffusers is not installed, finds no such autoencoder, or cannot download it.
    """
    try:
        import diffusers
    except ImportError as error:
        message = "vae: needs the package diffusers; pip install 'fastdit[latents]'"
        raise ValueError(message) from error
    if os.path.isfile(source):
        advice = "expected its folder, which has a config.json"
        raise ValueError(f"vae: {source} is a file; {advice}")
    is_folder = os.path.exists(source)
    if not is_folder:
        source = VAES.get(str(source), source)
    inner = {"subfolder": "vae"} if os.path.isdir(os.path.join(source, "vae")) else {}
    # Warnings are errors below, and a download that failed is named once, not at each retry.
    loggers = [logging.getLogger(name) for name in ("diffusers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        vae, told = diffusers.AutoencoderKL.from_pretrained(
            source, low_cpu_mem_usage=False, output_loading_info=True, **inner
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        if isinstance(error, OSError) and not is_folder:
            reason = _first_line(_first_cause(error))  # diffusers' own words blame the repository
            advice = "pass the folder of an AutoencoderKL, or go online"
            message = f"vae: {source} is not a folder and could not be downloaded ({reason})"
            raise ValueError(f"{message}; {advice}") from error
        reason = _first_line(error)
        raise ValueError(f"vae: expected an AutoencoderKL in {source} ({reason})") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    # diffusers would use random weights in place of missing ones.
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := list(told[what]):
            kind = what.replace("_", " ")
            has = f"it has {len(names)} {kind}, such as {names[0]}"
            raise ValueError(f"vae: expected an AutoencoderKL in {source}, but {has}")
    for option in ("shift_factor", "latents_mean", "latents_std")[shifted:]:
        if getattr(vae.config, option, None):
            reason = f"its config has a {option}, which published DiTs do not expect"
            raise ValueError(f"vae: {source} normalises its latents in another way ({reason})")
    return vae.to(device).eval()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _first_cause(error: BaseException) -> BaseException:
    earlier = error.__cause__ or error.__context__
    return error if earlier is None else _first_cause(earlier)


def digest(vae: nn.Module) -> str:
    """Return a hash of an autoencoder's weights."""
    content = hashlib.blake2b(digest_size=16)
    for name, t in sorted(vae.state_dict().items()):
        content.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        content.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def latent_channels(vae: Any) -> int:
    """Return the number of channels of an autoencoder's latents."""
    return int(vae.config.latent_channels)


def scaling_factor(vae: Any) -> float:
    """Return the factor between an autoencoder's latents and those that a DiT takes."""
    return float(vae.config.scaling_factor)


@dataclass(frozen=True)
class LatentStats:
    """How a model's latents are normalised: `(latent - mean) / std * multiplier`, by channel.

    Attributes:
        mean, std: one number for each channel.
        multiplier: 1 in LightningDiT's published models.

    Raises:
        ValueError: the numbers are not as many of each, not finite, or do not divide.

    Source: `datasets/img_latent_dataset.py` and `inference.py` of LightningDiT.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std):
            got = f"{len(self.mean)} and {len(self.std)}"
            raise ValueError(f"std: expected as many numbers as of the mean, got {got}")
        if not all(map(math.isfinite, (*self.mean, *self.std, self.multiplier))):
            raise ValueError("mean: expected finite numbers, and so of std and the multiplier")
        if min(*self.std, self.multiplier) <= 0:
            got = f"{min(self.std):g} and {self.multiplier:g}"
            raise ValueError(f"std: expected positive numbers and multiplier, got {got}")

    def undo(self, latents: Tensor) -> Tensor:
        """Return a model's latents [B, C, h, w] as the autoencoder decodes them."""
        if latents.dim() != 4 or latents.shape[1] != len(self.mean):
            shape = list(latents.shape)
            expected = f"shape [B, {len(self.mean)}, h, w] for these statistics"
            raise ValueError(f"latents: expected {expected}, got {shape}")
        mean, std = latents.new_tensor([self.mean, self.std])[:, None, :, None, None]
        return latents * std / self.multiplier + mean


@torch.no_grad()
def decode(vae: Any, latents: Tensor, at_once: int = AT_ONCE, scale: float | None = None) -> Tensor:
    """Decode latents a few images at a time, so that memory does not grow with their number.

    Args:
        vae: an `AutoencoderKL`.
        latents: [B, C, h, w] in any float dtype, on any device.
        at_once: images decoded together.
        scale: what latents are divided by; None is `vae.config.scaling_factor`, after which its
            `shift_factor` is added where it has one.

    Returns:
        [B, 3, H, W] float32 on the CPU, about -1 to 1.

    Raises:
        ValueError: latents have another number of channels, or at_once is below 1.

    Source: Rombach et al. 2022, and their scaling factor, which is 0.18215 for the published DiTs.
    """
    if at_once < 1:
        raise ValueError(f"at_once: expected at least 1, got {at_once}")
    channels = latent_channels(vae)
    if latents.dim() != 4 or latents.shape[1] != channels:
        shape = list(latents.shape)
        raise ValueError(f"latents: expected shape [B, {channels}, h, w] for this VAE, got {shape}")
    parameter = next(vae.parameters())
    shift = getattr(vae.config, "shift_factor", None) if scale is None else None
    scale = vae.config.scaling_factor if scale is None else scale
    images = []
    for some in latents.split(at_once):
        scaled = some.to(parameter.device, parameter.dtype) / scale
        if shift:
            scaled = scaled + shift
        images.append(vae.decode(scaled).sample.float().cpu())
    return torch.cat(images)


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> Tensor:
    """Return the distribution of images' latents, scaled as a DiT takes them.

    Args:
        vae: an `AutoencoderKL`; latents are multiplied by its `config.scaling_factor`.
        images: [B, 3, H, W] float in [-1, 1].

    Returns:
        [B, 2C, h, w] float32 on the CPU: the mean, then the standard deviation. A latent is
        `mean + std * z` with z from N(0, 1).
    """
    parameter = next(vae.parameters())
    latent = vae.encode(images.to(parameter.device, parameter.dtype)).latent_dist
    return (torch.cat([latent.mean, latent.std], dim=1) * vae.config.scaling_factor).float().cpu()


def encode_folder(
    vae: Any,
    source: Path,
    out: Path,
    image_size: Size = 256,
    shard: int = 64,
    flip: bool = False,
    **options: Any,
) -> int:
    """Encode a folder of images to shards that `LatentShards` reads.

    A call that was interrupted can be repeated; it keeps the shards that are finished. So can one
    after images were added, removed or changed; it computes the shards of such images again.

    Args:
        vae: an `AutoencoderKL`.
        source: a folder with one sub-folder of images per class, or anything else that
            `open_pictures` opens.
        out: the folder to write.
        image_size: side of the central square, or (height, width) of the central part, that each
            image is cropped and scaled to.
        shard: images encoded together and written to one file.
        flip: whether to encode each image's mirror image too. Its latent is not the mirror image
            of the latent, so a flip in training needs both.
        options: skip_bad, rank and world, as for `write_image_shards`.

    Returns:
        The number of images.

    Raises:
        ValueError: there are no images or an unreadable one, `out` lies in `source` or holds shards
            of other settings or another folder, or a side is not a multiple of the autoencoder's
            scale factor.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    size = planned_size(*height_and_width("image_size", image_size, factor))
    if shard < 1:
        raise ValueError(f"shard: expected at least 1 image, got {shard}")

    def make(cropped: np.ndarray) -> np.ndarray:
        pixels = from_pixels(torch.from_numpy(cropped))
        plain = encode(vae, pixels)
        if not flip:
            return plain.numpy()
        return torch.stack([plain, encode(vae, pixels.flip(3))], dim=1).numpy()

    settings: dict[str, Any] = {"batch_size": shard, "image_size": size, "vae": digest(vae)}
    settings[SCALING] = scaling_factor(vae)
    if flip:  # plans without flips stay as they were, since runs compare a hash of them
        settings["flip"] = True
    plan = write_image_shards(out, open_pictures(source), make, settings, **options)
    return int(plan["num"])


class LatentShards(ImageShards):
    """The latents that `encode_folder` wrote, memory-mapped: `mean, std, label = shards[i]`.

    Attributes:
        plan: what the shards hold, and how it was made.
        labels: the label of each image.
        classes: names of the classes.
        variants: 2 if the images' mirror images were encoded too, else 1.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Open a folder of shards; it is a ValueError if there are none, or some are missing."""
        path, what = Path(folder), "the shards of `fastdit encode`"
        plan = read_plan(path)
        if plan is not None and "kind" in plan:
            raise ValueError(f"{path}: expected {what}, found {plan['kind']}")
        self.variants = 2 if plan is not None and plan.get("flip") else 1
        dims = 4 if self.variants == 1 else 5
        super().__init__(path, what, (np.float32, dims), "run it again")

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        """Return mean and standard deviation, [C, h, w] float32 each, and the label of image i."""
        both = self.stored(i)
        mean, std = torch.from_numpy(np.array(both if self.variants == 1 else both[0])).chunk(2)
        return mean, std, self.labels[i]

    def row(self, i: int) -> np.ndarray:
        """Return row i as stored: [2C, h, w], the mean before the standard deviation.

        Row r + k * len(self) is variant k of image r; variant 1 is its mirror image.
        """
        rows = self.variants * len(self)
        if not 0 <= i < rows:
            raise IndexError(f"expected an index in [0, {rows}), got {i}")
        variant, image = divmod(i, len(self))
        stored = self.stored(image)
        return stored if self.variants == 1 else stored[variant]
