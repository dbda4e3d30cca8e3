"""fastdit: Diffusion Transformers (DiT, adaLN-Zero) that sample and train as fast as they can.

import fastdit
model = fastdit.load("model.safetensors")
sampler = fastdit.Sampler(model, fastdit.DiffusionScheduler(T=200))
images = sampler([0, 5, 10], seed=7)  # [3, C, H, W], about -1 to 1
"""

from fastdit.checkpoints import load, save
from fastdit.config import PRESETS, DiTConfig
from fastdit.diffusion import DiffusionScheduler, timestep_embedding
from fastdit.flow import FlowMatching
from fastdit.model import DiT
from fastdit.sampling import Sampler
from fastdit.text import MMDiT, PixArt, Prompts
from fastdit.text_config import TEXT_PRESETS, MMDiTConfig, PixArtConfig
from fastdit.update import Guidance

__version__ = "0.1.0"
# Modules that moved after release 0.1.0 can be imported by their old names for one release.
__path__.append(f"{__path__[0]}/_moved")

__all__ = [
    "PRESETS",
    "TEXT_PRESETS",
    "DiT",
    "DiTConfig",
    "DiffusionScheduler",
    "FlowMatching",
    "Guidance",
    "MMDiT",
    "MMDiTConfig",
    "PixArt",
    "PixArtConfig",
    "Prompts",
    "Sampler",
    "load",
    "save",
    "timestep_embedding",
]
