"""Loading batches: every image once per pass in the seed's order, prefetched or not."""

import pytest
import torch

from fastdit.train.loading import BatchLoader, ShuffledOrder, draw_variants
from fastdit.train.objective import random_key
from fastdit.train.recipe import Recipe
from fastdit.train.runtime import Runtime
from fastdit.train.sources import ImageBatch, Latents


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


def test_variants_follow_from_the_seed_and_the_samples_number():
    key = random_key(3, "variants")
    whole = draw_variants(key, range(4096), 3)
    assert torch.equal(draw_variants(key, range(1000, 1010), 3), whole[1000:1010])
    counts = whole.bincount(minlength=3).double()
    assert len(counts) == 3 and ((counts - 4096 / 3) ** 2 / (4096 / 3)).sum() < 14
    assert not torch.equal(whole, draw_variants(random_key(4, "variants"), range(4096), 3))


class Rows:
    """A source whose images are their rows' numbers."""

    sample_shape, label_names, identity = (1, 1, 1), ("any",), {"kind": "rows"}

    def __len__(self):
        return 10

    def take(self, rows):
        return ImageBatch(rows.float()[:, None, None, None], None, torch.zeros_like(rows))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_sample_shows_one_of_its_images_variants(accumulate):
    """The images and their order are those of the same source without variants."""
    recipe, runtime = Recipe(steps=20, batch_size=4), Runtime(accumulate=accumulate)
    mirrored = Rows()
    mirrored.variants = 2

    def shown(source):
        loader = BatchLoader(source, recipe, runtime)
        parts = [loader.load(s, i)[0].mean for s in range(20) for i in range(accumulate)]
        return torch.cat(parts).flatten().long()

    rows = shown(mirrored)
    assert torch.equal(rows % 10, shown(Rows()))
    assert torch.equal(rows // 10, draw_variants(random_key(recipe.seed, "variants"), range(80), 2))
    assert {0, 1} == set((rows // 10).tolist())
    mirrored.variants = 0
    with pytest.raises(ValueError, match="variants: expected a positive integer, got 0"):
        BatchLoader(mirrored, recipe, runtime)
