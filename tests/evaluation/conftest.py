"""A small network in place of Inception."""

import pytest
import torch

from fastdit.evaluation import Features


class Projections(torch.nn.Module):
    """Fixed random projections of images of any size, after a resize to 4 x 4."""

    def __init__(self, pool=6, spatial=5, logits=4):
        super().__init__()
        self.seen = []
        self.weights = [
            torch.randn(48, n, generator=torch.Generator().manual_seed(n))
            for n in (pool, spatial, logits)
        ]

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        self.seen.append(len(images))
        x = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)
        return Features(*(x @ w for w in self.weights))


@pytest.fixture
def network():
    return Projections()
