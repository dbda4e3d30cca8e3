from fastdit._moved import warn
from fastdit.data.latents import *  # noqa: F403

warn("fastdit.latents", "fastdit.data.latents")
