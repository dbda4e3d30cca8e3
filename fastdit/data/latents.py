"""Latents of an autoencoder: decoding samples, and encoding folders of images for training."""

from __future__ import annotations

import functools
import hashlib
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from fastdit.data.shards import PLAN, read_plan, write_shards

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)

# The autoencoders of the published DiTs, by the names that their papers and code use.
VAES = {name: f"stabilityai/{name}" for name in ("sd-vae-ft-ema", "sd-vae-ft-mse")}
VAE_HELP = f"a folder, {' or '.join(VAES)}, or another repository of Hugging Face"

AT_ONCE = 8  # decoding one 512-pixel image takes about a gigabyte


def load_vae(source: str | os.PathLike[str], device: torch.device | str = "cpu") -> nn.Module:
    """Load diffusers' `AutoencoderKL` from a folder, or by a name that diffusers can download.

    In the folder of a pipeline the sub-folder `vae` is taken. The names in `VAES` are short for the
    repositories of the published DiTs' autoencoders.

    Raises:
        ValueError: diffusers is not installed, finds no such autoencoder, or cannot download it.
    """
    try:
        import diffusers
    except ImportError as error:
        message = "vae: needs the package diffusers; pip install 'fastdit[latents]'"
        raise ValueError(message) from error
    is_folder = os.path.exists(source)
    if not is_folder:
        source = VAES.get(str(source), source)
    inner = {"subfolder": "vae"} if os.path.isdir(os.path.join(source, "vae")) else {}
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()  # its warnings are errors below
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
        diffusers.utils.logging.set_verbosity(level)
    # diffusers would use random weights in place of missing ones.
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := list(told[what]):
            kind = what.replace("_", " ")
            has = f"it has {len(names)} {kind}, such as {names[0]}"
            raise ValueError(f"vae: expected an AutoencoderKL in {source}, but {has}")
    if getattr(vae.config, "shift_factor", None):
        raise ValueError(f"vae: {source} shifts its latents, which published DiTs do not expect")
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


@torch.no_grad()
def decode(vae: Any, latents: Tensor, at_once: int = AT_ONCE) -> Tensor:
    """Decode latents a few images at a time, so that memory does not grow with their number.

    Args:
        vae: an `AutoencoderKL`; latents are divided by its `config.scaling_factor`.
        latents: [B, C, h, w] in any float dtype, on any device.
        at_once: images decoded together.

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
    images = []
    for some in latents.split(at_once):
        scaled = some.to(parameter.device, parameter.dtype) / vae.config.scaling_factor
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


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """Return the central square of an image, scaled to [size, size, 3] uint8.

    The image is halved by box averaging while its shorter side is at least twice the size, and then
    resized bicubically, as ADM and DiT crop ImageNet (`center_crop_arr` of Dhariwal & Nichol's
    code). EXIF rotations are ignored.

    Raises:
        ValueError: the image has more than 8 bits per channel, or one side is more than 100 times
            the other, which would take much memory to resize.
    """
    if image.mode not in _MODES:
        raise ValueError(f"expected 8 bits per channel, got PIL's mode {image.mode}")
    if max(image.size) > 100 * min(image.size):
        raise ValueError(f"expected sides of similar length, got {image.width} x {image.height}")
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = round(image.width * scale), round(image.height * scale)
    pixels = np.asarray(image.resize(scaled, Image.Resampling.BICUBIC))
    top, left = ((n - size) // 2 for n in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def image_files(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """List images that lie in one sub-folder per class: (files, their labels, class names).

    Raises:
        ValueError: there is no such folder, or a class has no images.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = (p for p in (folder / name).rglob("*") if p.suffix.lower() in _SUFFIXES)
        own = sorted(p for p in found if p.name[0] != "." and p.is_file())
        if not own:
            raise ValueError(f"{folder / name}: expected images of a class, found none")
        files += own
        labels += [label] * len(own)
    if not files:
        raise ValueError(f"{folder}: expected a sub-folder of images for each class, found none")
    return files, labels, classes


