"""Latents and pixels, by the autoencoder that published DiTs were trained behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from fastdit.many import PLAN, write_parts

AT_ONCE = 8  # images decoded together: a 512-pixel one takes about a gigabyte on its way


def load_vae(source: str | os.PathLike[str], device: torch.device | str = "cpu") -> nn.Module:
    """diffusers' `AutoencoderKL` from a folder, or by a name that it can download.

    A folder of a whole pipeline serves too: its part `vae` is taken.

    Raises:
        ValueError: diffusers is not installed, or there is no such autoencoder.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError(
            "vae: needs the package diffusers; pip install 'fastdit[latents]'"
        ) from error
    inner = {"subfolder": "vae"} if os.path.isdir(os.path.join(source, "vae")) else {}
    try:
        vae: nn.Module = AutoencoderKL.from_pretrained(source, low_cpu_mem_usage=False, **inner)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"vae: expected an AutoencoderKL in {source} ({reason})") from error
    if getattr(vae.config, "shift_factor", None):
        raise ValueError(
            f"vae: {source} shifts its latents, which no published DiT's autoencoder does"
        )
    return vae.to(device).eval()


def latent_channels(vae: Any) -> int:
    """Channels of an autoencoder's latents."""
    return int(vae.config.latent_channels)


@torch.no_grad()
def decode(vae: Any, latents: Tensor, at_once: int = AT_ONCE) -> Tensor:
    """Decode latents, a few images at a time, so that memory does not grow with their number.

    Args:
        vae: an `AutoencoderKL`; its `config.scaling_factor` is what latents were multiplied by.
        latents: [B, C, h, w], any float dtype, on any device.
        at_once: images decoded together.

    Returns:
        [B, 3, H, W] float32 on the CPU, about -1 to 1.

    Raises:
        ValueError: latents are of another number of channels, or at_once is below 1.

    Source: Rombach et al. 2022; the factor, 0.18215 for the published DiTs, is theirs.
    """
    if at_once < 1:
        raise ValueError(f"at_once: expected at least 1, got {at_once}")
    channels = latent_channels(vae)
    if latents.dim() != 4 or latents.shape[1] != channels:
        raise ValueError(
            f"latents: expected shape [B, {channels}, h, w], as this autoencoder makes them, got "
            f"{list(latents.shape)}"
        )
    parameter = next(vae.parameters())
    images = []
    for some in latents.split(at_once):
        scaled = some.to(parameter.device, parameter.dtype) / vae.config.scaling_factor
        images.append(vae.decode(scaled).sample.float().cpu())
    return torch.cat(images)


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> Tensor:
    """The distribution of images' latents, in the units a DiT works in.

    Args:
        vae: an `AutoencoderKL`; latents are multiplied by its `config.scaling_factor`.
        images: [B, 3, H, W] float, -1 to 1.

    Returns:
        [B, 2C, h, w] float32 on the CPU: the mean, then the standard deviation. A latent is
        `mean + std * z`.
    """
    parameter = next(vae.parameters())
    latent = vae.encode(images.to(parameter.device, parameter.dtype)).latent_dist
    return (torch.cat([latent.mean, latent.std], dim=1) * vae.config.scaling_factor).float().cpu()


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The middle square of an image, [size, size, 3] uint8.

    Halved by boxes while twice too large, then resized bicubically, as ADM and DiT crop ImageNet
    (`center_crop_arr` of Dhariwal & Nichol's code).
    """
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(image)
    top, left = ((n - size) // 2 for n in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def image_files(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """Images in one sub-folder a class: the files in order, their labels, the classes' names.

    Raises:
        ValueError: there are none.
    """
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    known = Image.registered_extensions()
    files, labels = [], []
    for label, name in enumerate(classes):
        own = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in known)
        files += own
        labels += [label] * len(own)
    if not files:
        raise ValueError(f"{folder}: expected a sub-folder of images for each class, found none")
    return files, labels, classes


def encode_folder(
    vae: Any, source: Path, out: Path, image_size: int = 256, shard: int = 64, name: str = ""
) -> int:
    """Encode a folder of images to shards that `LatentShards` reads; a stopped call goes on.

    Args:
        vae: an `AutoencoderKL`.
        source: images in one sub-folder a class.
        out: the folder to write.
        image_size: side of the square that is cut from the middle of each image.
        shard: images encoded together and written to one file.
        name: what the autoencoder is called, so that shards of two are not mixed.

    Returns:
        The number of images.

    Raises:
        ValueError: there are no images, one cannot be read, or `out` holds shards of others.
    """
    files, labels, classes = image_files(source)

    def make(first: int) -> np.ndarray:
        batch = [_read(path, image_size) for path in files[first : first + shard]]
        pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)
        return encode(vae, pixels.float() / 127.5 - 1).numpy()

    plan = {
        "num": len(files),
        "batch_size": shard,
        "image_size": image_size,
        "vae": name,
        "files": [path.relative_to(source).as_posix() for path in files],
        "labels": labels,
        "classes": classes,
    }
    write_parts(out, make, plan)
    return len(files)


def _read(path: Path, size: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return centre_crop(image, size)
    except OSError as error:
        raise ValueError(f"{path}: expected an image ({error})") from error


class LatentShards:
    """The latents of `encode_folder`, mapped from disk.

    shards = LatentShards("latents")
    mean, std, label = shards[0]
    latent = mean + std * torch.randn_like(std)
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Open a folder.

        Raises:
            ValueError: it holds no shards, or not all of them.
        """
        path = Path(folder)
        try:
            plan = json.loads((path / PLAN).read_text())
            self._size: int = plan["batch_size"]
            self.labels: list[int] = plan["labels"]
            self.classes: list[str] = plan["classes"]
            parts = [path / f"{i:08d}.npy" for i in range(-(-plan["num"] // self._size))]
            self._shards = [np.load(part, mmap_mode="r") for part in parts]
        except (OSError, ValueError, LookupError) as error:
            raise ValueError(
                f"{folder}: expected the shards of `fastdit encode`, all of them ({error})"
            ) from error

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        """Mean and standard deviation, [C, h, w] float32 each, and the label of image i."""
        if not 0 <= i < len(self):
            raise IndexError(f"expected an index in [0, {len(self)}), got {i}")
        row = torch.from_numpy(np.array(self._shards[i // self._size][i % self._size]))
        mean, std = row.chunk(2)
        return mean, std, self.labels[i]
