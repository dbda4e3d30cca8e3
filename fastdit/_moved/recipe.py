from fastdit._moved import warn
from fastdit.train.recipe import *  # noqa: F403

warn("fastdit.recipe", "fastdit.train.recipe")