def encode_folder(vae: Any, source: Path, out: Path, image_size: int = 256, shard: int = 64) -> int:
    """Encode a folder of images to shards that `LatentShards` reads.

    A call that was interrupted can be repeated; it keeps the shards that are finished.

    Args:
        vae: an `AutoencoderKL`.
        source: a folder with one sub-folder of images per class.
        out: the folder to write.
        image_size: side of the central square that each image is cropped and scaled to.
        shard: images encoded together and written to one file.

    Returns:
        The number of images.

    Raises:
        ValueError: there are no images or an unreadable one, `out` lies in `source` or holds shards
            of another call, or image_size is not a multiple of the autoencoder's scale factor.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if image_size < 1 or image_size % factor:
        raise ValueError(f"image_size: expected a multiple of {factor}, got {image_size}")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"out: expected a folder that is not in {source}, got {out}")
    files, labels, classes = image_files(source)

    def read(path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                return centre_crop(image, image_size)
        except _DAMAGED as error:
            raise ValueError(f"{path}: expected an image ({error})") from error

    def make(first: int) -> np.ndarray:
        batch = [read(path) for path in files[first : first + shard]]
        pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)
        return encode(vae, pixels.float() / 127.5 - 1).numpy()

    plan = {
        "num": len(files),
        "batch_size": shard,
        "image_size": image_size,
        "vae": digest(vae),
        "files": [path.relative_to(source).as_posix() for path in files],
        "labels": labels,
        "classes": classes,
    }
    write_shards(out, make, plan)
    return len(files)


class LatentShards:
    """The latents that `encode_folder` wrote, memory-mapped: `mean, std, label = shards[i]`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Open a folder of shards; it is a ValueError if there are none, or some are missing."""
        path = Path(folder)
        plan = read_plan(path)
        if plan is None or not plan.keys() >= {"num", "batch_size", "labels", "classes"}:
            raise ValueError(f"{folder}: expected the shards of `fastdit encode`, found none")
        self.plan = plan
        self._size: int = plan["batch_size"]
        self.labels: list[int] = plan["labels"]
        self.classes: list[str] = plan["classes"]
        if len(self.labels) != plan["num"] or not set(self.labels) <= set(range(len(self.classes))):
            raise ValueError(f"{path / PLAN}: expected {plan['num']} labels of its classes")
        self._parts = [path / f"{i:08d}.npy" for i in range(-(-plan["num"] // self._size))]
        for part in self._parts:
            if not part.is_file():
                missing = f"{part.name} is not there; run it again"
                raise ValueError(f"{folder}: expected all shards of `fastdit encode`; {missing}")
        # Opened on demand, since there may be more shards than the limit on open files.
        self._shard = functools.lru_cache(maxsize=64)(self._open)

    def _open(self, i: int) -> np.ndarray:
        path = self._parts[i]
        try:
            shard = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: it is damaged; remove it and encode again") from error
        rows = min(self._size, len(self) - i * self._size)
        shape = (rows, *(shard if i == 0 else self._shard(0)).shape[1:])
        if len(shape) != 4 or shard.shape != shape or shard.dtype != np.float32:
            got = f"{shard.dtype} of {list(shard.shape)}; remove it and encode again"
            raise ValueError(f"{path}: expected float32 of shape {list(shape)}, got {got}")
        return shard

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        """Return mean and standard deviation, [C, h, w] float32 each, and the label of image i."""
        mean, std = torch.from_numpy(np.array(self.row(i))).chunk(2)
        return mean, std, self.labels[i]

    def row(self, i: int) -> np.ndarray:
        """Return image i as stored: [2C, h, w], the mean before the standard deviation."""
        if not 0 <= i < len(self):
            raise IndexError(f"expected an index in [0, {len(self)}), got {i}")
        return self._shard(i // self._size)[i % self._size]
