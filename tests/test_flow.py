"""Flow matching: paths, predictions and their conversions against formulas written out here."""

import json
import math

import pytest
import torch

from fastdit import DiffusionScheduler, FlowMatching
from fastdit.flow import PATHS, process_of

PREDICTIONS = ("velocity", "epsilon", "sample", "score")
TIMES = torch.tensor([0.03, 0.4, 0.71, 0.97], dtype=torch.float64)


def amplitudes(path, s):
    """The amplitudes of data and noise, and their rates, at a time s from noise to data."""
    if path == "linear":
        return s, 1 - s, 1.0, -1.0
    if path == "gvp":
        angle = s * math.pi / 2
        quarter = math.pi / 2
        return (
            math.sin(angle),
            math.cos(angle),
            quarter * math.cos(angle),
            -quarter * math.sin(angle),
        )
    a = math.exp(-0.25 * (1 - s) ** 2 * 19.9 - 0.5 * (1 - s) * 0.1)
    b = math.sqrt(1 - a * a)
    rate = a * (0.5 * (1 - s) * 19.9 + 0.5 * 0.1)
    return a, b, rate, -a * rate / b


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def by_image(values):
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None]


@pytest.mark.parametrize("clean_at", [1, 0], ids=["clean-at-1", "clean-at-0"])
@pytest.mark.parametrize("path", PATHS)
def test_states_and_targets_are_those_of_the_formulas(path, clean_at):
    scale, sign = 1.7, 1 if clean_at else -1
    data_times = [t if clean_at else 1 - t for t in TIMES.tolist()]
    a, b, da, db = (
        by_image(c) for c in zip(*(amplitudes(path, s) for s in data_times), strict=True)
    )
    x0, z = drawn(4, 2, 3, 3), drawn(4, 2, 3, 3, seed=1)
    expected = {
        "velocity": sign * (da * x0 + db * scale * z),
        "epsilon": z,
        "sample": x0,
        "score": -z / (b * scale),
    }
    for prediction in PREDICTIONS:
        flow = FlowMatching(path, prediction, clean_at=clean_at, noise_scale=scale)
        state = flow.interpolate(x0, TIMES, z)
        torch.testing.assert_close(state, a * x0 + b * scale * z, rtol=1e-12, atol=1e-12)
        target = flow.target(x0, z, TIMES)
        torch.testing.assert_close(target, expected[prediction], rtol=1e-12, atol=1e-12)
        velocity = flow.velocity(state, target, TIMES)
        torch.testing.assert_close(velocity, expected["velocity"], rtol=1e-11, atol=1e-11)
        of_state, of_out = (by_image(c.tolist()) for c in flow.denoised_from(TIMES))
        torch.testing.assert_close(of_state * state + of_out * target, x0, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("clean_at", [1, 0], ids=["clean-at-1", "clean-at-0"])
@pytest.mark.parametrize("path", PATHS)
def test_the_rates_are_the_derivatives_in_the_models_time(path, clean_at):
    flow, d = FlowMatching(path, clean_at=clean_at), 1e-6
    before, at, after = (flow.amplitudes(TIMES + k * d) for k in (-1, 0, 1))
    for name in ("signal", "noise"):
        slope = (getattr(after, name) - getattr(before, name)) / (2 * d)
        torch.testing.assert_close(slope, getattr(at, f"{name}_rate"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_a_path_ends_in_noise_alone_and_in_data_alone(path):
    ends = FlowMatching(path).amplitudes(torch.tensor([0.0, 1.0]))
    assert ends.signal.tolist() == [0, 1] and ends.noise.tolist() == [1, 0]


def test_min_noise_bounds_the_divisor_of_jits_velocity():
    """JiT: v = (x0 - z) / max(1 - t, 0.05), in the loss too."""
    flow = FlowMatching(prediction="sample", min_noise=0.05)
    x, out = drawn(4, 1, 2, 2), drawn(4, 1, 2, 2, seed=1)
    divisor = by_image([max(1 - t, 0.05) for t in TIMES.tolist()])
    torch.testing.assert_close(flow.velocity(x, out, TIMES), (out - x) / divisor)
    weight = 1 / divisor.flatten() ** 2
    torch.testing.assert_close(flow.loss_weight(TIMES), weight)
    # In REPA's direction of time the velocity has the other sign, and 1 - s is t.
    backward = FlowMatching(prediction="sample", min_noise=0.05, clean_at=0)
    torch.testing.assert_close(backward.velocity(x, out, 1 - TIMES), (x - out) / divisor)
    torch.testing.assert_close(backward.loss_weight(1 - TIMES), weight)


def test_the_loss_of_a_score_is_that_of_sit():
    """SiT's `transport.py`: the mean of (out * sigma + z)^2."""
    flow = FlowMatching("gvp", "score")
    x0, z, out = (drawn(4, 2, 3, 3, seed=i) for i in range(3))
    sigma = by_image([math.cos(t * math.pi / 2) for t in TIMES.tolist()])
    own = by_image(flow.loss_weight(TIMES).tolist()) * (out - flow.target(x0, z, TIMES)) ** 2
    torch.testing.assert_close(own, (out * sigma + z) ** 2)
    for prediction in ("velocity", "epsilon", "sample"):
        assert FlowMatching("gvp", prediction).loss_weight(TIMES).eq(1).all()


@pytest.mark.parametrize(
    ("flow", "span", "training"),
    [
        (FlowMatching(), (0, 1), (0, 1)),
        (FlowMatching("gvp", clean_at=0), (1, 0), (1, 0)),
        (FlowMatching("linear", "epsilon"), (0.001, 0.999), (0.001, 0.999)),
        (FlowMatching("gvp", "score", clean_at=0), (0.999, 0.001), (0.999, 0.001)),
        (FlowMatching("linear", "sample"), (0.001, 0.999), (0.001, 0.999)),
        (FlowMatching("linear", "sample", min_noise=0.05), (0, 1), (0, 1)),
        (FlowMatching("vp"), (0, 0.999), (0, 1 - 1e-5)),
        (FlowMatching("vp", "epsilon", clean_at=0), (1, 0.001), (1, 1e-5)),
    ],
    ids=lambda value: None if isinstance(value, tuple) else f"{value.path}-{value.prediction}",
)
def test_spans_leave_out_the_ends_that_sit_leaves_out(flow, span, training):
    assert flow.span == span and flow.training_span == training


def test_interpolation_keeps_the_dtype_and_rounds_its_amplitudes_once():
    x0, z = drawn(2, 1, 2, 2).float(), drawn(2, 1, 2, 2, seed=1).float()
    t = torch.tensor([0.1, 0.9])
    flow = FlowMatching("vp")
    wide = flow.interpolate(x0.double(), t, z.double())
    narrow = flow.interpolate(x0, t, z)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=3e-7, atol=3e-7)


def test_options_build_the_same_process_again_from_json():
    flow = FlowMatching("linear", "sample", 0, 1000.0, 2, 0.05)
    assert flow.scaled(torch.tensor([0.5])).tolist() == [500]
    options = json.loads(json.dumps(flow.options))
    assert process_of(options) == flow and hash(process_of(options)) == hash(flow)
    assert process_of(options) != FlowMatching("linear", "sample", 0, 1000.0, 2)
    assert eval(repr(flow), {"FlowMatching": FlowMatching}) == flow
    scheduler = DiffusionScheduler(12, schedule="cosine", prediction="sample")
    again = process_of(json.loads(json.dumps(scheduler.options)))
    assert isinstance(again, DiffusionScheduler) and again.options == scheduler.options


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowMatching("cosine"), "path: expected one of linear, gvp, vp; got 'cosine'"),
        (
            lambda: FlowMatching(prediction="v_prediction"),
            "prediction: expected one of velocity, epsilon, sample, score; got 'v_prediction'",
        ),
        (
            lambda: FlowMatching(clean_at=0.5),
            "clean_at: expected the model's time at the data, 1 or 0, got 0.5",
        ),
        (lambda: FlowMatching(clean_at=True), "clean_at: expected the model's time"),
        (lambda: FlowMatching(time_scale=0), "time_scale: expected a positive number, got 0"),
        (lambda: FlowMatching(noise_scale="2"), "noise_scale: expected a positive number, got '2'"),
        (lambda: FlowMatching(time_scale=math.inf), "time_scale: expected a positive number"),
        (lambda: FlowMatching(time_scale=10**400), "time_scale: expected a positive number"),
        (
            lambda: FlowMatching(min_noise=0.05),
            "min_noise: expected None unless path is 'linear' and prediction 'sample', got 0.05",
        ),
        (
            lambda: FlowMatching("vp", "sample", min_noise=0.05),
            "min_noise: expected None unless path is 'linear'",
        ),
        (lambda: process_of({"T": 5}), "options: expected those of a DiffusionScheduler"),
        (lambda: process_of({"path": "linear"}), "FlowMatching: expected every option"),
        (
            lambda: process_of(FlowMatching().options | {"speed": 1}),
            "FlowMatching option: expected one of path, prediction",
        ),
    ],
)
def test_bad_fields_are_value_errors(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": torch.tensor([0, 1])}, "t: expected times in [0, 1], float32 or float64, got torch"),
        ({"t": torch.tensor([0.5, 0.5]).bfloat16()}, "float32 or float64, got torch.bfloat16"),
        ({"t": torch.tensor([0.5])}, "t: expected shape [2], got [1]"),
        ({"t": torch.tensor([0.5, 1.5])}, "t: expected times in [0, 1], got 0.5 to 1.5"),
        ({"t": torch.tensor([0.5, math.nan])}, "t: expected times in [0, 1], got nan"),
        ({"noise": torch.zeros(2, 1)}, "noise: expected x0's shape [2, 3], got [2, 1]"),
        ({"x0": torch.zeros(2, 3, dtype=torch.int64)}, "x0: expected a float dtype, got torch.int"),
    ],
)
@pytest.mark.parametrize("method", ["interpolate", "target"])
def test_bad_tensors_are_value_errors(method, change, message):
    tensors = dict(x0=torch.zeros(2, 3), t=torch.tensor([0.5, 0.5]), noise=torch.zeros(2, 3))
    with pytest.raises(ValueError) as error:
        getattr(FlowMatching(), method)(**tensors | change)
    assert message in str(error.value)
