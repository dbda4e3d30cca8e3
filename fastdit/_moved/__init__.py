"""Modules under the names that they had in release 0.1.0, each with a warning.

`fastdit.__path__` ends with this folder, so that `import fastdit.recipe` finds `recipe.py` here.
"""

import warnings


def warn(old: str, new: str) -> None:
    """Warn the code that imports the module `old` to import `new`."""
    warnings.warn(
        f"{old} has moved to {new}; the old name will be removed in the next release",
        DeprecationWarning,
        stacklevel=3,
    )
