"""The C++ op that runs a whole sampling loop: its accuracy, its bits and its arguments."""

import math
from dataclasses import replace

import pytest
import torch

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, Guidance, functional
from fastdit.kernels import cpu
from fastdit.ops import checks
from fastdit.ops.trajectory import DiTWeights, Modulation, kernel_shape
from fastdit.sampling.modulation import ChunkedTables, LayerProjection
from fastdit.solvers import DDPM, SOLVERS
from fastdit.testing import check_against_oracle, randomize

STEPS = 6
# 25 tokens of 27 features
ODD = DiTConfig(img_size=15, patch_size=3, hidden=50, n_heads=5, n_layers=2)
GUIDED = DiTConfig(
    img_size=20,
    in_channels=4,
    hidden=48,
    n_layers=2,
    n_heads=3,
    null_class=True,
    modulation_act="silu",
    gelu="tanh",
    ln_eps=1e-6,
    mlp_ln_eps=1e-4,
    learn_sigma=True,
)
SHAPES = {
    "seed": (DiTConfig(), None),
    "odd": (ODD, None),
    "one-token": (DiTConfig(img_size=4, patch_size=4, hidden=6, n_heads=6, n_layers=1), None),
    "one-head": (DiTConfig(img_size=8, hidden=7, n_heads=1, n_layers=2), None),
    "threads-a-slice": (DiTConfig(img_size=16, hidden=192, n_heads=3, n_layers=1), None),
    "wide": (DiTConfig(img_size=32, hidden=576, n_heads=8, n_layers=1, gelu="tanh"), None),
    "long": (DiTConfig(img_size=64, patch_size=4, hidden=33, n_heads=3, n_layers=1), None),
    "guided-team": (replace(GUIDED, hidden=96), Guidance(2.0)),
    "guided": (GUIDED, Guidance(3.0, channels=3)),
    "all-channels": (GUIDED, Guidance(0.5)),
}
EVEN = {
    name: (cfg, guidance)
    for name, (cfg, guidance) in SHAPES.items()
    if cfg.head_dim % 2 == 0 and cfg.patch_size**2 * cfg.in_channels % 2 == 0
}
HAS_BFLOAT16 = torch.cpu.get_capabilities().get("avx512_bf16", False)


def make_model(cfg=None):
    model = fastdit.DiT.from_config(cfg or DiTConfig())
    randomize(model)
    return model.requires_grad_(False)


def problem(cfg, B, guidance=None, solver=SOLVERS["ddpm"], dtype=torch.float32, noise="seeds"):
    """Return the arguments of `functional.trajectory` for a whole loop."""
    model = make_model(cfg).to(dtype)
    table = solver.table(DiffusionScheduler(STEPS, schedule="cosine"))
    labels = [i % 3 for i in range(B)] + ([cfg.num_classes] * B if guidance else [])
    tables = ChunkedTables(LayerProjection(model), table.timesteps, labels, 2**30)
    S, P, C = len(table.timesteps), cfg.img_size**2, cfg.in_channels
    z = torch.randn(S + 1, B, P, C, generator=torch.Generator().manual_seed(1)).to(dtype)
    return dict(
        x=z[0],
        x0=torch.zeros_like(z[0]),
        weights=DiTWeights.of(model),
        modulation=tables.steps(0, S, len(labels)),
        coefficients=table.coefficients.to(dtype),
        seeds=torch.tensor([[2**40 + 7, i] for i in range(B)]) if noise == "seeds" else None,
        noise=z[1:] if noise == "noise" else None,
        guidance=guidance,
    )


def launch(arguments, **options):
    """Call the C++ launcher directly, since `instruction_set` is an option of it alone."""
    a = dict(arguments)
    guidance = a["guidance"] and (a["guidance"].scale, a["guidance"].channels)
    sizes, eps = kernel_shape(a["weights"].cfg)
    shape = cpu.Shape(*sizes[:-1], bool(sizes[-1]), *eps)
    return cpu.trajectory(
        x=a["x"],
        x0=a["x0"],
        weights=a["weights"].tensors,
        **a["modulation"]._asdict(),
        coefficients=a["coefficients"],
        first=a.get("first", 0),
        seeds=a["seeds"],
        noise=a["noise"],
        guidance=guidance,
        shape=shape,
        **options,
    )


