"""PixArt and MMDiT sampled from prompts: a prompt's image is its own, and that of a plain loop."""

import pytest
import torch

import fastdit
from fastdit import (
    DiffusionScheduler,
    FlowMatching,
    Guidance,
    MMDiT,
    PixArt,
    Prompts,
    Sampler,
    reference,
)
from fastdit.sampling.text import bucket
from fastdit.solvers import Dopri5, Euler
from fastdit.testing import check_against_oracle, randomize, relative_error

STEPS, WIDTH, POOLED, MOST = 8, 20, 12, 16
SHAPE = (4, 4, 6)  # not square, and not the training's size
LENGTHS = [3, 7, 5]
PIXART = dict(img_size=8, hidden=24, n_layers=2, n_heads=2, text_width=WIDTH, text_tokens=MOST)
MMDIT = dict(
    img_size=8,
    in_channels=4,
    hidden=16,
    n_layers=2,
    n_heads=2,
    text_width=WIDTH,
    pooled_width=POOLED,
    text_tokens=MOST,
    position_size=12,
    qk_norm="rms",
    dual_blocks=(0,),
)
KINDS = ["pixart", "pixart-sizes", "mmdit"]
by_kind = pytest.mark.parametrize("kind", KINDS)
by_class = pytest.mark.parametrize("kind", ["pixart", "mmdit"])
GUIDANCE = Guidance(3.0)


def make_model(kind, device="cpu"):
    if kind == "mmdit":
        model = MMDiT(**MMDIT)
    else:
        sizes = dict(size_conditions=True, position_scale=2.0) if kind == "pixart-sizes" else {}
        model = PixArt(**PIXART, **sizes)
    randomize(model)
    return model.to(device)


def process_of(kind):
    if kind == "mmdit":
        return FlowMatching(clean_at=0, time_scale=1000)
    return DiffusionScheduler(STEPS, schedule="cosine")


def make_sampler(kind, model=None, **options):
    options = {"guidance": GUIDANCE, "sample_shape": SHAPE, "steps": STEPS} | options
    return Sampler(model or make_model(kind), process_of(kind), **options)


