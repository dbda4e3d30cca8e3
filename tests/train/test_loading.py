"""Loading batches: every image once per pass in the seed's order, prefetched or not."""

import pytest
import torch

from fastdit.train.loading import BatchLoader, ShuffledOrder
from fastdit.train.recipe import Recipe
from fastdit.train.runtime import Runtime
from fastdit.train.sources import Latents


@pytest.mark.parametrize("batch", [1, 7, 10, 25])
def test_every_pass_shows_every_image_once_in_another_order(batch):
    order = ShuffledOrder(10, seed=3)
    stream = torch.cat([order.rows(first, batch) for first in range(0, 50, batch)])[:50]
    passes = stream.view(5, 10)
    assert torch.equal(passes.sort(dim=1).values, torch.arange(10).expand(5, 10))
    assert len(passes.unique(dim=0)) == 5
    assert torch.equal(stream, ShuffledOrder(10, seed=3).rows(0, 50)), "the same whatever the batch"
    assert not torch.equal(stream, ShuffledOrder(10, seed=4).rows(0, 50))


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_prefetched_batches_are_those_asked_for(latents, prefetch, accumulate):
    source, order = Latents(latents[0]), ShuffledOrder(10, 0)
    recipe, size = Recipe(steps=5, batch_size=4), 4 // accumulate
    loader = BatchLoader(source, recipe, Runtime(accumulate=accumulate), prefetch)
    asked = [(step, i) for step in range(5) for i in range(accumulate)]
    for step, i in [*asked, asked[2], asked[0]]:  # the last two are not those prefetched
        first = 4 * step + size * i
        images, numbers = loader.load(step, i)
        expected = source.take(order.rows(first, size))
        assert all(torch.equal(a, b) for a, b in zip(images, expected, strict=True))
        assert numbers.tolist() == list(range(first, first + size))


def test_an_error_while_prefetching_is_raised_where_the_batch_is_needed(latents):
    folder, rows = latents[0], ShuffledOrder(10, 0).rows(0, 10)
    recipe = Recipe(steps=10, batch_size=1)
    loader = BatchLoader(Latents(folder), recipe, Runtime(), prefetch=True)
    # The last shard holds images 8 and 9.
    before = next(n for n in range(9) if rows[n] < 8 <= rows[n + 1])
    (folder / "00000002.npy").write_bytes(b"torn")
    loader.load(before)
    with pytest.raises(ValueError, match="00000002.npy: it is damaged"):
        loader.load(before + 1)
