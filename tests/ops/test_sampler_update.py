"""`sampler_update` in float64: the solvers' formulas, guidance, clipping and layouts."""

import math

import pytest
import torch

from fastdit import functional, reference
from fastdit.diffusion import DiffusionScheduler
from fastdit.noise import normal
from fastdit.solvers import DDPM
from fastdit.update import COEFFICIENTS, Guidance

SHAPES = {"tokens": (2, 15, 3), "images": (2, 3, 5, 3)}
by_layout = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def table(*rows):
    """Return rows of coefficients, in which x0_limit is inf and other columns 0 if not named."""
    defaults = {**dict.fromkeys(COEFFICIENTS, 0.0), "x0_limit": math.inf}
    assert all(row.keys() <= defaults.keys() for row in rows)
    values = [[float(v) for v in {**defaults, **row}.values()] for row in rows]
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def channels_of(x):
    return 1 if x.dim() == 4 else 2


def assert_equal(actual, expected):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == torch.float64
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("learned", [False, True], ids=["posterior", "learned-range"])
def test_a_loop_over_the_ddpm_table_is_ancestral_sampling(learned):
    scheduler, shape = DiffusionScheduler(T=8), (2, 3, 4, 5)
    x_T, noise = randn(*shape), randn(8, *shape)

    def model(x, t, labels):
        eps = torch.sin(2 * x) + t[:, None, None, None] / 10
        return torch.cat([eps, torch.cos(3 * x)], dim=1) if learned else eps

    x, solver = x_T, DDPM().table(scheduler)
    assert solver.timesteps == [7, 6, 5, 4, 3, 2, 1, 0]
    for k, t in enumerate(solver.timesteps):
        model_out = model(x, torch.full((2,), t), None)
        x, _ = functional.sampler_update(x, model_out, solver.coefficients, k, noise=noise[k])
    assert_equal(x, reference.sample(model, scheduler, x_T, noise=noise))


@by_layout
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_equation_12_of_song_et_al(shape, eta):
    x, eps, z = randn(3, *shape)
    a, a_prev = 0.3, 0.55  # the paper calls alpha_bar alpha
    sigma = eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)  # equation 16
    predicted_x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    expected = math.sqrt(a_prev) * predicted_x0 + math.sqrt(1 - a_prev - sigma**2) * eps + sigma * z
    row = dict(
        x0_x=a**-0.5,
        x0_eps=-((1 / a - 1) ** 0.5),
        eps=(1 - a_prev - sigma**2) ** 0.5,
        x0=a_prev**0.5,
        sigma=sigma,
    )
    x_next, x0 = functional.sampler_update(x, eps, table(row), 0, noise=z)
    assert_equal(x0, predicted_x0)
    assert_equal(x_next, expected)
    if eta == 0:
        assert torch.equal(functional.sampler_update(x, eps, table(row), 0)[0], x_next)


@by_layout
def test_two_steps_of_dpm_solver_pp_2m_are_algorithm_2_of_lu_et_al(shape):
    x, eps_a, eps_b = randn(3, *shape)
    alpha = [0.4, 0.7, 0.95]
    sigma = [math.sqrt(1 - a * a) for a in alpha]
    lam = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    h = [lam[1] - lam[0], lam[2] - lam[1]]
    r = h[0] / h[1]

    x0_a = (x - sigma[0] * eps_a) / alpha[0]
    x_1 = sigma[1] / sigma[0] * x - alpha[1] * (math.exp(-h[0]) - 1) * x0_a
    x0_b = (x_1 - sigma[1] * eps_b) / alpha[1]
    D = (1 + 1 / (2 * r)) * x0_b - 1 / (2 * r) * x0_a
    x_2 = sigma[2] / sigma[1] * x_1 - alpha[2] * (math.exp(-h[1]) - 1) * D

    rows = []
    for i, second in ((0, 0.0), (1, 1 / (2 * r))):
        gain = -alpha[i + 1] * math.expm1(-h[i])
        predict = dict(x0_x=1 / alpha[i], x0_eps=-sigma[i] / alpha[i], x=sigma[i + 1] / sigma[i])
        rows.append(dict(predict, x0=gain * (1 + second), x0_prev=-gain * second))
    first, x0_prev = functional.sampler_update(x, eps_a, table(*rows), torch.tensor(0))
    assert_equal(first, x_1)
    actual, x0 = functional.sampler_update(first, eps_b, table(*rows), torch.tensor(1), x0_prev)
    assert_equal(x0, x0_b)
    assert_equal(actual, x_2)