def make_prompts(kind, lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    embeds = [torch.randn(n, WIDTH, generator=generator) for n in lengths]
    pooled = torch.randn(len(lengths), POOLED, generator=generator)
    return Prompts(embeds, pooled if kind == "mmdit" else None)


def picked(prompts, rows):
    embeds = [prompts.embeds[i, : prompts.lengths[i]] for i in rows]
    return Prompts(embeds, None if prompts.pooled is None else prompts.pooled[rows])


def forward_of(model, shape, prompts, x, t):
    """The model's own forward of a batch at one time."""
    own = next(model.parameters()).dtype
    lengths = torch.tensor(prompts.lengths)
    t, text = torch.full((len(x),), t), prompts.embeds.to(own)
    if isinstance(model, MMDiT):
        return model(x.to(own), t, text, prompts.pooled.to(own), lengths)
    sizes = {}
    if model.cfg.size_conditions:
        height, width = (8 * side for side in shape[1:])
        sizes["resolution"] = torch.tensor([[height, width]] * len(x)).float()
        sizes["aspect_ratio"] = torch.tensor([[height / width]] * len(x))
    return model(x.to(own), t, text, lengths, **sizes)


@torch.no_grad()
def plain_loop(model, shape, prompts, negative, x, noise, guidance=GUIDANCE):
    """Sample by the model's forward: by Ho et al.'s algorithm 2, or by Euler's steps of a flow."""
    wide = x.dtype

    def predict(x, t, which):
        return forward_of(model, shape, negative if which is None else prompts, x, t).to(wide)

    if not isinstance(model, MMDiT):

        class Called(torch.nn.Module):
            def forward(self, x, t, labels):
                return predict(x, int(t[0]), labels)

        scheduler = DiffusionScheduler(STEPS, schedule="cosine")
        return reference.sample(Called(), scheduler, x, torch.zeros(len(x)), noise, guidance)
    times = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    for k in range(STEPS):
        now = float(times[k])
        velocity = predict(x, now * 1000, 0)
        if guidance is not None and guidance.active(now):
            null = predict(x, now * 1000, None)
            velocity = null + guidance.scale * (velocity - null)
        x = x + float(times[k + 1] - times[k]) * velocity
    return x


def recorded(batch, shape=SHAPE):
    z = torch.randn(STEPS + 1, batch, *shape, generator=torch.Generator().manual_seed(1))
    return z[0], z[1:]


@by_kind
def test_guided_steps_are_those_of_a_loop_over_the_models_forward(kind):
    """With texts of several lengths; PixArt's learned variance is used, as its own code does."""
    model, prompts, negative = (
        make_model(kind),
        make_prompts(kind),
        make_prompts(kind, [4, 2, 9], 5),
    )
    x_T, noise = recorded(3)
    given = dict(prompt_embeds=prompts, negative_prompt_embeds=negative, x_T=x_T, noise=noise)
    images = make_sampler(kind, model)(**given)
    expected = plain_loop(model, SHAPE, prompts, negative, x_T, noise)
    assert relative_error(images, expected) < 1e-5


@by_class
def test_bfloat16_obeys_the_error_rule(kind):
    shape, prompts, negative = (4, 16, 24), make_prompts(kind), make_prompts(kind, [4, 2, 9], 5)
    x_T, noise = recorded(3, shape)
    model = make_model(kind)
    sampler = make_sampler(kind, model, dtype=torch.bfloat16, sample_shape=shape)
    images = sampler(prompt_embeds=prompts, negative_prompt_embeds=negative, x_T=x_T, noise=noise)
    assert images.dtype == torch.float32
    given = shape, prompts, negative
    plain = plain_loop(make_model(kind).bfloat16(), *given, x_T, noise)
    oracle = plain_loop(model.double(), *given, x_T.double(), noise.double())
    check_against_oracle(images, plain, oracle)


def check_that_images_are_their_prompts_own(kind, sampler, rows=((1,), (2, 0))):
    prompts, negative, seeds = make_prompts(kind), make_prompts(kind, [4], 5), [11, 12, 13]
    together = sampler(prompt_embeds=prompts, negative_prompt_embeds=negative, seeds=seeds)
    for own in rows:
        images = sampler(
            prompt_embeds=picked(prompts, list(own)),
            negative_prompt_embeds=negative,
            seeds=[seeds[i] for i in own],
        )
        assert relative_error(images, together[list(own)]) < 1e-5
    assert relative_error(together[1], together[0]) > 0.1


@by_kind
def test_an_image_depends_on_its_prompt_and_seed_alone(kind):
    """Alone, in a batch of other lengths, and at another place."""
    check_that_images_are_their_prompts_own(kind, make_sampler(kind))


def test_an_adaptive_solver_keeps_to_each_prompt():
    """In float64: where float32 rounds, the solver chooses other steps."""
    pytest.importorskip("torchdiffeq")
    solver = Dopri5(rtol=1e-2, atol=1e-2)
    model = make_model("mmdit").double()
    sampler = make_sampler("mmdit", model, solver=solver, steps=None)
    check_that_images_are_their_prompts_own("mmdit", sampler, rows=((1,),))


def test_a_compiled_step_serves_texts_of_several_lengths():
    torch._dynamo.reset()
    model = PixArt(**PIXART | dict(n_layers=1))
    randomize(model)
    compiled = make_sampler("pixart", model, execution="compile")
    eager = make_sampler("pixart", model, execution="eager")
    negative, graphs = make_prompts("pixart", [4], 5), torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for lengths in ([3, 7], [8, 2, 5]):
        given = dict(prompt_embeds=make_prompts("pixart", lengths), negative_prompt_embeds=negative)
        assert relative_error(compiled(**given, seed=3), eager(**given, seed=3)) < 1e-5
    assert graphs["unique_graphs"] == before + 1


def test_lengths_that_share_a_graph():
    assert [bucket(n, 120) for n in (1, 15, 16, 77, 120)] == [15, 15, 30, 90, 120]
    assert [bucket(n, 589) for n in (77, 333, 589)] == [148, 370, 589]
    assert [bucket(n, 3) for n in (1, 2, 3)] == [1, 2, 3]


@by_class
def test_negative_rows_are_not_computed_outside_the_interval(kind):
    interval = (0.3, 0.8) if kind == "mmdit" else (2, 6)
    guidance, model, rows = Guidance(3.0, interval=interval), make_model(kind), []
    denoise = model.denoise
    model.denoise = lambda tokens, *rest: rows.append(len(tokens)) or denoise(tokens, *rest)
    prompts, negative = make_prompts(kind), make_prompts(kind, [4, 2, 9], 5)
    x_T, noise = recorded(3)
    sampler = make_sampler(kind, model, guidance=guidance)
    given = dict(prompt_embeds=prompts, negative_prompt_embeds=negative, x_T=x_T, noise=noise)
    images = sampler(**given)
    assert rows == [6 if guidance.active(t) else 3 for t in sampler.table.timesteps]
    assert 3 in rows and 6 in rows
    del model.denoise
    expected = plain_loop(model, SHAPE, prompts, negative, x_T, noise, guidance)
    assert relative_error(images, expected) < 1e-5


@by_class
def test_unguided_prompts_are_sampled_at_the_models_own_size(kind):
    model, prompts = make_model(kind), make_prompts(kind)
    shape = model.cfg.sample_shape
    x_T, noise = recorded(3, shape)
    images = make_sampler(kind, model, guidance=None, sample_shape=None)(
        prompt_embeds=prompts, x_T=x_T, noise=noise
    )
    expected = plain_loop(model, shape, prompts, None, x_T, noise, None)
    assert images.shape == (3, *shape) and relative_error(images, expected) < 1e-5


def test_the_text_is_encoded_once_a_call():
    model, calls = make_model("pixart"), []
    model.text_embed.register_forward_hook(lambda *_: calls.append(0))
    sampler = make_sampler("pixart", model)
    given = dict(negative_prompt_embeds=make_prompts("pixart", [4], 5), seed=3)
    sampler(prompt_embeds=make_prompts("pixart"), **given)
    assert len(calls) == 1


@by_class
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["own", "copy"])
def test_changed_weights_are_used_by_the_next_call(kind, dtype):
    """Without a copy of the weights and with one, which holds positions too."""
    model, prompts = make_model(kind), make_prompts(kind)
    sampler = make_sampler(kind, model, guidance=None, dtype=dtype)
    before = sampler(prompt_embeds=prompts, seed=3)
    with torch.no_grad():
        for p in (*model.parameters(), *model.buffers()):
            p.mul_(1.1)
    after = sampler(prompt_embeds=prompts, seed=3)
    fresh = make_sampler(kind, model, guidance=None, dtype=dtype)
    assert torch.equal(after, fresh(prompt_embeds=prompts, seed=3))
    assert relative_error(after, before) > 0.01


