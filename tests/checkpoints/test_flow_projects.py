"""Checkpoints of SiT, LightningDiT, REPA and JiT compute what these projects' own code computed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastdit
from fastdit import FlowMatching, Guidance, Sampler
from fastdit.solvers import Euler, EulerMaruyama
from fastdit.testing import relative_error

FOLDER = Path(__file__).parents[1] / "golden"
LIGHTNING = ("lightningdit", "lightningdit_qknorm", "lightningdit_wo_shift")
FILES = ("sit", *LIGHTNING, "repa", "jit")
GOLDEN = {name: load_file(FOLDER / f"{name}.safetensors") for name in FILES}
# What no tensor of a tiny model tells.
ANSWERS = {"sit": dict(n_heads=2, null_class=True, diffusion="flow")}
ANSWERS |= dict.fromkeys(LIGHTNING, dict(null_class=True))

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*left out 12 tensors:UserWarning", "ignore:.*assumed. context_start 1:UserWarning"
)


def stored(name):
    """Return the weights of a golden file, in the project's names."""
    return {n.removeprefix("model/"): t for n, t in GOLDEN[name].items() if n.startswith("model/")}


def loaded(name):
    return fastdit.load(stored(name), **ANSWERS.get(name, {}))


@pytest.mark.parametrize("name", FILES)
def test_a_forward_is_the_projects_own(name):
    golden, model = GOLDEN[name], loaded(name)
    with torch.no_grad():
        out = model(golden["forward/x"], golden["forward/t"], golden["forward/y"])
    C = golden["forward/out"].shape[1]  # SiT drops the other half of its outputs
    assert relative_error(out[:, :C], golden["forward/out"]) < 1e-5


def final(
    name, key, flow=None, solver="euler", steps=10, guidance=None, start=1.0, execution="eager"
):
    """Return the relative error of a loop from the recorded noise to a recorded result."""
    golden, model = GOLDEN[name], loaded(name)
    if flow is not None:
        model.diffusion = flow.options
    if solver == "dopri5":
        pytest.importorskip("torchdiffeq")
    sampler = Sampler(model, None, solver, steps, guidance=guidance, execution=execution)
    noise = golden.get("noise")
    if noise is not None:
        noise = torch.cat([noise, torch.zeros_like(noise[:1])])  # the last step adds none
    if not isinstance(solver, EulerMaruyama):
        noise = None
    images = sampler(golden["y"], x_T=start * golden["x_T"], noise=noise)
    return relative_error(images, golden[key])


ON_THREE = Guidance(2.5, channels=3)


@pytest.mark.parametrize(
    ("key", "solver", "guidance"),
    [
        ("euler", "euler", None),
        ("euler/guided", "euler", ON_THREE),
        ("sde/sigma", EulerMaruyama(), None),
        ("sde/sigma/guided", EulerMaruyama(), ON_THREE),
        ("sde/sigma/norm-0.5", EulerMaruyama(norm=0.5), None),
        ("sde/sigma/last-Tweedie", EulerMaruyama(last_step="tweedie"), None),
        ("sde/sigma/last-Euler", EulerMaruyama(last_step="euler"), None),
        ("sde/linear", EulerMaruyama(diffusion="linear"), None),
        ("sde/constant", EulerMaruyama(diffusion="constant"), None),
        ("sde/decreasing", EulerMaruyama(diffusion="decreasing"), None),
        ("sde/increasing-decreasing", EulerMaruyama(diffusion="increasing-decreasing"), None),
    ],
)
def test_ten_steps_are_sits(key, solver, guidance):
    assert final("sit", key, solver=solver, guidance=guidance) < 1e-5


@pytest.mark.parametrize(
    "key", [k for k in GOLDEN["sit"] if k.startswith("euler/") and k.count("/") == 2]
)
def test_every_path_and_prediction_is_sits(key):
    _, path, prediction = key.split("/")
    flow = FlowMatching(path.lower(), prediction.replace("noise", "epsilon"))
    assert final("sit", key, flow) < 1e-5