@by_layout
@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("learned", [False, True], ids=["eps", "learned-range"])
def test_guidance_mixes_the_first_channels_and_leaves_the_rest_conditional(
    shape, channels, learned
):
    cond, null, v_cond, v_null, z = randn(5, *shape)
    dim = channels_of(cond)
    model_out = torch.cat([cond, null])
    if learned:
        model_out = torch.cat([model_out, torch.cat([v_cond, v_null])], dim=dim)
    row = dict(x0_eps=1, eps=1, sigma=0.5, log_sigma_low=-2, log_sigma_high=-1)
    x_next, x0 = functional.sampler_update(
        randn(*shape), model_out, table(row), 0, noise=z, guidance=Guidance(4.0, channels=channels)
    )
    for i in range(3):
        c, n, out = (t.select(dim, i) for t in (cond, null, x0))
        guided = channels is None or i < channels
        assert_equal(out, -3 * n + 4 * c if guided else c)
    sigma = torch.exp(-2 + (v_cond + 1) / 2) if learned else 0.5
    assert_equal(x_next, x0 + sigma * z)


@by_layout
def test_clipping_bounds_the_x0_that_x_next_uses_and_keeps_nan(shape):
    x, eps = 3 * randn(2, *shape)
    x[0, 1, 1] = math.nan
    row = dict(x0_x=1, x0_eps=-0.5, x0_limit=1.25, x=0.5, x0=2)
    x_next, x0 = functional.sampler_update(x, eps, table(row), 0)
    free = x - 0.5 * eps
    expected = torch.where(free.isnan(), free, free.nan_to_num().clip(-1.25, 1.25))
    assert (free.abs() > 1.25).any() and (free.abs() < 1.25).any()
    assert torch.equal(x0.isnan(), x.isnan()) and torch.equal(x_next.isnan(), x.isnan())
    assert_equal(x0.nan_to_num(9.0), expected.nan_to_num(9.0))
    assert_equal(x_next.nan_to_num(9.0), (0.5 * x + 2 * expected).nan_to_num(9.0))


@pytest.mark.parametrize("learned", [False, True], ids=["eps", "learned-range"])
def test_tokens_and_images_get_the_same_update(learned):
    B, C, p = 2, 3, 4
    x, x0_prev, z = randn(3, B, C, 8, 8)
    model_out = randn(2 * B, 2 * C if learned else C, 8, 8)
    values = (1.3, -0.8, 1, 0.5, 0.3, 0.2, 0.1, 0.7, -2, -1)
    row = dict(zip(COEFFICIENTS, values, strict=True))
    guidance = Guidance(2.5, channels=2)

    def tokens(image):
        return functional.patchify(image, p).reshape(image.shape[0], 64, image.shape[1])

    images = functional.sampler_update(
        x, model_out, table(row), 0, x0_prev, noise=z, guidance=guidance
    )
    pixels = functional.sampler_update(
        tokens(x),
        tokens(model_out),
        table(row),
        0,
        x0_prev=tokens(x0_prev),
        noise=tokens(z),
        guidance=guidance,
    )
    for image, tokened in zip(images, pixels, strict=True):
        assert torch.equal(tokens(image), tokened)


@by_layout
def test_seeds_draw_the_noise_of_step_plus_one_in_element_order(shape):
    x, eps = randn(2, *shape)
    seeds = torch.tensor([[7, 0], [-(2**40), 5]])
    coefficients = table(*[dict(x=0.9, eps=0.1, sigma=0.4)] * 4)
    z = normal(seeds, torch.tensor([3]), x[0].numel())[0].reshape(shape)
    seeded, _ = functional.sampler_update(x, eps, coefficients, torch.tensor(2), seeds=seeds)
    given, _ = functional.sampler_update(x, eps, coefficients, torch.tensor(2), noise=z.double())
    assert torch.equal(seeded, given)
    assert_equal(seeded, 0.9 * x + 0.1 * eps + 0.4 * z.double())