def test_embeddings_need_no_class_of_their_own():
    """A tensor holds whole prompts, and a list prompts of several lengths."""
    sampler = make_sampler("pixart", guidance=None)
    embeds = torch.randn(2, 5, WIDTH)
    images = sampler(prompt_embeds=Prompts(embeds), seed=3)
    assert torch.equal(sampler(prompt_embeds=embeds, seed=3), images)
    assert torch.equal(sampler(prompt_embeds=list(embeds), seed=3), images)


def test_one_negative_prompt_serves_all_images():
    sampler, negative = make_sampler("mmdit"), make_prompts("mmdit", [4], 5)
    given = dict(prompt_embeds=make_prompts("mmdit"), seed=3)
    images = sampler(negative_prompt_embeds=negative, **given)
    each = sampler(negative_prompt_embeds=picked(negative, [0, 0, 0]), **given)
    assert torch.equal(images, each)


def test_a_padded_text_may_be_longer_than_the_model_takes():
    """Its prompts count, and not the padding."""
    embeds, mask = torch.randn(2, MOST + 4, WIDTH), torch.zeros(2, MOST + 4)
    mask[0, :MOST], mask[1, :3] = 1, 1
    sampler = make_sampler("pixart", guidance=None)
    images = sampler(prompt_embeds=Prompts(embeds, mask=mask), seed=3)
    expected = sampler(prompt_embeds=[embeds[0, :MOST], embeds[1, :3]], seed=3)
    assert relative_error(images, expected) < 1e-6


