"""GPU and CPU kernels, installed as `fastdit.kernels`; they never import fastdit."""

if __name__ != "fastdit.kernels":
    raise ImportError(
        f"fastdit's kernels were imported as {__name__!r}, which is not how they are installed; "
        "run `pip install -e .` in the repository and import `fastdit.kernels`"
    )
