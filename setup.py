"""Map `kernels/` to `fastdit.kernels`; everything else is in pyproject.toml.

A top-level package named `kernels` would overwrite the well-known PyPI package of that name.
"""

from setuptools import find_packages, setup

kernels = ["kernels", *(f"kernels.{name}" for name in find_packages("kernels"))]
setup(
    packages=[*find_packages(include=["fastdit", "fastdit.*"]), *(f"fastdit.{k}" for k in kernels)],
    package_dir={"fastdit.kernels": "kernels"},
    package_data={"fastdit": ["py.typed"], "fastdit.kernels.cpu": ["*.cpp", "*.h"]},
)
