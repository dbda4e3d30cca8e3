"""Map `kernels/` to `fastdit.kernels`; everything else is in pyproject.toml.

A top-level package named `kernels` would overwrite the well-known PyPI package of that name.
"""

from setuptools import setup

setup(
    packages=["fastdit", "fastdit.kernels", "fastdit.kernels.cpu"],
    package_dir={"fastdit": "fastdit", "fastdit.kernels": "kernels"},
    package_data={"fastdit": ["py.typed"], "fastdit.kernels.cpu": ["*.cpp", "*.h"]},
)
