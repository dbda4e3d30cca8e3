from fastdit._moved import warn
from fastdit.train.sources import *  # noqa: F403

warn("fastdit.sources", "fastdit.train.sources")
