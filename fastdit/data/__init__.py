"""What models are trained on and what they make: the coloured shapes, latents, files.

The names of `fastdit.data.shapes`, the toy's set and its judge, are here. `latents` decodes and
encodes through an autoencoder, `images` writes pixels, `shards` keeps batches that processes
share, and `files` writes a file whole or not at all.
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
