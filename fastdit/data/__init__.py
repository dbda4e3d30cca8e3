"""Images, latents and files: what models are trained on, and what is written of their samples.

- `shapes` draws the toy's data set and judges samples of it.
- `latents` loads an autoencoder, decodes latents, and encodes folders of images for training.
- `images` writes pixels and latents as PNG and NPZ.
- `shards` computes large arrays in batches that processes share.
- `files` writes files atomically.
"""

from fastdit.data.shapes import LABEL_NAMES, coloured_shapes, judge

__all__ = ["LABEL_NAMES", "coloured_shapes", "judge"]
