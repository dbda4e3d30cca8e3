"""From latents to pixels, by the autoencoder that published DiTs were trained behind."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

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
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"vae: expected an AutoencoderKL in {source} ({reason})") from error
    return vae.to(device).eval()


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
    channels = vae.config.latent_channels
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
