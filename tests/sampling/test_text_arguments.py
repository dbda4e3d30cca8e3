"""What is no prompt, and what cannot sample prompts, is a ValueError that names the argument."""

import pytest
import torch

import fastdit
from fastdit import DiffusionScheduler, FlowMatching, Guidance, MMDiT, PixArt, Prompts, Sampler

STEPS, WIDTH, POOLED, MOST = 8, 20, 12, 16
SHAPE = (4, 4, 6)
TINY = dict(img_size=8, hidden=8, n_layers=1, n_heads=2, text_width=WIDTH, text_tokens=MOST)


def make_sampler(kind, model=None, **options):
    options = {"guidance": Guidance(3.0), "sample_shape": SHAPE, "steps": STEPS} | options
    if kind == "mmdit":
        process = FlowMatching(clean_at=0, time_scale=1000)
        model = MMDiT(**TINY, in_channels=4, pooled_width=POOLED, position_size=12)
        return Sampler(model, process, **options)
    return Sampler(model or PixArt(**TINY), DiffusionScheduler(STEPS), **options)


def make_prompts(kind, lengths=(3, 7, 5)):
    embeds = [torch.zeros(n, WIDTH) for n in lengths]
    return Prompts(embeds, torch.zeros(len(lengths), POOLED) if kind == "mmdit" else None)


PIXART_PROMPTS, MMDIT_PROMPTS = make_prompts("pixart"), make_prompts("mmdit")
NEGATIVE = {"negative_prompt_embeds": make_prompts("pixart", [4])}


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("pixart", {}, "prompt_embeds: expected embeddings, one prompt an image, got None"),
        ("pixart", {"labels": [1]}, "labels: expected None, since the model takes prompts"),
        (
            "pixart",
            {"prompt_embeds": make_prompts("pixart", [3, MOST + 1]), **NEGATIVE},
            "prompt_embeds: expected at most the model's text_tokens=16 tokens, got 17",
        ),
        (
            "pixart",
            {"prompt_embeds": torch.zeros(2, 3, WIDTH + 1), **NEGATIVE},
            "prompt_embeds: expected the model's text_width=20, got 21",
        ),
        (
            "pixart",
            {"prompt_embeds": "a cat", **NEGATIVE},
            "prompt_embeds: embeds: expected a tensor [B, M, width] or a list of [M, width]; got",
        ),
        (
            "pixart",
            {"prompt_embeds": MMDIT_PROMPTS, **NEGATIVE},
            "prompt_embeds: expected no pooled embeddings, since a PixArt takes none, got [3, 12]",
        ),
        (
            "mmdit",
            {"prompt_embeds": PIXART_PROMPTS, "negative_prompt_embeds": MMDIT_PROMPTS},
            "prompt_embeds: expected Prompts(..., pooled=) of the model's pooled_width=12, got non",
        ),
        (
            "mmdit",
            {
                "prompt_embeds": MMDIT_PROMPTS,
                "negative_prompt_embeds": Prompts(torch.zeros(3, 4, WIDTH), torch.zeros(3, 9)),
            },
            "negative_prompt_embeds: expected Prompts(..., pooled=) of the model's pooled_width=12,"
            " got 9",
        ),
        (
            "pixart",
            {"prompt_embeds": PIXART_PROMPTS},
            "negative_prompt_embeds: expected some, for Guidance(scale=3.0, interval=None, "
            "channels=None), got None",
        ),
        (
            "unguided",
            {"prompt_embeds": PIXART_PROMPTS, **NEGATIVE},
            "negative_prompt_embeds: expected None, since guidance is None, got Prompts",
        ),
        (
            "pixart",
            {"prompt_embeds": PIXART_PROMPTS, "negative_prompt_embeds": torch.zeros(2, 4, WIDTH)},
            "negative_prompt_embeds: expected 1 prompt for all, or 3, as prompt_embeds has; got 2",
        ),
        (
            "pixart",
            {"prompt_embeds": PIXART_PROMPTS, **NEGATIVE, "seeds": [1, 2]},
            "seeds: expected 3, one a prompt of prompt_embeds; got 2",
        ),
        (
            "pixart",
            {"prompt_embeds": PIXART_PROMPTS, **NEGATIVE, "x_T": torch.zeros(3, *SHAPE[::-1])},
            "x_T: expected shape [3, 4, 4, 6], got [3, 6, 4, 4]",
        ),
        (
            "dit",
            {"labels": [1, 2, 3], "prompt_embeds": PIXART_PROMPTS},
            "prompt_embeds: expected None, since the model is no fastdit.PixArt or fastdit.MMDiT",
        ),
        (
            "dit",
            {"labels": [1, 2, 3], **NEGATIVE},
            "negative_prompt_embeds: expected None, since the model is no fastdit.PixArt",
        ),
    ],
)
def test_bad_prompts_are_value_errors(kind, given, message):
    if kind == "dit":
        dit = fastdit.DiT(hidden=8, n_layers=1, n_heads=2)
        sampler = Sampler(dit, DiffusionScheduler(STEPS), execution="eager")
    elif kind == "unguided":
        sampler = make_sampler("pixart", guidance=None)
    else:
        sampler = make_sampler(kind)
    with pytest.raises(ValueError) as error:
        sampler(**given)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"execution": "trajectory"},
            "execution: 'trajectory' needs a fastdit.DiT whose forward is its own, without hooks, "
            "got MMDiT; use 'auto'",
        ),
        ({"execution": "graph"}, "execution: 'graph' needs a model on CUDA, got one on cpu"),
        ({"sample_shape": (3, 4, 4)}, "sample_shape: expected the model's 4 channels, got 3"),
        (
            {"sample_shape": (4, 5, 4)},
            "sample_shape: expected (height, width), each a multiple of 2, got (5, 4)",
        ),
        (
            {"sample_shape": (4, 26, 4)},
            "sample_shape: expected at most 24 x 24, as position_size=12, got 26 x 4",
        ),
        (
            {"guidance": Guidance(2.0, channels=5)},
            "guidance.channels: expected at most the model's 4, got 5",
        ),
        (
            {"guidance": Guidance(2.0, interval=(1, 900))},
            "guidance.interval: expected times from 0 to 1",
        ),
        ({"dtype": torch.int8}, "dtype: expected one of torch.float16"),
    ],
)
def test_bad_samplers_are_value_errors(options, message):
    with pytest.raises(ValueError) as error:
        make_sampler("mmdit", **options)
    assert message in str(error.value)


def test_a_forward_that_would_not_be_called_is_refused():
    class Halved(PixArt):
        def forward(self, *given, **options):
            return 0.5 * super().forward(*given, **options)

    with pytest.raises(ValueError, match="model: expected PixArt's own forward.*in Halved"):
        make_sampler("pixart", Halved(**TINY))
    model = PixArt(**TINY)
    sampler = make_sampler("pixart", model, guidance=None)
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="model: expected no hooks on its forward"):
        sampler(prompt_embeds=PIXART_PROMPTS)
    with pytest.raises(ValueError, match="model: expected no hooks on its forward"):
        make_sampler("pixart", model)


def test_a_model_without_values_is_refused():
    sampler = make_sampler("pixart", guidance=None)
    sampler.model.to("meta")
    with pytest.raises(ValueError, match="model: expected weights with values, got a model on met"):
        sampler(prompt_embeds=make_prompts("pixart"), seed=3)
