"""From labels and seeds to images; `Sampler` is the only entrance."""

from fastdit.sampling.sampler import Sampler

__all__ = ["Sampler"]
