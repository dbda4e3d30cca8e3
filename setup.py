"""Install `kernels/` as `fastdit.kernels`; everything else is in pyproject.toml.

A top-level package named `kernels` would overwrite another project's package of that name.
"""

from setuptools import find_packages, setup

kernels = ["kernels", *(f"kernels.{name}" for name in find_packages("kernels"))]
setup(
    packages=[*find_packages(include=["fastdit", "fastdit.*"]), *(f"fastdit.{k}" for k in kernels)],
    package_dir={"fastdit.kernels": "kernels"},
    package_data={"fastdit": ["py.typed"], "fastdit.kernels.cpu": ["*.cpp", "*.h"]},
)
