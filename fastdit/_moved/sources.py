from fastdit._moved import warn
from fastdit.train.sources import *  # noqa: F403
from fastdit.train.sources import ImageBatch as Samples  # noqa: F401

warn("fastdit.sources", "fastdit.train.sources")
