"""Weights on disk: fastdit's own files (`native`) and those of other projects.

`layouts` translates names and rows, `foreign` reads files without running anything in them.
"""

from fastdit.checkpoints.native import SAVED_LAYOUTS, CheckpointInfo, inspect, load, save

__all__ = ["SAVED_LAYOUTS", "CheckpointInfo", "inspect", "load", "save"]
