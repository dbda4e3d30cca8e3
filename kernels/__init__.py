"""GPU and CPU kernels, installed as `fastdit.kernels`; they never import fastdit."""

from __future__ import annotations

if __name__ != "fastdit.kernels":
    # Transformers imports any `kernels` that it finds, to see whether it is the package of that
    # name, and a program that starts in the repository finds this folder. So only use is an error.
    __path__ = []

    def __getattr__(name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"fastdit's kernels were imported as {__name__!r}, which is not how they are "
            "installed; run `pip install -e .` in the repository and import `fastdit.kernels`"
        )