@pytest.mark.parametrize(
    "key", [k for k in GOLDEN["sit"] if k.startswith("sde/") and k.count("/") == 3]
)
def test_the_stochastic_equation_of_every_path_is_sits(key):
    _, path, prediction, form = key.split("/")
    flow = FlowMatching(path.lower(), prediction.replace("noise", "epsilon"))
    assert final("sit", key, flow, EulerMaruyama(diffusion=form)) < 1e-5


@pytest.mark.parametrize(("key", "guidance"), [("dopri5", None), ("dopri5/guided", ON_THREE)])
def test_dopri5_is_sits_within_its_tolerance(key, guidance):
    """SiT chooses the steps of a batch together, and fastdit those of each image by itself."""
    assert final("sit", key, solver="dopri5", steps=None, guidance=guidance) < 1e-3


@pytest.mark.parametrize("name", LIGHTNING)
@pytest.mark.parametrize(
    ("key", "shift", "guidance"),
    [
        ("euler", 1.0, None),
        ("euler/shift-0.3", 0.3, None),
        ("euler/guided", 1.0, Guidance(4.0, channels=3)),
        ("euler/shift-0.3/guided-from-0.125", 0.3, Guidance(4.0, (0.125, 1.0), 3)),
    ],
)
def test_ten_steps_are_lightningdits(name, key, shift, guidance):
    assert final(name, key, solver=Euler(shift=shift), guidance=guidance) < 1e-5


TO_THREE_QUARTERS = Guidance(1.8, (0.0, 0.75))


@pytest.mark.parametrize(
    ("key", "solver", "guidance"),
    [
        ("euler", "euler", None),
        ("euler/guided-to-0.75", "euler", TO_THREE_QUARTERS),
        ("heun", "heun", None),
        ("heun/guided", "heun", Guidance(1.8)),
        ("sde", EulerMaruyama(), None),
        ("sde/guided", EulerMaruyama(), Guidance(1.8)),
        ("sde/guided-to-0.75", EulerMaruyama(), TO_THREE_QUARTERS),
    ],
)
def test_ten_steps_are_repas(key, solver, guidance):
    assert final("repa", key, solver=solver, guidance=guidance) < 1e-5


BETWEEN = Guidance(2.2, (0.13, 0.87))


@pytest.mark.parametrize(
    ("key", "solver", "steps", "guidance", "noise_scale"),
    [
        ("euler", "euler", 10, None, 1.0),
        ("euler/guided-0.13-to-0.87", "euler", 10, BETWEEN, 1.0),
        ("heun", "heun", 10, None, 1.0),
        ("heun/guided-0.13-to-0.87", "heun", 10, BETWEEN, 1.0),
        ("heun/25-steps", "heun", 25, None, 1.0),
        ("heun/noise-scale-2/guided", "heun", 10, Guidance(2.2), 2.0),
    ],
)
def test_the_steps_are_jits(key, solver, steps, guidance, noise_scale):
    flow = FlowMatching(prediction="sample", min_noise=0.05, noise_scale=noise_scale)
    assert final("jit", key, flow, solver, steps, guidance, start=noise_scale) < 1e-5


@pytest.mark.parametrize(
    ("name", "key", "solver", "guidance"),
    [
        ("sit", "euler/guided", "euler", ON_THREE),
        ("sit", "sde/sigma/guided", EulerMaruyama(), ON_THREE),
        ("repa", "heun/guided", "heun", Guidance(1.8)),
        ("repa", "sde/guided-to-0.75", EulerMaruyama(), TO_THREE_QUARTERS),
        ("lightningdit", "euler/shift-0.3", Euler(shift=0.3), None),
        ("lightningdit_qknorm", "euler/guided", "euler", Guidance(4.0, channels=3)),
        ("lightningdit_wo_shift", "euler/guided", "euler", Guidance(4.0, channels=3)),
    ],
)
def test_the_trajectory_is_the_projects_too(name, key, solver, guidance):
    error = final(name, key, solver=solver, guidance=guidance, execution="trajectory")
    assert error < 1e-5