@pytest.mark.parametrize(("cfg", "guidance"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("noise", ["seeds", "noise"])
def test_every_instruction_set_obeys_the_error_rule(cfg, guidance, noise):
    B = math.ceil(4096 / (cfg.img_size**2 * cfg.in_channels))
    given = problem(cfg, B, guidance, noise=noise)
    plain = functional.trajectory(**given, backend="reference")
    oracle = functional.trajectory(**problem(cfg, B, guidance, dtype=torch.float64, noise=noise))
    for name in cpu.instruction_sets():
        for own, other, exact in zip(
            launch(given, instruction_set=name), plain, oracle, strict=True
        ):
            check_against_oracle(own, other, exact)


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_the_gelu_is_right_everywhere(gelu):
    """The features of the MLP are the same for every token, and go through all of its range."""
    cfg = DiTConfig(hidden=256, n_heads=4, n_layers=1, gelu=gelu)
    given, exact = problem(cfg, 6), problem(cfg, 6, dtype=torch.float64)
    for start in (-7, -5.6, -1, 0, 5.3):
        for arguments in (given, exact):
            layer = arguments["weights"].parts().layers[0]
            layer.fc1.zero_()
            layer.fc1_bias.copy_(torch.linspace(start, start + 1.7, 1024))
        plain = functional.trajectory(**given, backend="reference")
        oracle = functional.trajectory(**exact)
        for name in cpu.instruction_sets():
            for results in zip(launch(given, instruction_set=name), plain, oracle, strict=True):
                check_against_oracle(*results)


def test_weights_may_have_any_strides():
    given = problem(DiTConfig(hidden=32, n_layers=1), 2)
    views = tuple(
        torch.stack([t, t], dim=-1)[..., 0] if t.dim() == 1 else t.t().contiguous().t()
        for t in given["weights"].tensors
    )
    strided = given | dict(weights=DiTWeights(given["weights"].cfg, views))
    assert not views[2].is_contiguous()
    for a, b in zip(launch(strided), launch(given), strict=True):
        assert torch.equal(a, b)


def test_an_instruction_set_is_for_its_dtype():
    given = problem(DiTConfig(hidden=32, n_layers=1), 1)
    with pytest.raises(ValueError, match="avx512_bf16 is not for torch.float32"):
        launch(given, instruction_set="avx512_bf16")
    low = given | dict(weights=given["weights"].to(torch.bfloat16))
    with pytest.raises(ValueError, match="plain is not for torch.bfloat16"):
        launch(low, instruction_set="plain")
    with pytest.raises(ValueError, match="expected an even K in bfloat16, got 3"):
        cpu.linear(torch.ones(2, 3), torch.ones(4, 3).bfloat16())


@pytest.mark.skipif(not HAS_BFLOAT16, reason="needs AVX512-BF16")
@pytest.mark.parametrize(("cfg", "guidance"), EVEN.values(), ids=EVEN.keys())
@pytest.mark.parametrize("noise", ["seeds", "noise"])
def test_bfloat16_obeys_the_error_rule(cfg, guidance, noise):
    B = math.ceil(4096 / (cfg.img_size**2 * cfg.in_channels))
    given = problem(cfg, B, guidance, noise=noise)
    given["weights"] = given["weights"].to(torch.bfloat16)
    by_step, by_label, rows = given["modulation"]
    rounded = (None if t is None else t.bfloat16() for t in (by_step, by_label))
    plain = functional.trajectory(
        **given | dict(modulation=Modulation(*rounded, rows)), backend="reference"
    )
    oracle = functional.trajectory(**problem(cfg, B, guidance, dtype=torch.float64, noise=noise))
    for own, other, exact in zip(launch(given), plain, oracle, strict=True):
        check_against_oracle(own, other, exact)
    assert all(map(torch.equal, functional.trajectory(**given, backend="cpp"), launch(given)))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (replace(SHAPES["one-token"][0], hidden=6), "takes an even head dim and even features"),
        (replace(ODD, hidden=20), "takes an even head dim and even features"),
    ],
)
def test_odd_sizes_are_refused_in_bfloat16(cfg, message, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    given = problem(cfg, 1)
    given["weights"] = given["weights"].to(torch.bfloat16)
    with pytest.raises(ValueError, match=f"backend: 'cpp' {message}"):
        functional.trajectory(**given, backend="cpp")


OF_DIFFUSION = {n: s for n, s in SOLVERS.items() if DiffusionScheduler in s.processes}


@pytest.mark.parametrize(
    "solver", [*OF_DIFFUSION.values(), DDPM(clip=0.5)], ids=[*OF_DIFFUSION, "clipped"]
)
def test_every_solver_obeys_the_error_rule(solver):
    given = problem(GUIDED, 3, Guidance(2.0), solver)
    exact = problem(GUIDED, 3, Guidance(2.0), solver, torch.float64)
    check_against_oracle(
        functional.trajectory(**given, backend="cpp")[0],
        functional.trajectory(**given, backend="reference")[0],
        functional.trajectory(**exact)[0],
    )


@pytest.mark.parametrize(("cfg", "guidance"), SHAPES.values(), ids=SHAPES.keys())
def test_an_image_has_the_same_bits_for_any_batch_order_and_number_of_threads(cfg, guidance):
    """A thread runs images in lockstep or alone, or shares one: no sum depends on which."""
    before = torch.get_num_threads()
    full = problem(cfg, 11, guidance)

    def part(chosen, threads, name):
        torch.set_num_threads(threads)
        rows = full["modulation"].rows
        rows = torch.cat([r[chosen] for r in rows.split(11)])
        given = full | dict(
            x=full["x"][chosen],
            x0=full["x0"][chosen],
            seeds=full["seeds"][chosen],
            modulation=full["modulation"]._replace(rows=rows),
        )
        if name == "bfloat16":
            return launch(given | dict(weights=low))[0]
        return launch(given, instruction_set=name)[0]

    low = full["weights"].to(torch.bfloat16)
    names = cpu.instruction_sets()
    if HAS_BFLOAT16 and (cfg, guidance) in EVEN.values():
        names.append("bfloat16")
    try:
        for name in names:
            expected = part(torch.arange(11), 1, name)
            for threads in (1, 2, 3, 8):
                order = torch.randperm(11, generator=torch.Generator().manual_seed(threads))
                assert torch.equal(part(order, threads, name), expected[order])
                for i in (0, 7):
                    assert torch.equal(part(torch.tensor([i]), threads, name)[0], expected[i])
    finally:
        torch.set_num_threads(before)


def test_nan_and_infinity_reach_the_output_of_their_own_images():
    for bad in (math.nan, math.inf):
        given = problem(DiTConfig(), 3)
        given["x"][1, 5, 0] = bad
        x, _ = functional.trajectory(**given, backend="cpp")
        assert not x[1].isfinite().any() and x[0].isfinite().all() and x[2].isfinite().all()
    for index in range(len(given["weights"].tensors)):
        given = problem(DiTConfig(), 3)
        given["weights"].tensors[index].view(-1)[-1] = math.nan
        assert functional.trajectory(**given, backend="cpp")[0].isnan().any()


def test_denormal_inputs_are_taken_and_the_callers_denormals_are_not_flushed():
    given = problem(DiTConfig(), 2)
    tiny = given | dict(x=given["x"] * 1e-40, coefficients=given["coefficients"] * 1e-38)
    assert functional.trajectory(**tiny, backend="cpp")[0].isfinite().all()
    assert (torch.tensor([1e-39]) * 0.5 > 0).all(), "denormals are flushed in the whole process"


def test_tables_may_have_any_strides_and_dtypes():
    given = problem(ODD, 3)
    expected = functional.trajectory(**given, backend="cpp")
    modulation = given["modulation"]
    awkward = given | dict(
        x=given["x"].transpose(1, 2).contiguous().transpose(1, 2),
        coefficients=given["coefficients"].double().t().contiguous().t(),
        modulation=modulation._replace(
            by_step=modulation.by_step.repeat(1, 1, 2)[..., : modulation.by_step.shape[-1]],
            rows=modulation.rows.repeat_interleave(2)[::2],
        ),
        seeds=given["seeds"].t().contiguous().t(),
    )
    before = awkward["x"].clone()
    for own, other in zip(functional.trajectory(**awkward, backend="cpp"), expected, strict=True):
        assert torch.equal(own, other)
    assert torch.equal(awkward["x"], before)
    first, second = (  # the loop in two parts
        {k: v[part] if k == "coefficients" else v for k, v in given.items()}
        | dict(modulation=modulation._replace(by_step=modulation.by_step[part]))
        for part in (slice(0, 2), slice(2, STEPS))
    )
    x, x0 = functional.trajectory(**first, backend="cpp")
    again = functional.trajectory(**second | dict(x=x, x0=x0, first=2), backend="cpp")
    assert torch.equal(again[0], expected[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 5, 3)), r"x: expected shape \[2, 256, 3\], got \[2, 5, 3\]"),
        (dict(x0=torch.zeros(1, 256, 3)), r"x0: expected shape \[2, 256, 3\]"),
        (dict(coefficients=torch.zeros(6, 9)), r"coefficients: expected shape \[6, 10\]"),
        (dict(noise=torch.zeros(6, 2, 256, 3)), "noise: expected None where seeds are given"),
        (dict(seeds=torch.zeros(2, 2)), "seeds: expected int64"),
        (
            dict(x=torch.zeros(2, 256, 3).half()),
            "x: expected float32 or float64, got torch.float16",
        ),
        (dict(x0=torch.zeros(2, 256, 3).half()), "x0: expected x's dtype torch.float32"),
        (
            dict(weights=DiTWeights(DiTConfig(), (torch.zeros(7),))),
            "weights: expected 36 tensors, got 1",
        ),
        (
            dict(weights=DiTWeights(DiTConfig(), (torch.zeros(7),) * 36)),
            r"weights: expected shape \[64, 48\] at 0, got \[7\]",
        ),
        (dict(guidance=Guidance(2.0)), r"modulation.rows: expected shape \[4\], got \[2\]"),
        (dict(backend="c++"), "backend: expected one of reference, triton, cpp; got 'c\\+\\+'"),
        (
            dict(weights=DiTWeights.of(make_model()).to(torch.float16)),
            "backend: 'cpp' computes in float32 and bfloat16, got torch.float16",
        ),
        (dict(backend="triton"), "backend: 'triton' expects tensors on CUDA"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        functional.trajectory(**problem(DiTConfig(), 2) | dict(backend="cpp") | change)


def test_modulation_rows_that_do_not_fit_the_tables_are_an_error():
    given = problem(DiTConfig(), 2)
    modulation = given["modulation"]._replace(rows=torch.tensor([0, 1], dtype=torch.int32))
    with pytest.raises(ValueError, match="modulation.rows: expected int64, got torch.int32"):
        functional.trajectory(**given | dict(modulation=modulation))
    modulation = given["modulation"]._replace(rows=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"modulation.rows: expected values in \[0, 2\)"):
        functional.trajectory(**given | dict(modulation=modulation))


def test_the_checks_read_no_values_from_a_device():
    """A read would wait for the device's queue; "meta" tensors have no values to read."""
    given = problem(DiTConfig(), 2)
    a = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in given.items()}
    weights = given["weights"].to("meta")
    modulation = type(given["modulation"])(*(t.to("meta") for t in given["modulation"]))
    checks.check_trajectory(
        x=a["x"],
        x0=a["x0"],
        weights=weights,
        modulation=modulation,
        coefficients=a["coefficients"],
        seeds=a["seeds"],
        noise=None,
        guidance=None,
    )


def test_the_op_passes_opcheck():
    given = problem(DiTConfig(hidden=16, n_heads=2, n_layers=1), 2)
    sizes, eps = kernel_shape(given["weights"].cfg)
    by_step, by_label, rows = given["modulation"]
    torch.library.opcheck(
        torch.ops.fastdit.trajectory.default,
        (given["x"], given["x0"], list(given["weights"].tensors), [by_step, rows, by_label]),
        dict(
            coefficients=given["coefficients"],
            first=0,
            seeds=given["seeds"],
            noise=None,
            guidance=[],
            shape=[*sizes, *eps],
            backend="cpp",
        ),
    )
