"""The whole loop as one op of C++: its numbers, its bits, and what it takes."""

import math
from dataclasses import replace

import pytest
import torch

import fastdit
from fastdit import (
    DiffusionScheduler,
    DiTConfig,
    Guidance,
    Sampler,
    backends,
    choice,
    engine,
    functional,
    noise,
    reference,
)
from fastdit.conditioning import ModulationTables
from fastdit.kernels import cpu
from fastdit.packed import PackedDiT
from fastdit.solvers import DDPM, SOLVERS
from fastdit.testing import check_against_oracle, randomize, relative_error

STEPS = 6
ODD = DiTConfig(img_size=15, patch_size=3, hidden=50, n_heads=5, n_layers=2)  # 25 tokens of 27
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
    "wide": (DiTConfig(img_size=32, hidden=512, n_heads=8, n_layers=1, gelu="tanh"), None),
    "long": (DiTConfig(img_size=64, patch_size=4, hidden=33, n_heads=3, n_layers=1), None),
    "guided-team": (replace(GUIDED, hidden=96), Guidance(2.0)),
    "guided": (GUIDED, Guidance(3.0, channels=3)),
    "all-channels": (GUIDED, Guidance(0.5)),
}


def make_model(cfg=None):
    model = fastdit.DiT.from_config(cfg or DiTConfig())
    randomize(model)
    return model.requires_grad_(False)


def problem(cfg, B, guidance=None, solver=SOLVERS["ddpm"], dtype=torch.float32, noise="seeds"):
    """The arguments of `functional.trajectory` for a whole loop."""
    model = make_model(cfg).to(dtype)
    table = solver.table(DiffusionScheduler(STEPS, schedule="cosine"))
    labels = [i % 3 for i in range(B)] + ([cfg.num_classes] * B if guidance else [])
    tables = ModulationTables(model, table.timesteps, 2**30).serve(labels)
    S, P, C = len(table.timesteps), cfg.img_size**2, cfg.in_channels
    z = torch.randn(S + 1, B, P, C, generator=torch.Generator().manual_seed(1)).to(dtype)
    return dict(
        x=z[0],
        x0=torch.zeros_like(z[0]),
        packed=PackedDiT.of(model),
        modulation=tables.steps(0, S, len(labels)),
        coefficients=table.coefficients.to(dtype),
        seeds=torch.tensor([[2**40 + 7, i] for i in range(B)]) if noise == "seeds" else None,
        noise=z[1:] if noise == "noise" else None,
        guidance=guidance,
    )


def launch(arguments, **options):
    """The C++ launcher itself, which can be told an instruction set."""
    a = dict(arguments)
    guidance = a["guidance"] and (a["guidance"].scale, a["guidance"].channels)
    sizes, eps = backends.sizes_of(a["packed"].cfg)
    shape = cpu.Shape(*sizes[:-1], bool(sizes[-1]), *eps)
    return cpu.trajectory(
        *(a["x"], a["x0"], a["packed"].weights, *a["modulation"], a["coefficients"]),
        *(a.get("first", 0), a["seeds"], a["noise"], guidance, shape),
        **options,
    )


def instruction_sets():
    best = ["plain", "avx2", "avx512"].index(cpu.instruction_set())
    return ["plain", "avx2", "avx512"][: best + 1]


