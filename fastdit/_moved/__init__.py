"""Modules under the names that they had in release 0.1.0.

`fastdit.__path__` ends with this folder, so that `import fastdit.recipe` finds them here.
"""

import warnings


def warn(old: str, new: str) -> None:
    """Say where a module is now, to whoever imports it by its old name."""
    warnings.warn(
        f"{old} has moved to {new}; the old name goes with the next release",
        DeprecationWarning,
        stacklevel=3,
    )
