"""The stand-in for a PixArt takes any mask of its text, and keeps what it computed of the text."""

import copy

import diffusers
import pytest
import torch

import fastdit
from fastdit.pipeline import PipelineTransformer
from fastdit.testing import randomize, relative_error

WIDTH, TOKENS = 20, 7  # of the embeddings


@pytest.fixture(scope="module")
def alpha():
    """At the size of 1,024 pixels, at which a PixArt-alpha has conditions on the size."""
    torch.manual_seed(0)
    heads = dict(num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24)
    sizes = dict(in_channels=4, num_layers=2, caption_channels=WIDTH, sample_size=128)
    model = diffusers.PixArtTransformer2DModel(**heads, **sizes)
    randomize(model)
    return model.eval()


def call(own, text, mask, x=None, **options):
    """Run a stand-in for a PixArt of the size of 1,024 pixels."""
    B = len(text)
    x = torch.randn(B, 4, 4, 8, generator=torch.Generator().manual_seed(1)) if x is None else x
    sizes = dict(resolution=torch.tensor([[32.0, 64.0]] * B), aspect_ratio=torch.full((B, 1), 0.5))
    given = dict(encoder_attention_mask=mask, timestep=torch.full((B,), 9), added_cond_kwargs=sizes)
    return own(x, text, **given | options).sample


@pytest.fixture
def own(alpha):
    return PipelineTransformer(fastdit.load(alpha))


@pytest.fixture
def counted(own, monkeypatch):
    """The stand-in, and a list that gets a member for each text that is encoded."""
    encoded, encode = [], own.model.encode_text

    def count(*args):
        encoded.append(None)
        return encode(*args)

    monkeypatch.setattr(own.model, "encode_text", count)
    return own, encoded


MASKS = {
    "end": [[1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]],
    "start": [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]],
    "holes": [[1, 0, 1, 0, 0, 1, 0], [0, 1, 1, 0, 1, 1, 1]],
    "equal": [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0]],
    "nothing": [[0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]],
}


@pytest.mark.parametrize("traced", [False, True], ids=["read", "unread"])
@pytest.mark.parametrize("case", MASKS)
def test_any_mask_of_the_text_is_taken_as_diffusers_takes_it(alpha, own, case, traced, monkeypatch):
    if traced:  # then no value may be read, and the padding stays
        monkeypatch.setattr("fastdit.pipeline.pixart.is_traced", lambda t: True)
    text, mask = torch.randn(2, TOKENS, WIDTH), torch.tensor(MASKS[case])
    tolerance = 1e-5 if case != "nothing" else 1e-3  # its biases round the scores in diffusers
    for given in (mask, mask.bool(), mask.float(), (1 - mask.float())[:, None] * -10000):
        with torch.no_grad():
            theirs = call(alpha, text, given)
            assert relative_error(call(own, text, given), theirs) < tolerance


@torch.no_grad()
def test_a_mask_that_weighs_tokens_or_has_another_shape_is_refused(own):
    text, mask = torch.randn(2, TOKENS, WIDTH), torch.ones(2, TOKENS)
    refused = {
        "values 0 and 1, got 0.25": mask.clone().index_fill_(1, torch.tensor([3]), 0.25),
        "values 0 and at most -1000, got 1": mask[:, None],
        r"shape \[2, 7\], got \[2, 6\]": mask[:, :6],
        r"shape \[2, 1, 7\], got \[1, 1, 7\]": mask[:1, None],
    }
    for message, given in refused.items():
        with pytest.raises(ValueError, match=f"encoder_attention_mask: expected {message}"):
            call(own, text, given)
    call(own, text, mask)
    with pytest.raises(ValueError, match="values 0 and 1, got 0.5"):
        call(own, text, mask.index_fill_(1, torch.tensor([2]), 0.5))
    mask.fill_(1)
    for name, value in (("attention_mask", mask), ("cross_attention_kwargs", {"scale": 0.5})):
        with pytest.raises(ValueError, match=f"{name}: expected None"):
            call(own, text, mask, **{name: value})
    with pytest.raises(ValueError, match="encoder_hidden_states: expected 1 to 300 .*got 301"):
        call(own, torch.randn(2, 301, WIDTH), None)
    with pytest.raises(ValueError, match="resolution: expected shape .*got None"):
        call(own, text, mask, added_cond_kwargs=None)


@torch.no_grad()
def test_no_stale_text_is_used(counted, alpha):
    own, encoded = counted
    text, mask = torch.randn(2, TOKENS, WIDTH), torch.tensor(MASKS["end"])
    model = own.model

    def other_weights():
        state = model.state_dict()
        state["blocks.1.cross.kv.weight"] = state["blocks.1.cross.kv.weight"] * 2
        model.load_state_dict(state, assign=True)

    changes = {
        "text": lambda: text.mul_(2),
        "mask": lambda: mask.fill_(1),
        "keys": lambda: model.blocks[0].cross.kv.weight.mul_(2),
        "projection": lambda: model.text_embed[2].bias.add_(1),
        "assigned": other_weights,
        "data": lambda: (model.blocks[0].cross.kv.weight.data.mul_(2), own.eval()),
    }
    call(own, text, mask)
    for name, change in changes.items():
        before = len(encoded)
        change()
        made = call(own, text, mask)
        assert len(encoded) == before + 1, name
        assert torch.equal(call(own, text, mask), made) and len(encoded) == before + 1, name
        own._kept.clear()
        assert torch.equal(call(own, text, mask), made), name
    before = len(encoded)
    for given in (text.clone(), text):  # only the last one is kept
        call(own, given, mask)
    assert len(encoded) == before + 2
    assert copy.deepcopy(own)._kept._entry is None is not own._kept._entry


def test_nothing_is_kept_with_gradients_in_inference_mode_or_of_a_text_that_is_gone(counted):
    own, encoded = counted
    text = torch.randn(2, TOKENS, WIDTH)
    for _ in range(2):
        call(own, text.requires_grad_(), None).sum().backward()
    assert len(encoded) == 2 and own._kept._entry is None
    first, text.grad = text.grad, None
    with torch.no_grad():
        call(own, text, None)
    call(own, text, None).sum().backward()
    assert relative_error(text.grad * 2, first) < 1e-6
    with torch.inference_mode():
        given = torch.randn(2, TOKENS, WIDTH)
        before = call(own, given, None)
        assert not torch.equal(call(own, given.mul_(2), None), before)
        assert own._kept._entry is None
    with torch.no_grad():
        call(own, text, None)
        assert own._kept._entry is not None
        own.float()  # moved, as a pipeline that offloads it moves it, it holds no memory
        assert own._kept._entry is None
        call(own, text, None)
        with torch.autocast("cpu", torch.bfloat16):
            lower = call(own, text, None)
            own._kept.clear()
            assert torch.equal(call(own, text, None), lower)
    del text, given
    assert own._kept._entry is None


@torch.no_grad()
def test_a_compiled_stand_in_reads_no_mask(own):
    torch._dynamo.reset()
    compiled = torch.compile(own, backend="eager", fullgraph=True)
    text, mask = torch.randn(2, TOKENS, WIDTH), torch.tensor(MASKS["holes"])
    assert relative_error(call(compiled, text, mask), call(own, text, mask)) < 1e-5