@pytest.mark.parametrize(("cfg", "guidance"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("noise", ["seeds", "noise"])
def test_every_instruction_set_obeys_the_error_rule(cfg, guidance, noise):
    B = math.ceil(4096 / (cfg.img_size**2 * cfg.in_channels))
    given = problem(cfg, B, guidance, noise=noise)
    plain = functional.trajectory(**given, backend="reference")
    oracle = functional.trajectory(**problem(cfg, B, guidance, dtype=torch.float64, noise=noise))
    for name in instruction_sets():
        for own, other, exact in zip(
            launch(given, instruction_set=name), plain, oracle, strict=True
        ):
            check_against_oracle(own, other, exact)


@pytest.mark.parametrize("solver", [*SOLVERS.values(), DDPM(clip=0.5)], ids=[*SOLVERS, "clipped"])
def test_every_solver_obeys_the_error_rule(solver):
    given = problem(GUIDED, 3, Guidance(2.0), solver)
    exact = problem(GUIDED, 3, Guidance(2.0), solver, torch.float64)
    check_against_oracle(
        functional.trajectory(**given, backend="cpp")[0],
        functional.trajectory(**given, backend="reference")[0],
        functional.trajectory(**exact)[0],
    )


def test_all_200_steps_are_the_reference_loops():
    batch = 3
    model, scheduler = make_model(), DiffusionScheduler(200, schedule="cosine")
    plain = reference.DiT.from_config(model.cfg)
    plain.load_state_dict(model.state_dict())
    z = torch.randn(201, batch, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(batch) % 16
    images = Sampler(model, scheduler, execution="trajectory")(labels, x_T=z[0], noise=z[1:])
    loop = reference.sample(plain, scheduler, z[0], labels, z[1:])
    exact = reference.sample(plain.double(), scheduler, z[0].double(), labels, z[1:].double())
    assert relative_error(images, loop) < 1e-5
    assert relative_error(images, exact) < 1e-5


@pytest.mark.parametrize(("cfg", "guidance"), SHAPES.values(), ids=SHAPES.keys())
def test_an_image_has_the_same_bits_in_any_batch_order_and_threads(cfg, guidance):
    """Images in lockstep, alone, shared by a team of threads: no sum depends on which."""
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
        return launch(given, instruction_set=name)[0]

    try:
        for name in instruction_sets():
            expected = part(torch.arange(11), 1, name)
            for threads in (1, 2, 3, 8):
                order = torch.randperm(11, generator=torch.Generator().manual_seed(threads))
                assert torch.equal(part(order, threads, name), expected[order])
                for i in (0, 7):
                    assert torch.equal(part(torch.tensor([i]), threads, name)[0], expected[i])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("cfg", [DiTConfig(), replace(GUIDED, hidden=96)], ids=["split", "silu"])
def test_a_samplers_image_has_the_same_bits_beside_any_others(cfg):
    """Its modulation too: tables of other labels, other numbers of threads, other bounds."""
    before = torch.get_num_threads()
    model, scheduler = make_model(cfg), DiffusionScheduler(7, schedule="cosine")
    row = (6 * cfg.n_layers + 2) * cfg.hidden * 4
    images = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for labels in ([3], [3, 0], [3, 0, 5], [3, *range(10)]):
                for table_bytes in (2**30, 40 * row):
                    sampler = Sampler(
                        model, scheduler, execution="trajectory", table_bytes=table_bytes
                    )
                    images.append(sampler(labels, seeds=range(5, 5 + len(labels)))[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(image, images[0]) for image in images)


def test_a_loop_in_parts_has_the_bits_of_the_whole(monkeypatch):
    """Cut by the tables' memory, by an interval of guidance, by the length of a call."""
    scheduler, calls = DiffusionScheduler(12, schedule="cosine"), []
    real = functional.trajectory

    def counted(*args, **options):
        calls.append((args[5], len(args[4]), options["guidance"] is not None))
        return real(*args, **options)

    monkeypatch.setattr(functional, "trajectory", counted)
    sampler = Sampler(make_model(), scheduler, execution="trajectory")
    whole = sampler([3, 0, 5], seed=1)
    assert calls == [(0, 12, False)]
    row = (6 * 4 + 2) * 64 * 4
    small = Sampler(sampler.model, scheduler, execution="trajectory", table_bytes=9 * row)
    assert torch.equal(small([3, 0, 5], seed=1), whole) and len(calls) > 3
    calls.clear()
    monkeypatch.setattr(engine, "_CALL_FLOP", 5 * 3 * 6.8e6)
    monkeypatch.setattr(engine, "_CALL_FLOP_PER_WEIGHT", 0)
    assert torch.equal(sampler([3, 0, 5], seed=1, progress=True), whole)
    assert [count for _, count, _ in calls] == [5, 5, 2]
    calls.clear()
    monkeypatch.undo()
    monkeypatch.setattr(functional, "trajectory", counted)
    guided = dict(guidance=Guidance(2.0, interval=(3, 8)))
    model = make_model(GUIDED)
    images = Sampler(model, scheduler, execution="trajectory", **guided)([1, 2])
    assert calls == [(0, 4, False), (4, 5, True), (9, 3, False)]
    assert (
        relative_error(images, Sampler(model, scheduler, execution="eager", **guided)([1, 2]))
        < 1e-5
    )


def test_nan_and_infinity_come_out_as_the_reference_has_them():
    for bad in (math.nan, math.inf):
        given = problem(DiTConfig(), 3)
        given["x"][1, 5, 0] = bad
        x, _ = functional.trajectory(**given, backend="cpp")
        assert not x[1].isfinite().any() and x[0].isfinite().all() and x[2].isfinite().all()
    for index in range(0, len(given["packed"].weights), 9973):  # one weight of each kind
        given = problem(DiTConfig(), 3)
        given["packed"].weights[index] = math.nan
        assert functional.trajectory(**given, backend="cpp")[0].isnan().any()


def test_denormals_cost_nothing_and_stay_the_callers():
    given = problem(DiTConfig(), 2)
    tiny = given | dict(x=given["x"] * 1e-40, coefficients=given["coefficients"] * 1e-38)
    assert functional.trajectory(**tiny, backend="cpp")[0].isfinite().all()
    assert (torch.tensor([1e-39]) * 0.5 > 0).all(), "denormals are flushed in the whole process"


def test_any_strides_and_dtypes_of_the_tables_will_do():
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
    first, second = (  # in two parts, the second told how many steps were before
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
            dict(packed=PackedDiT(DiTConfig(), torch.zeros(7))),
            r"packed.weights: expected shape \[206128\], got \[7\]",
        ),
        (dict(guidance=Guidance(2.0)), r"modulation.rows: expected shape \[4\], got \[2\]"),
        (dict(backend="c++"), "backend: expected one of reference, triton, cpp; got 'c\\+\\+'"),
        (
            dict(packed=PackedDiT(DiTConfig(), torch.zeros(206128).bfloat16())),
            "backend: 'cpp' computes in float32, got torch.bfloat16",
        ),
        (dict(backend="triton"), "backend: 'triton' expects tensors on CUDA"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        functional.trajectory(**problem(DiTConfig(), 2) | dict(backend="cpp") | change)


def test_rows_past_the_tables_are_an_error():
    given = problem(DiTConfig(), 2)
    modulation = given["modulation"]._replace(rows=torch.tensor([0, 1], dtype=torch.int32))
    with pytest.raises(ValueError, match="modulation.rows: expected int64, got torch.int32"):
        functional.trajectory(**given | dict(modulation=modulation))
    modulation = given["modulation"]._replace(rows=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"modulation.rows: expected values in \[0, 2\)"):
        functional.trajectory(**given | dict(modulation=modulation))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(hidden=516, n_layers=1), "takes a hidden size up to 512, got 516"),
        (dict(img_size=68, n_layers=1), "takes up to 256 tokens, got 289"),
    ],
)
def test_a_model_too_large_is_refused_by_name_and_sampled_otherwise(options, message):
    model, scheduler = make_model(DiTConfig(**options)), DiffusionScheduler(2)
    with pytest.raises(ValueError, match=f"execution: 'trajectory' {message}; use 'auto'"):
        Sampler(model, scheduler, execution="trajectory")
    assert Sampler(model, scheduler).execution_for() == "eager"


def test_auto_reads_weights_alone_only_where_nothing_else_is_there():
    def by_hook(model):
        model.blocks[0].mlp.register_forward_hook(lambda module, inputs, out: 2 * out)

    def by_module(model):
        model.blocks[0].mlp[1] = torch.nn.SiLU()

    def by_attribute(model):
        model.blocks[1].eps = 1e-2

    def by_method(model):
        denoise = model.denoise
        model.denoise = lambda *args: 2 * denoise(*args)

    scheduler = DiffusionScheduler(3, schedule="cosine")

    def by_private_method(model):
        run = model.blocks[0]._run
        model.blocks[0]._run = lambda *args: run(*(2 * a for a in args))

    def by_shape(model):
        mlp = model.blocks[0].mlp
        mlp[0].weight = torch.nn.Parameter(mlp[0].weight[:200])
        mlp[0].bias = torch.nn.Parameter(mlp[0].bias[:200])
        mlp[2].weight = torch.nn.Parameter(mlp[2].weight[:, :200])

    def by_bias(model):
        model.blocks[0].mlp[0].bias = None

    changes = (by_hook, by_module, by_attribute, by_method, by_private_method, by_shape, by_bias)
    for alter in changes:
        model = make_model()
        sampler = Sampler(model, scheduler)
        named = Sampler(model, scheduler, execution="trajectory")
        plain = sampler([1, 2])
        assert sampler.execution_for() == "trajectory"
        alter(model)
        assert sampler.execution_for() == "eager"
        assert relative_error(sampler([1, 2]), plain) > 1e-5
        with pytest.raises(ValueError, match="'trajectory' reads a fastdit.DiT's weights alone"):
            named([1, 2])


def test_auto_is_float32_on_a_cpu_and_unwatched():
    model, scheduler = make_model(), DiffusionScheduler(3, schedule="cosine")
    sampler, seen = Sampler(model, scheduler), []
    assert sampler.execution_for() == "trajectory"
    assert sampler.execution_for(watched=True) == "eager"
    images = sampler([1, 2], progress=lambda k, x0: seen.append(k))
    assert seen == [0, 1, 2] and relative_error(sampler([1, 2]), images) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert sampler.execution_for() == "eager"
    assert Sampler(model.double(), scheduler).execution_for() == "eager"


def test_a_trajectory_shows_no_x0_and_says_so():
    sampler = Sampler(make_model(), DiffusionScheduler(3), execution="trajectory")
    with pytest.raises(ValueError, match="progress: execution='trajectory' shows no x0"):
        sampler([1], progress=lambda k, x0: None)
    with torch.inference_mode():
        inside = sampler([3, 1])
    assert torch.equal(sampler([3, 1]), inside)


def test_the_op_passes_opcheck():
    given = problem(DiTConfig(hidden=16, n_heads=2, n_layers=1), 2)
    sizes, eps = backends.sizes_of(given["packed"].cfg)
    torch.library.opcheck(
        torch.ops.fastdit.trajectory.default,
        (
            *(given["x"], given["x0"], given["packed"].weights, *given["modulation"]),
            *(given["coefficients"], 0, given["seeds"], None, None, None, sizes, eps, "cpp"),
        ),
    )


@pytest.mark.parametrize("layout", ["tokens", "images"])
@pytest.mark.parametrize("learned", [False, True], ids=["eps", "learned"])
@pytest.mark.parametrize("guidance", [None, Guidance(3.5), Guidance(2.5, channels=2)], ids=str)
def test_an_update_by_itself_obeys_the_error_rule(layout, learned, guidance):
    """Columns as reference.COEFFICIENTS; row 1 clips, row 2 is a last step."""
    B, C = 4, 3
    shape = [B, 21 * 17, C] if layout == "tokens" else [B, C, 21, 17]
    out_shape = list(shape)
    out_shape[0] *= 2 if guidance else 1
    out_shape[2 if layout == "tokens" else 1] *= 2 if learned else 1
    rows = [
        (1.1, -0.4, math.inf, 0.7, -0.2, 0.3, 0.4, 0.8, -2.0, -1.0),
        (1.3, -0.7, 1.25, 0.4, 0.3, 0.5, -0.2, 0.6, -1.5, -0.5),
        (1.3, -0.7, math.inf, 0.4, 0.3, 0.5, -0.2, 0.0, -math.inf, -0.5),
    ]
    torch.manual_seed(0)
    x, x0_prev, z = torch.randn(3, *shape)
    model_out, seeds = torch.randn(out_shape), torch.tensor([[2**40 + 5, i] for i in range(B)])
    coefficients = torch.tensor(rows)
    for step in range(3):
        for prev, given in ((x0_prev, dict(seeds=seeds)), (None, dict(noise=z)), (None, {})):
            wide = {k: v.double() if k == "noise" else v for k, v in given.items()}
            oracle = functional.sampler_update(
                *(x.double(), model_out.double(), coefficients.double(), step),
                *(None if prev is None else prev.double(),),
                guidance=guidance,
                **wide,
            )
            own, plain = (
                functional.sampler_update(
                    *(x, model_out, coefficients, step, prev),
                    guidance=guidance,
                    backend=backend,
                    **given,
                )
                for backend in ("cpp", "reference")
            )
            for a, b, exact in zip(own, plain, oracle, strict=True):
                check_against_oracle(a, b, exact)
    by_default = functional.sampler_update(
        *(x, model_out, coefficients, 2, None), guidance=guidance
    )
    assert torch.equal(by_default[0], own[0])
    x.requires_grad_()
    with_gradient = functional.sampler_update(*(x, model_out, coefficients, 2), guidance=guidance)
    assert with_gradient[0].requires_grad
    with pytest.raises(ValueError, match="backend: 'cpp' expects a float32 state on a CPU"):
        functional.sampler_update(
            *(x.double(), model_out, coefficients, 0), guidance=guidance, backend="cpp"
        )


def test_the_rule_of_auto_is_said_in_words():
    assert choice.rule(DiTConfig()).endswith(
        "on a CPU 'trajectory' in float32, 'eager' in other dtypes"
    )
    assert "takes a hidden size up to 512, got 1152" in choice.rule(fastdit.PRESETS["DiT-XL/2"])


def test_noise_and_updates_are_float32_whatever_the_default_dtype():
    seeds, steps = torch.tensor([[7, 0], [-(2**40), 2**32 - 1]]), torch.tensor([0, 3])
    expected = noise.normal(seeds, steps, 45)
    given = problem(DiTConfig(), 1)
    x, out = given["x"], torch.ones_like(given["x"])
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            own = functional.normal(seeds, steps, 45)
            past = cpu.sampler_update(x, out, given["coefficients"], torch.tensor(99))
        finally:
            torch.set_default_dtype(torch.float32)
        assert own.dtype == torch.float32 and relative_error(own, expected) < 1e-6
        assert past[0].isnan().all() and past[1].isnan().all()
    assert torch.equal(own, functional.normal(seeds.t().contiguous().t(), steps, 45))


@pytest.mark.parametrize(
    ("seeds", "steps", "message"),
    [
        (torch.zeros(2, 2), torch.zeros(1).long(), r"seeds: expected int64 of shape \[B, 2\]"),
        (torch.zeros(2).long(), torch.zeros(1).long(), r"seeds: expected int64 of shape"),
        (torch.zeros(2, 2).long(), torch.zeros(1).int(), r"steps: expected int64 of shape \[S\]"),
    ],
)
def test_noise_of_bad_seeds_is_an_error(seeds, steps, message):
    with pytest.raises(ValueError, match=message):
        functional.normal(seeds, steps, 4)


def test_a_learned_range_that_overflows_is_infinite():
    """As the reference has it; a wrapped exponent would be a finite, wrong image."""
    x, z = torch.zeros(1, 64, 3), torch.ones(1, 64, 3)
    row = torch.tensor([[1.0, 0, math.inf, 1, 0, 0, 0, 1, 0, 200]])
    for v, high in ((1.0, 200), (-1.0, 200), (0.7, 100)):
        row[0, 9] = high
        out = torch.cat([x, torch.full_like(x, v)], dim=2)
        own, plain = (
            functional.sampler_update(x, out, row, 0, noise=z, backend=backend)[0]
            for backend in ("cpp", "reference")
        )
        assert torch.equal(own.isinf(), plain.isinf())
        assert plain.isinf().all() or torch.allclose(own, plain, rtol=1e-5)
