"""The Sampler makes the reference loop's images, in any batch and with any noise predictor."""

import numpy as np
import pytest
import torch
from torch import nn

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, Guidance, Sampler, functional, reference
from fastdit.noise import normal
from fastdit.testing import check_against_oracle, randomize, relative_error

CFG = DiTConfig(hidden=32, n_layers=2, n_heads=2)
STEPS = 20


def make_model(cfg=CFG, dtype=torch.float32):
    model = fastdit.DiT.from_config(cfg)
    randomize(model)
    return model.to(dtype)


def make_scheduler(T=STEPS):
    return DiffusionScheduler(T, schedule="cosine")


def recorded_noise(batch, shape=CFG.sample_shape, steps=STEPS):
    z = torch.randn(steps + 1, batch, *shape, generator=torch.Generator().manual_seed(1))
    return z[0], z[1:]


class ConvPredictor(nn.Module):
    """A noise predictor of two convolutions, with the timestep as an input channel."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x, t, y):
        time = (t / 100).to(x.dtype)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        if y is not None:
            time = time + y[:, None, None, None] / 10
        return self.last(torch.tanh(self.first(torch.cat([x, time], dim=1))))


@pytest.mark.parametrize("learn_sigma", [False, True], ids=["fixed-var", "learned-var"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_images_equal_the_reference_loop_given_its_noise(dtype, learn_sigma):
    cfg = DiTConfig(hidden=32, n_layers=2, n_heads=2, learn_sigma=learn_sigma)
    labels = torch.arange(7)
    x_T, noise = recorded_noise(7)
    scheduler = make_scheduler()
    plain = reference.DiT.from_config(cfg)
    randomize(plain)
    own_dtype = reference.sample(plain.to(dtype), scheduler, x_T.to(dtype), labels, noise)
    oracle = reference.sample(plain.double(), scheduler, x_T.double(), labels, noise.double())
    images = Sampler(make_model(cfg, dtype), scheduler)(labels, x_T=x_T, noise=noise)
    assert images.dtype == dtype
    if dtype == torch.float64:
        assert relative_error(images, oracle) < 1e-12
    else:
        check_against_oracle(images, own_dtype, oracle)


def test_a_seed_draws_the_noise_that_noise_py_defines():
    """x_T is the noise of step 0, update k takes step k, and elements are in token order."""
    labels = torch.tensor([3, 1])
    keys = torch.tensor([[7, 5], [7, 6]])
    z = normal(keys, torch.arange(STEPS + 1), 3 * 16 * 16)
    z = functional.unpatchify(z.view(-1, 16, 48), 4).view(STEPS + 1, 2, 3, 16, 16)
    sampler = Sampler(make_model(), make_scheduler())
    by_hand = sampler(labels, x_T=z[0], noise=z[1:])
    assert relative_error(sampler(labels, seed=7, first_index=5), by_hand) < 1e-6


def test_an_image_does_not_depend_on_its_batch_or_its_order():
    sampler = Sampler(make_model(), make_scheduler())
    labels = [0, 5, 10, 15, 3, 3, 7]
    together = sampler(labels, seed=11)
    for i, label in enumerate(labels):
        alone = sampler([label], seed=11, first_index=i)
        assert relative_error(alone[0], together[i]) < 1e-5
    seeds = [2**40, 1, 2, 3, 4, 5, 0]
    forward = sampler(labels, seeds=seeds)
    backward = sampler(labels[::-1], seeds=seeds[::-1])
    assert relative_error(backward.flip(0), forward) < 1e-5
    assert relative_error(together[4], together[5]) > 0.1  # the same label, two streams of noise


def test_a_seeds_first_noise_does_not_depend_on_the_number_of_steps():
    """With predictions of zero and noise of zeros the images are x_T, scaled."""
    model = fastdit.DiT.from_config(CFG)
    for p in model.parameters():
        nn.init.ones_(p)
    nn.init.zeros_(model.final_linear.weight)
    nn.init.zeros_(model.final_linear.bias)
    flat = []
    for steps in (10, STEPS):
        silent = torch.zeros(steps, 1, *CFG.sample_shape)
        images = Sampler(model, make_scheduler(steps))([0], seed=3, noise=silent)
        flat.append(images.double().flatten())
    cosine = torch.nn.functional.cosine_similarity(*flat, dim=0)
    assert cosine.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("labels", [None, [4, 9, 2]], ids=["no-labels", "labels"])
def test_it_serves_any_noise_predictor(labels):
    torch.manual_seed(0)
    model = ConvPredictor()
    scheduler = make_scheduler()
    sampler = Sampler(model, scheduler, sample_shape=(2, 5, 6))
    images = sampler(labels, seeds=[1, 2, 3])
    assert images.shape == (3, 2, 5, 6)
    z = normal(torch.tensor([[1, 0], [2, 0], [3, 0]]), torch.arange(STEPS + 1), 60)
    z = z.view(STEPS + 1, 3, 2, 5, 6)
    y = None if labels is None else torch.tensor(labels)
    plain = reference.sample(model, scheduler, z[0], y, z[1:])
    assert relative_error(images, plain) < 1e-5


def test_an_unconditional_dit_samples_without_labels():
    model = make_model(DiTConfig(use_class_cond=False, hidden=32, n_layers=1, n_heads=2))
    sampler = Sampler(model, make_scheduler())
    assert sampler(None, seeds=[1, 2]).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="labels: expected None.*use_class_cond=False"):
        sampler([0, 1])


def test_bfloat16_weights_keep_a_float32_state():
    images = Sampler(make_model(dtype=torch.bfloat16), make_scheduler())([0, 1])
    exact = Sampler(make_model(), make_scheduler())([0, 1])
    assert images.dtype == torch.float32
    assert 0 < relative_error(images, exact) < 0.1


def test_sampling_leaves_the_model_and_the_global_generator_alone():
    model = make_model()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    x_T = torch.ones(1, *CFG.sample_shape)
    images = Sampler(model, make_scheduler())([0], x_T=x_T)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert torch.equal(x_T, torch.ones_like(x_T))
    assert not images.requires_grad and model.pos_embed.requires_grad and model.training


def test_progress_shows_a_bar_only_when_asked(capsys):
    sampler = Sampler(make_model(), make_scheduler())
    sampler([0])
    assert capsys.readouterr() == ("", "")
    sampler([0], progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "20/20" in err


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([16], {}, "labels: expected values in [0, 16), got 16 to 16"),
        ([-1, 3], {}, "labels: expected values in [0, 16), got -1 to 3"),
        ([], {}, "labels: expected a non-empty list of integers"),
        ([0.5], {}, "labels: expected a non-empty list of integers"),
        (0.5, {}, "labels: expected a non-empty list of integers"),
        (True, {}, "labels: expected a non-empty list of integers"),
        (16, {}, "labels: expected values in [0, 16), got 16 to 16"),
        (3, {"seeds": [1, 2]}, "seeds: expected 1, one an image; got 2"),
        (
            [0],
            {"generator": 5},
            "generator: expected a torch.Generator, or a list of them, got int",
        ),
        ([0], {"generator": [5]}, "generator: expected a torch.Generator, or a list of them, got"),
        ([0], {"generator": seeded(1), "seed": 0}, "generator: expected none beside seed, which"),
        ([0], {"generator": [seeded(1)], "seeds": [1]}, "generator: expected none beside seeds"),
        ([0], {"generator": seeded(-1)}, "generator: expected a seed in [0, 2^63), got 1844674407"),
        (None, {}, "labels: expected labels, or seeds or x_T to tell the batch size"),
        ([0], {"seed": -1}, "seed: expected an integer in [0, 2^63), got -1"),
        ([0], {"seed": 2**63}, "seed: expected an integer in [0, 2^63)"),
        ([0], {"seed": 1.5}, "seed: expected an integer in [0, 2^63), got 1.5"),
        ([0, 1], {"seeds": [1]}, "seeds: expected 2, one an image; got 1"),
        ([0], {"seeds": [1], "first_index": 2}, "first_index: expected 0 where seeds"),
        ([0], {"first_index": 2**32}, "first_index: expected an integer in [0, 2^32)"),
        ([0, 1], {"first_index": 2**32 - 1}, "first_index: expected at most 2^32 - 2, got 4294967"),
        ([0], {"first_index": 1.5}, "first_index: expected an integer in [0, 2^32), got 1.5"),
        ([0], {"seeds": [-7]}, "seeds: expected an integer in [0, 2^63), got -7"),
        ([0], {"seeds": 3}, "seeds: expected a sequence of integers, got int"),
        ([0], {"seeds": {3}}, "seeds: expected a sequence of integers, got set"),
        ([0], {"progress": "bar"}, "progress: expected True, False or a function, got 'bar'"),
        (["red"], {}, "labels: expected a non-empty list of integers, one an image; got ['red']"),
        (None, {"seeds": []}, "labels: expected labels, or seeds or x_T"),
        (
            [0],
            {"x_T": torch.zeros(1, 3, 16, 16, dtype=torch.complex64)},
            "x_T: expected a float tensor, got torch.complex64",
        ),
        (
            [0],
            {"x_T": torch.full((1, 3, 16, 16), float("nan"))},
            "x_T: expected finite values, but it holds NaN or Inf",
        ),
        ([0], {"x_T": torch.zeros(3, 16, 16)}, "x_T: expected shape [1, 3, 16, 16]"),
        ([0], {"noise": torch.zeros(5, 1, 3, 16, 16)}, "noise: expected shape [20, 1, 3, 16, 16]"),
    ],
)
def test_bad_calls_are_value_errors_before_any_work(labels, options, message):
    model = make_model()
    model.forward = None  # never reached
    with pytest.raises(ValueError) as error:
        Sampler(model, make_scheduler())(labels, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"solver": "ddmp"},
            "solver: expected one of ddpm, ddim, dpm++, heun, euler, euler-maruyama, dopri5; got "
            "'ddmp'; did you mean 'ddpm'?",
        ),
        ({"execution": "grpah"}, "got 'grpah'; did you mean 'graph'?"),
        ({"guidance": 4.0}, "guidance: expected fastdit.Guidance(scale), got 4.0"),
        (
            {"guidance": Guidance(4.0)},
            "guidance: expected none, since the model is not a DiT",
        ),
        ({"dtype": torch.int64}, "got torch.int64"),
        ({"dtype": "bf16"}, "dtype: expected one of torch.float16, torch.bfloat16, torch.float32"),
        ({"table_bytes": 0}, "table_bytes: expected a positive integer, got 0"),
        ({"sample_shape": (3, 8, 8)}, "sample_shape: expected the model's (3, 16, 16)"),
    ],
)
def test_bad_samplers_are_value_errors(options, message):
    with pytest.raises(ValueError) as error:
        Sampler(make_model(), make_scheduler(), **options)
    assert message in str(error.value)


@pytest.mark.parametrize("model_class", [reference.DiT, fastdit.DiT], ids=["reference", "fastdit"])
def test_a_compiled_model_is_sampled_like_the_bare_one(model_class):
    """Its noise is in token order and its labels are checked, as for the bare model."""
    torch._dynamo.reset()
    model = model_class.from_config(CFG)
    randomize(model)
    wrapped = torch.compile(model, backend="eager")
    sampler = Sampler(wrapped, make_scheduler())
    assert torch.equal(sampler([3], seed=5), Sampler(model, make_scheduler())([3], seed=5))
    with pytest.raises(ValueError, match="labels: expected values"):
        sampler([16])
    with pytest.raises(ValueError, match="use_class_cond=False"):
        Sampler(model_class(use_class_cond=False), make_scheduler())([0])


def test_a_predictor_without_parameters_is_served():
    class Shrink(nn.Module):
        def forward(self, x, t, y):
            return 0.5 * x

    images = Sampler(Shrink(), make_scheduler(), sample_shape=(1, 4, 4))(None, seeds=[0, 1])
    assert images.shape == (2, 1, 4, 4) and images.isfinite().all()


def test_predictions_that_are_not_finite_are_an_error():
    class Overflow(nn.Module):
        def forward(self, x, t, y):
            return x / 0

    sampler = Sampler(Overflow(), make_scheduler(), sample_shape=(1, 4, 4))
    with pytest.raises(FloatingPointError, match="model: expected finite predictions"):
        sampler(None, seeds=[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.uint64])
def test_labels_may_have_any_integer_dtype(dtype):
    sampler = Sampler(make_model(), make_scheduler())
    assert torch.equal(sampler(torch.tensor([3, 5], dtype=dtype)), sampler([3, 5]))


@pytest.mark.parametrize("shape", [(3, 4), (0, 4, 4), (3, -1, 4), (3.0, 4, 4)])
def test_a_nonsensical_shape_is_an_error(shape):
    with pytest.raises(ValueError, match="sample_shape: expected three positive integers"):
        Sampler(ConvPredictor(), make_scheduler(), sample_shape=shape)


def test_other_predictors_need_a_shape():
    with pytest.raises(ValueError, match=r"sample_shape: expected \(C, H, W\)"):
        Sampler(ConvPredictor(), make_scheduler())


def test_a_prediction_of_the_wrong_shape_is_an_error():
    sampler = Sampler(nn.Module(), make_scheduler(), sample_shape=(2, 4, 4))
    sampler.model.weight = nn.Parameter(torch.ones(1))
    sampler.model.forward = lambda x, t, y: x[:, :1]
    with pytest.raises(ValueError, match=r"model: expected an output of shape \[1, 2, 4, 4\]"):
        sampler(None, seeds=[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(bad):
    model = make_model()
    with torch.no_grad():
        model.blocks[1].mlp[2].bias[3] = bad
    with pytest.raises(ValueError, match=r"finite values, but blocks\.1\.mlp\.2\.bias holds"):
        Sampler(model, make_scheduler())([0])


def test_large_finite_weights_are_accepted():
    """Their sum overflows, but each of them is finite."""
    model = make_model()
    with torch.no_grad():
        model.y_embed.weight[9:] = 3e38
    assert Sampler(model, make_scheduler())([0]).isfinite().all()


def test_labels_and_seeds_may_be_any_array():
    sampler = Sampler(make_model(), make_scheduler())
    expected = sampler([7, 5], seeds=[1, 2])
    assert torch.equal(sampler(np.array([5, 7])[::-1], seeds=np.array([2, 1])[::-1]), expected)
    assert torch.equal(sampler(np.array([7, 5], dtype=object), seeds=range(1, 3)), expected)


@pytest.mark.parametrize("label", [7, np.int64(7), np.array(7), torch.tensor(7)], ids=type)
def test_one_label_is_one_image(label):
    sampler = Sampler(make_model(), make_scheduler())
    image = sampler(label, seed=3)
    assert image.shape == (1, *CFG.sample_shape)
    assert torch.equal(image, sampler([7], seed=3))


def test_generators_stand_for_seeds():
    sampler = Sampler(make_model(), make_scheduler())
    generator = seeded(5)
    for _ in range(2):  # nothing is drawn from it
        assert torch.equal(sampler([3, 4], generator=generator), sampler([3, 4], seed=5))
    redone = sampler([4], generator=generator, first_index=1)
    assert torch.equal(redone, sampler([4], seed=5, first_index=1))
    several = [seeded(5), seeded(8)]
    assert torch.equal(sampler([3, 4], generator=several), sampler([3, 4], seeds=[5, 8]))
    assert torch.equal(sampler([3]), sampler([3], seed=0))


def test_a_predictor_that_writes_to_its_input_does_not_change_the_callers_tensor():
    class InPlace(nn.Module):
        def forward(self, x, t, y):
            return x.mul_(0.5)

    x_T = torch.ones(1, 1, 4, 4)
    Sampler(InPlace(), make_scheduler(), sample_shape=[1, 4, 4])(None, x_T=x_T)
    assert torch.equal(x_T, torch.ones(1, 1, 4, 4))


def test_a_predictor_with_integer_weights_gets_its_first_float_dtype():
    class Coded(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, x, t, y):
            assert x.dtype == torch.float32
            return self.scale * x

    assert Sampler(Coded(), make_scheduler(), sample_shape=(1, 4, 4))(None, seeds=[1]).std() > 0


def test_a_prediction_that_is_a_tuple_is_an_error():
    model = nn.Module()
    model.forward = lambda x, t, y: (x, x)
    with pytest.raises(ValueError, match=r"model: expected an output of shape .*, got tuple"):
        Sampler(model, make_scheduler(), sample_shape=(1, 4, 4))(None, seeds=[1])


def test_a_loaded_model_brings_the_diffusion_of_its_training(tmp_path):
    model = make_model()
    fastdit.save(model, tmp_path / "m.safetensors", DiffusionScheduler(12, schedule="cosine"))
    loaded = fastdit.load(tmp_path / "m.safetensors")
    expected = Sampler(model, DiffusionScheduler(12, schedule="cosine"))([3], seed=5)
    assert torch.equal(Sampler(loaded, steps=None)([3], seed=5), expected)
    with pytest.raises(ValueError, match="scheduler: expected the DiffusionScheduler or the Flow"):
        Sampler(model)
