"""Latents and pixels, by the autoencoder that published DiTs were trained behind."""

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

from fastdit.data.shards import PLAN, read_plan, write_parts

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_BAD_IMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)

AT_ONCE = 8  # images decoded together: a 512-pixel one takes about a gigabyte on its way


def load_vae(source: str | os.PathLike[str], device: torch.device | str = "cpu") -> nn.Module:
    """diffusers' `AutoencoderKL` from a folder, or by a name that it can download.

    A folder of a whole pipeline serves too: its part `vae` is taken.

    Raises:
        ValueError: diffusers is not installed, or there is no such autoencoder.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(
            "vae: needs the package diffusers; pip install 'fastdit[latents]'"
        ) from error
    inner = {"subfolder": "vae"} if os.path.isdir(os.path.join(source, "vae")) else {}
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()  # what it would say is an error below
    try:
        vae, told = diffusers.AutoencoderKL.from_pretrained(
            source, low_cpu_mem_usage=False, output_loading_info=True, **inner
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"vae: expected an AutoencoderKL in {source} ({reason})") from error
    finally:
        diffusers.utils.logging.set_verbosity(level)
    # It would go on with random weights in the place of those that are not there.
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told[what]:
            raise ValueError(
                f"vae: expected an AutoencoderKL in {source}, but it has {len(told[what])} "
                f"{what.replace('_', ' ')}, such as {next(iter(told[what]))}"
            )
    if getattr(vae.config, "shift_factor", None):
        raise ValueError(
            f"vae: {source} shifts its latents, which no published DiT's autoencoder does"
        )
    return vae.to(device).eval()


def digest(vae: nn.Module) -> str:
    """What tells one autoencoder's weights from another's."""
    content = hashlib.blake2b(digest_size=16)
    for name, t in sorted(vae.state_dict().items()):
        content.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        content.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


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
    (`center_crop_arr` of Dhariwal & Nichol's code); a rotation that EXIF tells of is not made.

    Raises:
        ValueError: the image has 16 bits or floats a channel, or is more than 100 times as long as
            it is wide, which the resizing would make larger still.
    """
    if image.mode not in _MODES:
        raise ValueError(f"expected 8 bits a channel, got PIL's mode {image.mode}")
    if max(image.size) > 100 * min(image.size):
        raise ValueError(f"expected sides of like length, got {image.width} x {image.height}")
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
        ValueError: there is no such folder, or a class has none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    files, labels = [], []
    for label, name in enumerate(classes):
        own = sorted(p for p in (folder / name).rglob("*") if _is_image(p))
        if not own:
            raise ValueError(f"{folder / name}: expected images of a class, found none")
        files += own
        labels += [label] * len(own)
    if not files:
        raise ValueError(f"{folder}: expected a sub-folder of images for each class, found none")
    return files, labels, classes


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and path.name[0] != "." and path.is_file()


def encode_folder(vae: Any, source: Path, out: Path, image_size: int = 256, shard: int = 64) -> int:
    """Encode a folder of images to shards that `LatentShards` reads; a stopped call goes on.

    Args:
        vae: an `AutoencoderKL`.
        source: images in one sub-folder a class.
        out: the folder to write.
        image_size: side of the square that is cut from the middle of each image.
        shard: images encoded together and written to one file.

    Returns:
        The number of images.

    Raises:
        ValueError: there are no images, one cannot be read, `out` lies among them or holds shards
            of others, or image_size is no multiple of what the autoencoder shrinks by.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if image_size < 1 or image_size % factor:
        raise ValueError(f"image_size: expected a multiple of {factor}, got {image_size}")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"out: expected a folder that is not in {source}, got {out}")
    files, labels, classes = image_files(source)

    def make(first: int) -> np.ndarray:
        batch = [_read(path, image_size) for path in files[first : first + shard]]
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
    write_parts(out, make, plan)
    return len(files)


def _read(path: Path, size: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return centre_crop(image, size)
    except _BAD_IMAGE as error:
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
        plan = read_plan(path)
        keys = ("num", "batch_size", "labels", "classes")
        if plan is None or any(key not in plan for key in keys):
            raise ValueError(f"{folder}: expected the shards of `fastdit encode`, found none")
        self.plan = plan
        self._size: int = plan["batch_size"]
        self.labels: list[int] = plan["labels"]
        self.classes: list[str] = plan["classes"]
        if len(self.labels) != plan["num"] or not set(self.labels) <= set(range(len(self.classes))):
            raise ValueError(f"{path / PLAN}: expected {plan['num']} labels of its classes")
        self._parts = [path / f"{i:08d}.npy" for i in range(-(-plan["num"] // self._size))]
        gone = [part.name for part in self._parts if not part.is_file()]
        if gone:
            raise ValueError(
                f"{folder}: expected all shards of `fastdit encode`, but {gone[0]} is not there; "
                "run it again"
            )
        # Opened when they are asked for: a set may have more of them than files may be open.
        self._shard = functools.lru_cache(maxsize=64)(self._open)

    def _open(self, i: int) -> np.ndarray:
        try:
            shard = np.load(self._parts[i], mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"{self._parts[i]}: it is damaged; remove it and encode again"
            ) from error
        rows = min(self._size, len(self) - i * self._size)
        shape = (rows, *(shard if i == 0 else self._shard(0)).shape[1:])
        if len(shape) != 4 or shard.shape != shape or shard.dtype != np.float32:
            raise ValueError(
                f"{self._parts[i]}: expected float32 of shape {list(shape)}, got {shard.dtype} of "
                f"{list(shard.shape)}; remove it and encode again"
            )
        return shard

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        """Mean and standard deviation, [C, h, w] float32 each, and the label of image i."""
        mean, std = torch.from_numpy(np.array(self.row(i))).chunk(2)
        return mean, std, self.labels[i]

    def row(self, i: int) -> np.ndarray:
        """Image i as it lies on disk: [2C, h, w], mean before deviation."""
        if not 0 <= i < len(self):
            raise IndexError(f"expected an index in [0, {len(self)}), got {i}")
        return self._shard(i // self._size)[i % self._size]