def test_a_model_without_values_is_refused():
    sampler = make_sampler("pixart", guidance=None)
    sampler.model.to("meta")
    with pytest.raises(ValueError, match="model: expected weights with values, got a model on met"):
        sampler(prompt_embeds=make_prompts("pixart"), seed=3)


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
        make_sampler("pixart", Halved(**PIXART))
    model = make_model("pixart")
    sampler = make_sampler("pixart", model, guidance=None)
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="model: expected no hooks on its forward"):
        sampler(prompt_embeds=PIXART_PROMPTS)
    with pytest.raises(ValueError, match="model: expected no hooks on its forward"):
        make_sampler("pixart", model)


def test_a_model_knows_the_process_that_it_was_trained_on():
    model = make_model("mmdit")
    model.diffusion = FlowMatching(clean_at=0, time_scale=1000).options
    own = Sampler(model, steps=2, sample_shape=SHAPE)(prompt_embeds=MMDIT_PROMPTS)
    named = make_sampler("mmdit", model, steps=2, guidance=None)(prompt_embeds=MMDIT_PROMPTS)
    assert torch.equal(own, named)


def test_stable_diffusions_times_are_those_of_its_scheduler():
    """Equal steps of sigma from 1 to the shifted 1/1000, all of them shifted, and then 0."""
    model, shift = make_model("mmdit"), 3.0

    def shifted(sigma):
        return shift * sigma / (1 + (shift - 1) * sigma)

    sigmas = shifted(torch.linspace(1, shifted(1 / 1000), STEPS, dtype=torch.float64))
    x = x_T = recorded(3)[0]
    with torch.no_grad():
        for now, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
            velocity = forward_of(model, SHAPE, MMDIT_PROMPTS, x, float(now) * 1000)
            x = x + float(after - now) * velocity
    solver = Euler.from_diffusers(shift)
    images = make_sampler("mmdit", model, solver=solver, guidance=None)(
        prompt_embeds=MMDIT_PROMPTS, x_T=x_T
    )
    assert relative_error(images, x) < 1e-5


@pytest.mark.gpu
@by_kind
def test_a_graph_makes_the_images_of_eager_steps(kind):
    """For texts that share its length after padding, and for others."""
    model = make_model(kind, "cuda")
    sampler, eager = make_sampler(kind, model), make_sampler(kind, model, execution="eager")
    assert sampler.execution_for() == "graph"
    negative = make_prompts(kind, [4], 5)
    for lengths in ([3, 7, 5], [8, 2, 1], [3, 16, 5], [6], [3, 7, 5]):
        given = dict(prompt_embeds=make_prompts(kind, lengths), negative_prompt_embeds=negative)
        assert relative_error(sampler(**given, seed=3), eager(**given, seed=3)) < 1e-5
    check_that_images_are_their_prompts_own(kind, sampler)


@pytest.mark.gpu
@by_class
def test_the_loop_never_waits_for_the_device(kind):
    """Here the loop refills its tables, and the interval changes the number of rows."""
    interval = (0.3, 0.8) if kind == "mmdit" else (2, 6)
    options = dict(guidance=Guidance(3.0, interval=interval), table_bytes=2**15)
    sampler = make_sampler(kind, make_model(kind, "cuda"), **options)
    given = dict(
        prompt_embeds=make_prompts(kind), negative_prompt_embeds=make_prompts(kind, [4], 5)
    )
    expected = sampler(**given)

    def watch(k, x0):
        torch.cuda.set_sync_debug_mode("error" if k < STEPS - 1 else "default")

    try:
        images = sampler(**given, progress=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(images, expected)
