"""Images, latents and files: what models are trained on, and what is written of their samples.

- `shapes` draws the toy's data set and judges samples of it.
- `pictures` reads labelled pictures from folders, NPZ files and Hugging Face data sets.
- `latents` loads an autoencoder, decodes latents, and encodes pictures for training.
- `pixels` decodes pictures for training without an autoencoder.
- `images` writes pixels and latents as PNG and NPZ.
- `shards` computes large arrays in batches that processes share; `image_shards` does it for
  pictures, and follows them when they change, and `mapped_shards` reads such shards.
- `files` writes files atomically.
"""

from fastdit.data.shapes import LABEL_NAMES, coloured_shapes, judge

__all__ = ["LABEL_NAMES", "coloured_shapes", "judge"]
