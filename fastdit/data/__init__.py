"""Images, latents and files: what models are trained on, and what is written of their samples.

- `shapes` draws the toy's data set and judges samples of it; its names are exported here.
- `latents` loads an autoencoder, decodes latents, and encodes folders of images for training.
- `images` writes pixels and latents as PNG and NPZ.
- `shards` computes large arrays in batches that processes share.
- `files` writes files atomically.
"""

from fastdit.data.shapes import (
    COLOURS,
    IMG_SIZE,
    LABEL_NAMES,
    SHAPES,
    Accuracy,
    ShapesData,
    classify,
    coloured_shapes,
    judge,
)

__all__ = [
    "COLOURS",
    "IMG_SIZE",
    "LABEL_NAMES",
    "SHAPES",
    "Accuracy",
    "ShapesData",
    "classify",
    "coloured_shapes",
    "judge",
]
