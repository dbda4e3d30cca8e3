"""fastdit's models as the transformers of diffusers' pipelines.

- `base` is `PipelineTransformer`, what the stand-ins of all families share.
- `dit` stands in for the transformer of `DiTPipeline`.
- `pixart` stands in for that of `PixArtAlphaPipeline` and `PixArtSigmaPipeline`.
- `sd3` stands in for that of `StableDiffusion3Pipeline`.
- `kept` keeps what is computed of a text once for all steps.
"""

from fastdit.pipeline.base import PipelineTransformer, TransformerOutput
from fastdit.pipeline.dit import DiTTransformer
from fastdit.pipeline.pixart import PixArtTransformer
from fastdit.pipeline.sd3 import SD3Transformer

__all__ = [
    "DiTTransformer",
    "PipelineTransformer",
    "PixArtTransformer",
    "SD3Transformer",
    "TransformerOutput",
]