def test_noise_and_learned_range_are_not_used_where_sigma_is_zero():
    x, eps, nan = randn(2, 6, 3), randn(2, 6, 3), torch.full((2, 6, 3), math.nan).double()
    row = dict(x=0.9, eps=0.1, log_sigma_low=-math.inf, log_sigma_high=-3)
    model_out = torch.cat([eps, nan], dim=2)
    x_next, _ = functional.sampler_update(x, model_out, table(row), 0, noise=nan)
    assert_equal(x_next, 0.9 * x + 0.1 * eps)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@by_layout
def test_results_may_overwrite_their_inputs(shape, backend):
    x, x0_prev = randn(2, *shape).float()
    rows = dict.fromkeys(("x0_x", "x0_eps", "x", "x0", "x0_prev"), 0.7)
    given = dict(coefficients=table(rows), step=torch.tensor(0), backend=backend)
    expected = functional.sampler_update(x, x + 1, x0_prev=x0_prev, **given)
    out = x, x0_prev
    results = functional.sampler_update(x, x + 1, x0_prev=x0_prev, out=out, **given)
    for result, place, value in zip(results, out, expected, strict=True):
        assert result is place and torch.equal(place, value)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_autograd_sees_that_a_state_was_overwritten(backend):
    """A gradient that needs the old state raises an error instead of using the new state."""
    weight, x = torch.ones(2, 4, 3, requires_grad=True), torch.randn(2, 4, 3)
    loss, given = (weight * x).sum(), (torch.zeros(2, 4, 3), torch.zeros(1, 10), 0)
    functional.sampler_update(x, *given, out=(x, torch.empty_like(x)), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_step_chooses_the_row_as_an_int_or_as_a_tensor():
    x, eps = randn(2, 2, 6, 3)
    coefficients = table(*[dict(x=k + 1) for k in range(3)])
    for k in range(3):
        for step in (k, torch.tensor(k)):
            assert_equal(functional.sampler_update(x, eps, coefficients, step)[0], (k + 1) * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32_and_returned_in_the_dtype_of_x(dtype):
    """0.5 x + (1 + 2^-14) eps at eps = -x / 2 vanishes if any intermediate value is rounded."""
    x = torch.ones(1, 4, 1, dtype=dtype)
    coefficients = table(dict(x=0.5, eps=1 + 2**-14)).float()
    x_next, x0 = functional.sampler_update(x, -0.5 * x.bfloat16(), coefficients, 0)
    assert x_next.dtype == x0.dtype == dtype
    assert (x_next == -(2**-15)).all()


x, m, c, s = torch.zeros(2, 6, 3), torch.zeros(4, 6, 3), torch.zeros(5, 10), torch.tensor(0)
update = functional.sampler_update


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: update(x[0], x[0], c, s), "x: expected [B, P, C] or [B, C, H, W], got [6, 3]"),
        (lambda: update(x.int(), x, c, s), "x: expected a float dtype, got torch.int32"),
        (lambda: update(x, x.int(), c, s), "model_out: expected a float dtype, got torch.int32"),
        (
            lambda: update(x, m, c, s),
            "model_out: expected shape [2, 6, 3], or [2, 6, 6] with a learned range, got [4, 6, 3]",
        ),
        (
            lambda: update(x, x, c, s, guidance=Guidance(2.0)),
            "model_out: expected shape [4, 6, 3], or [4, 6, 6] with a learned range (2B rows for "
            "guidance), got [2, 6, 3]",
        ),
        (
            lambda: update(x, m, c, s, guidance=Guidance(2.0, channels=4)),
            "guidance: expected 1 to 3 channels, got 4",
        ),
        (
            lambda: update(x[..., None], x[..., None], c[:, :9], s),
            "coefficients: expected floats of shape [S, 10], got torch.float32 of [5, 9]",
        ),
        (lambda: update(x, x, c.int(), s), "coefficients: expected floats of shape [S, 10], got"),
        (lambda: update(x, x, c, 5), "step: expected a row of the 5 coefficients, got 5"),
        (lambda: update(x, x, c, -1), "step: expected a row of the 5 coefficients, got -1"),
        (lambda: update(x, x, c, s.int()), "step: expected an int64 scalar, got torch.int32"),
        (lambda: update(x, x, c, s[None]), "step: expected an int64 scalar, got torch.int64 of"),
        (
            lambda: update(x, x, c, s, x0_prev=m),
            "x0_prev: expected x's shape [2, 6, 3], got [4, 6, 3]",
        ),
        (lambda: update(x, x, c, s, noise=m), "noise: expected x's shape [2, 6, 3], got [4, 6, 3]"),
        (lambda: update(x, x, c, s, noise=x.int()), "noise: expected a float dtype, got"),
        (
            lambda: update(x, x, c, s, seeds=torch.zeros(3, 2).long()),
            "seeds: expected int64 of shape [2, 2], got torch.int64 of [3, 2]",
        ),
        (lambda: update(x, x, c, s, seeds=torch.zeros(2, 2)), "got torch.float32 of [2, 2]"),
        (
            lambda: update(x, x, c, s, seeds=torch.zeros(2, 2).long(), noise=x),
            "noise: expected None where seeds are given, got both",
        ),
        (lambda: update(x, x, c.to("meta"), s), "coefficients: expected x's device cpu, got meta"),
        (lambda: update(x, x, c, s.to("meta")), "step: expected x's device cpu, got meta"),
        (
            lambda: update(x, x, c, s, out=(x, x.bfloat16())),
            "out: expected two contiguous tensors of shape [2, 6, 3] and torch.float32, got",
        ),
        (lambda: update(x, x, c, s, out=(x, x)), "out: expected two tensors, got one twice"),
        (
            lambda: update(x.clone().requires_grad_(), x, c, s, out=(x, x.clone())),
            "out: expected tensors of which none asks for a gradient; use out=None",
        ),
        (lambda: update(x, x, c, s, out=(x, x.to("meta"))), "out: expected x's device cpu, got"),
        (lambda: update(x, x.to("meta"), c, s), "model_out: expected x's device cpu, got meta"),
        (lambda: Guidance(2.0, (5, 5)), "interval: expected integers 0 <= low < high, got (5, 5)"),
        (
            lambda: Guidance(2.0, (-1, 5)),
            "interval: expected integers 0 <= low < high, got (-1, 5)",
        ),
        (lambda: Guidance(math.nan), "scale: expected a finite number, got nan"),
        (lambda: Guidance(2.0, 5), "interval: expected integers 0 <= low < high, got 5"),
        (lambda: Guidance("much"), "scale: expected a finite number, got 'much'"),
        (lambda: Guidance(2.0, channels=0), "channels: expected an integer of at least 1, or N"),
        (lambda: Guidance(2.0, channels=2.0), "channels: expected an integer of at least 1, or N"),
    ],
)
def test_bad_arguments_are_value_errors_that_name_them(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_it_traces_as_one_graph_with_a_step_on_the_device():
    compiled = torch.compile(functional.sampler_update, backend="eager", fullgraph=True)
    x, eps = randn(2, 2, 6, 3)
    coefficients = table(dict(x=1, sigma=0.5), dict(x=2, eps=1, x0=1, x0_eps=1))
    arguments = (x, eps, coefficients, torch.tensor(1), None, None, randn(2, 6, 3))
    for out, expected in zip(
        compiled(*arguments), functional.sampler_update(*arguments), strict=True
    ):
        assert torch.equal(out, expected)


def test_guidance_converts_its_arguments_to_plain_numbers():
    numpy_like = torch.tensor(3), torch.tensor(8)
    guidance = Guidance(torch.tensor(2.5), list(numpy_like), torch.tensor(3))
    assert guidance == Guidance(2.5, (3, 8), 3) and hash(guidance) == hash(Guidance(2.5, (3, 8), 3))
