"""Text-to-image transformers, which take a text encoder's embeddings in place of a label.

- `prompts` is what such a model gets of a batch's prompts.
- `encoders` makes that of prompts, by the text encoders in the folder of a pipeline.
- `layers` is what the models share.
- `pixart` is PixArt-alpha and PixArt-Sigma: cross-attention to the text in every block.
- `mmdit` is the transformer of Stable Diffusion 3 and 3.5: joint attention of image and text.
- `work` counts the FLOP and the least time of their parts.
"""

from fastdit.text.layers import Text, TextModel
from fastdit.text.mmdit import MMDiT
from fastdit.text.pixart import PixArt
from fastdit.text.prompts import Prompts

__all__ = ["MMDiT", "PixArt", "Prompts", "Text", "TextModel"]
