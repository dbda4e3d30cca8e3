"""Which tests this machine can run, and the fixtures that all of them share."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

COMPILED = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"


def pytest_collection_modifyitems(config, items):
    """Deselect tests marked gpu if there is no GPU or if kernels are interpreted."""
    if COMPILED:
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if item not in gpu]


def pytest_configure():
    """Handle SIGINT, which tests send and which a shell makes its background commands ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def float32_is_float32():
    """Turn off TF32, which cuDNN uses for convolutions, such as the patch embedding, by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def latents(tmp_path):
    """Shards as `fastdit encode` writes them: ten latents of three classes, four per file."""
    folder = tmp_path / "latents"
    folder.mkdir()
    generator = np.random.default_rng(0)
    means = generator.standard_normal((10, 4, 8, 8)).astype(np.float32)
    stds = generator.uniform(0.1, 0.5, (10, 4, 8, 8)).astype(np.float32)
    plan = {
        "num": 10,
        "batch_size": 4,
        "labels": [0, 0, 0, 1, 1, 1, 1, 2, 2, 2],
        "classes": ["cat", "dog", "eel"],
        "files": [f"{i}.png" for i in range(10)],
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    for i in range(3):
        rows = slice(4 * i, 4 * i + 4)
        np.save(folder / f"{i:08d}.npy", np.concatenate([means[rows], stds[rows]], axis=1))
    return folder, means, stds


@pytest.fixture
def flipped_latents(latents):
    """The shards of `latents` with flips; each flipped latent is the plain one, negated."""
    folder, means, stds = latents
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"flip": True}))
    for path in folder.glob("*.npy"):
        plain = np.load(path)
        np.save(path, np.stack([plain, -plain], axis=1))
    return folder, means, stds


@pytest.fixture
def pictures(tmp_path):
    """A folder of six pictures, of several sizes and kinds, in the classes cat and dog."""
    folder = tmp_path / "pictures"
    for i, name in enumerate(["cat/a.png", "cat/b.jpg", "cat/c.webp", "dog/d.png", "dog/e.png"]):
        draw_picture(folder / name, i, (12 + i, 10))
    draw_picture(folder / "dog" / "grey.png", 5, (9, 9), "L")
    return folder


def draw_picture(path, seed, size=(12, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3)
    noise = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)


@pytest.fixture
def draw():
    """Write a picture of noise to a path: `draw(path, seed)`."""
    return draw_picture
