"""Which tests this machine can run."""

import os

import pytest
import torch

COMPILED = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"


def pytest_collection_modifyitems(config, items):
    """Tests marked gpu are left out where there is none, or where kernels are interpreted."""
    if COMPILED:
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if item not in gpu]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
