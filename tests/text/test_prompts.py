"""`fastdit.Prompts`: masks, padding, and what is refused."""

import re

import pytest
import torch

from fastdit import Prompts

EMBEDS = torch.ones(2, 3, 4)
MASK = torch.tensor([[1, 0, 1], [1, 1, 0]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_what_a_mask_leaves_out_is_not_read(dtype):
    embeds = EMBEDS.clone()
    embeds[MASK == 0] = float("nan")
    prompts = Prompts(embeds, mask=MASK.to(dtype))
    assert prompts.lengths == [2, 2]
    assert torch.equal(prompts.embeds, torch.tensor([1.0, 1, 0])[None, :, None].expand(2, 3, 4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((EMBEDS, None, (1 - MASK) * -1e4), "mask: expected values 0 and 1, got -10000"),
        ((EMBEDS, None, MASK * float("nan")), "mask: expected values 0 and 1, got nan"),
        ((EMBEDS, None, MASK.to("meta")), "mask: expected values in a strided tensor, got a meta"),
        ((EMBEDS, None, MASK.to_sparse()), "mask: expected values in a strided tensor, got torch."),
        ((EMBEDS * float("nan"),), "embeds: expected finite values, but it holds NaN"),
        ((EMBEDS.to("meta"),), "embeds: expected values in a strided tensor, got a meta tensor"),
        (([EMBEDS],), "embeds: expected a float tensor [M, width], got torch.float32 of shape [2,"),
        (([EMBEDS[0], EMBEDS[0].to("meta")],), "embeds: expected values in a strided tensor, got"),
        ((EMBEDS, torch.ones(2)), "pooled: expected a float tensor [B, width], got torch.float32"),
    ],
)
def test_an_error_names_the_argument(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Prompts(*given)
