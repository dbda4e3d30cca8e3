"""`fastdit sample` of a flow: the solver's options, and those of its guidance."""

import re

import numpy as np
import pytest

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, FlowMatching, Guidance, Sampler
from fastdit.cli.solvers import SolverOptions, Steps, parse_interval, parse_solver
from fastdit.solvers import DDIM, DDPM, SOLVERS, Dopri5, Euler, EulerMaruyama, FlowSolver, Heun
from fastdit.testing import randomize

FLOW, DIFFUSION = FlowMatching(), DiffusionScheduler(5)
SMALL = DiTConfig(
    img_size=4, patch_size=2, in_channels=4, hidden=8, n_layers=1, n_heads=1, null_class=True
)


@pytest.fixture
def flow(tmp_path):
    """A tiny model of a flow, and where it is stored."""
    model = fastdit.DiT.from_config(SMALL)
    randomize(model)
    fastdit.save(model, tmp_path / "flow.safetensors", FlowMatching(clean_at=0))
    return model, tmp_path / "flow.safetensors"


@pytest.mark.parametrize(
    ("name", "process", "clip", "shift", "options", "expected"),
    [
        (None, FLOW, None, None, None, ("euler", Euler())),
        (None, DIFFUSION, 1.0, None, None, ("ddpm", DDPM(clip=1.0))),
        ("euler", FLOW, None, 0.3, None, ("euler", Euler(shift=0.3))),
        ("heun", FLOW, 2.0, 0.5, None, ("heun", Heun(clip=2.0, shift=0.5))),
        ("ddim", DIFFUSION, None, None, "eta=0.5", ("ddim", DDIM(eta=0.5))),
        (
            "euler-maruyama",
            FLOW,
            None,
            None,
            "diffusion=SBDM, norm=0.5,last_step=none,last_size=0.02",
            (
                "euler-maruyama",
                EulerMaruyama(diffusion="SBDM", norm=0.5, last_step=None, last_size=0.02),
            ),
        ),
        ("dopri5", FLOW, None, None, "rtol=1e-5", ("dopri5", Dopri5(rtol=1e-5))),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_solver_and_its_options_are_parsed(name, process, clip, shift, options, expected):
    assert parse_solver(name, process, clip, shift, options) == expected


def help_of(annotated):
    return annotated.__metadata__[0].help


def test_the_helps_examples_of_solvers_options_can_be_sampled():
    examples = re.findall(r"(\S+=\S+) for ([\w-]+)", help_of(SolverOptions))
    assert [name for _, name in examples] == ["ddim", "dopri5", "euler-maruyama"]
    for options, name in examples:
        process = DIFFUSION if name == "ddim" else FLOW
        _, solver = parse_solver(name, process, None, None, options)
        solver.table(process)


def test_the_help_names_the_default_steps_of_a_flow():
    fewer = [n for n, s in SOLVERS.items() if isinstance(s, FlowSolver) and s.flow_steps == 50]
    assert f"of a flow 250, {' and '.join(fewer)} 50]" in help_of(Steps)


def test_an_interval_is_of_times_or_of_timesteps():
    assert parse_interval(None) is None
    assert parse_interval("0.125,1") == (0.125, 1.0)
    assert parse_interval("100, 900") == (100, 900)
    assert all(type(t) is int for t in parse_interval("100,900"))
    assert Guidance(2.0, parse_interval("0,0.7")).active(0.7)


@pytest.mark.parametrize(
    ("arguments", "solver", "steps", "guidance"),
    [
        (
            "--solver euler --steps 6 --shift 0.3 --guidance-scale 2 --guidance-interval 0.125,1",
            Euler(shift=0.3),
            6,
            Guidance(2.0, (0.125, 1.0)),
        ),
        (
            "--solver euler-maruyama --solver-options last_size=0.1 --steps 4 --clip 3",
            EulerMaruyama(clip=3.0, last_size=0.1),
            4,
            None,
        ),
        ("--steps 3", None, 3, None),
    ],
    ids=["euler", "euler-maruyama", "default"],
)
@pytest.mark.parametrize("many", [False, True], ids=["grid", "many"])
def test_a_flow_is_sampled_as_asked(run, flow, tmp_path, arguments, solver, steps, guidance, many):
    model, path = flow
    count = ["--num-images", 2, "--batch-size", 2] if many else ["--count", 1]
    options = [*arguments.split(), *count, "--execution", "eager", "--device", "cpu"]
    done = run("sample", path, "--labels", "3,5", *options, "--out", tmp_path / "s.npz")
    assert done.exit_code == 0, done.output
    sampler = Sampler(
        model, FlowMatching(clean_at=0), solver, steps, guidance=guidance, execution="eager"
    )
    with np.load(tmp_path / "s.npz") as file:
        assert np.array_equal(file["latents"], sampler([3, 5]).numpy())


def test_the_timesteps_of_a_diffusion_are_guided_as_asked(run, tmp_path):
    model = fastdit.DiT.from_config(SMALL)
    randomize(model)
    scheduler = DiffusionScheduler(6, schedule="cosine")
    fastdit.save(model, tmp_path / "m", scheduler)
    options = "--labels 3 --count 1 --guidance-scale 2 --guidance-interval 2,4 --execution eager"
    done = run("sample", tmp_path / "m", *options.split(), "--out", tmp_path / "s.npz")
    assert done.exit_code == 0, done.output
    guidance = Guidance(2.0, interval=(2, 4))
    sampler = Sampler(model, scheduler, guidance=guidance, execution="eager")
    with np.load(tmp_path / "s.npz") as file:
        assert np.array_equal(file["latents"], sampler([3]).numpy())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--solver ddim", "--solver: expected one that takes a FlowMatching, which are dpm++, heu"),
        ("--shift 0", "error: --shift: expected a positive number, got 0.0"),
        ("--solver dopri5 --shift 2", "--shift: expected one of the solvers dpm++, heun, euler, "),
        ("--solver dopri5 --steps 5", "error: --steps: expected None, since dopri5 chooses its st"),
        ("--steps 0", "error: --steps: expected a positive integer, got 0"),
        ("--solver-options eta", "error: --solver-options: expected name=value, got 'eta'"),
        ("--solver-options eta=1", "error: --solver-options: expected one of last_size; got 'eta'"),
        (
            "--solver ddpm --solver-options eta=1",
            "error: --solver-options: expected none, since DDPM has none",
        ),
        (
            "--solver euler-maruyama --solver-options norms=1",
            "--solver-options: expected one of last_size, diffusion, norm, last_step; got 'norms'",
        ),
        (
            "--solver euler-maruyama --solver-options diffusion=sbdm",
            "error: --solver-options: diffusion: expected one of constant, SBDM",
        ),
        (
            "--solver euler-maruyama --solver-options diffusion=SBDM",
            "error: --solver: expected a diffusion that is finite at t = 1, where sampling",
        ),
        ("--guidance-interval 0,1", "--guidance-interval: expected --guidance-scale beside it"),
        (
            "--guidance-scale 2 --guidance-interval 0.5",
            "--guidance-interval: expected LOW,HIGH, such as 0.125,1, got '0.5'",
        ),
        (
            "--guidance-scale 2 --guidance-interval 0.7,0.2",
            "error: --guidance-interval: expected times 0 <= low < high <= 1",
        ),
        (
            "--guidance-scale 2 --guidance-interval 0,800",
            "error: --guidance-interval: expected times from 0 to 1, since the model's process",
        ),
    ],
)
def test_bad_options_are_one_line(run, flow, arguments, message, tmp_path):
    done = run("sample", flow[1], *arguments.split(), "--out", tmp_path / "s.npz")
    assert done.exit_code == 1 and message in done.stderr, done.output
    assert len(done.stderr.strip().splitlines()) == 1
