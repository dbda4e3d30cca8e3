"""The options of newer blocks in the C++ trajectory: accuracy, bits, and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch

from fastdit import DiffusionScheduler, DiTConfig, Guidance, functional
from fastdit.kernels import cpu
from fastdit.ops import definitions, dispatch
from fastdit.ops.trajectory import DiTWeights, Modulation, kernel_shape
from fastdit.reference import rope_table
from fastdit.solvers import SOLVERS
from fastdit.testing import check_against_oracle

STEPS = 3
# 15 tokens of 16 features, which fill no whole vector
SMALL = DiTConfig(img_size=(6, 10), patch_size=2, in_channels=4, hidden=12, n_heads=3, n_layers=2)
NEW = dict(norm="rms", modulation_shift=False, rope=True, mlp="swiglu")
LAYER, RMS = NEW | dict(qk_norm="layer"), NEW | dict(qk_norm="rms")
FAR = replace(SMALL, img_size=5, patch_size=1, in_channels=16, hidden=144, n_heads=2, n_layers=1)
OPTIONS = dict(
    rms=dict(norm="rms", ln_eps=1e-2, mlp_ln_eps=1e-4),
    no_shift=dict(modulation_shift=False),
    qk_layer=dict(qk_norm="layer", qk_norm_eps=1e-3),
    qk_rms=dict(qk_norm="rms", qk_norm_eps=1e-3),
    rope=dict(rope=True),
    swiglu=dict(mlp="swiglu"),
    all_layer=LAYER,
    all_rms=RMS,
)
CASES = {name: (replace(SMALL, **options), None) for name, options in OPTIONS.items()} | {
    "guided": (replace(SMALL, **RMS, learn_sigma=True), Guidance(2.0, channels=3)),
    "odd-mlp": (replace(SMALL, **RMS, hidden=8, n_heads=2), Guidance(2.0)),  # 21 wide
    "odd-slice": (replace(SMALL, mlp="swiglu", hidden=20, n_heads=5), None),  # 53 wide
    "one-head": (replace(SMALL, **LAYER, img_size=2, hidden=4, n_heads=1, n_layers=1), None),
    "far-weights": (replace(FAR, **RMS), None),  # head dim 72
    "threads-a-slice": (replace(FAR, **LAYER, patch_size=1, hidden=192, n_heads=3), Guidance(2.0)),
}
HAS_BFLOAT16 = torch.cpu.get_capabilities().get("avx512_bf16", False)


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors are faster so, and no bit depends on it, as one of the tests shows."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_weights(cfg, generator):
    """Return weights that keep activations of order one, in float64."""
    tensors = []
    for shape in DiTWeights(cfg, ()).shapes():
        z = torch.randn(shape, generator=generator, dtype=torch.float64)
        tensors.append(z * shape[1] ** -0.5 if len(shape) == 2 else 1 + 0.2 * z)
    if cfg.rope:
        tensors[-1] = rope_table(cfg.head_dim, cfg.grid)
    return DiTWeights(cfg, tuple(tensors))


def problem(cfg, B, guidance=None, seed=0):
    """Return the arguments of `functional.trajectory` for a whole loop in float64."""
    generator = torch.Generator().manual_seed(seed)
    C, H, W = cfg.sample_shape
    rows = 2 * B if guidance else B
    shape = kernel_shape(cfg)
    width = definitions._shape([*shape[0], *shape[1]]).width
    table = SOLVERS["ddpm"].table(DiffusionScheduler(STEPS, schedule="cosine"))

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return dict(
        x=normal(B, H * W, C).float().double(),
        x0=torch.zeros(B, H * W, C, dtype=torch.float64),
        weights=random_weights(cfg, generator),
        modulation=Modulation(
            0.3 * normal(STEPS, 1, width), 0.3 * normal(5, width), torch.arange(rows) % 5
        ),
        coefficients=table.coefficients.double(),
        seeds=torch.tensor([[2**40 + 7, i] for i in range(B)]),
        guidance=guidance,
    )


def rounded(given, dtype=torch.float32):
    """Return the arguments in float32, with weights and tables in `dtype`."""
    tables = [t.to(dtype) for t in given["modulation"][:2]]
    single = {name: given[name].float() for name in ("x", "x0", "coefficients")}
    modulation = Modulation(*tables, given["modulation"].rows)
    return given | single | dict(weights=given["weights"].to(dtype), modulation=modulation)


def launch(given, **options):
    """Call the C++ launcher directly, since `instruction_set` is an option of it alone."""
    a = dict(given)
    guidance, modulation = a.pop("guidance"), a.pop("modulation")
    sizes, eps = kernel_shape(a["weights"].cfg)
    return cpu.trajectory(
        **a | dict(weights=a["weights"].tensors),
        **modulation._asdict(),
        first=0,
        noise=None,
        guidance=guidance and (guidance.scale, guidance.channels),
        shape=definitions._shape([*sizes, *eps]),
        **options,
    )


def enough(cfg):
    """Return the number of images that the error rule needs."""
    return math.ceil(4096 / math.prod(cfg.sample_shape))


@pytest.mark.parametrize(("cfg", "guidance"), CASES.values(), ids=CASES.keys())
def test_every_instruction_set_obeys_the_error_rule(cfg, guidance):
    exact = problem(cfg, enough(cfg), guidance)
    given = rounded(exact)
    plain = functional.trajectory(**given, backend="reference")
    oracle = functional.trajectory(**exact)
    for name in cpu.instruction_sets():
        for results in zip(launch(given, instruction_set=name), plain, oracle, strict=True):
            check_against_oracle(*results)
    assert all(map(torch.equal, functional.trajectory(**given, backend="cpp"), launch(given)))


@pytest.mark.skipif(not HAS_BFLOAT16, reason="needs AVX512-BF16")
@pytest.mark.parametrize(("cfg", "guidance"), CASES.values(), ids=CASES.keys())
def test_bfloat16_obeys_the_error_rule(cfg, guidance):
    exact = problem(cfg, enough(cfg), guidance)
    given = rounded(exact, torch.bfloat16)
    plain = functional.trajectory(**given, backend="reference")
    oracle = functional.trajectory(**exact)
    own = functional.trajectory(**given, backend="cpp")
    for results in zip(own, plain, oracle, strict=True):
        check_against_oracle(*results)


@pytest.mark.parametrize(("cfg", "guidance"), CASES.values(), ids=CASES.keys())
def test_an_image_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(cfg, guidance):
    full = rounded(problem(cfg, 5, guidance))

    def part(chosen, threads, name):
        torch.set_num_threads(threads)
        modulation = full["modulation"]
        rows = torch.cat([r[chosen] for r in modulation.rows.split(5)])
        own = {key: full[key][chosen] for key in ("x", "x0", "seeds")}
        given = full | own | dict(modulation=modulation._replace(rows=rows))
        if name == "bfloat16":
            return launch(given | dict(weights=low))[0]
        return launch(given, instruction_set=name)[0]

    low = full["weights"].to(torch.bfloat16)
    for name in [*cpu.instruction_sets(), *["bfloat16"] * HAS_BFLOAT16]:
        expected = part(torch.arange(5), 1, name)
        for threads in (1, 2, 3, 8):
            order = torch.randperm(5, generator=torch.Generator().manual_seed(threads))
            assert torch.equal(part(order, threads, name), expected[order])
            assert torch.equal(part(torch.tensor([3]), threads, name)[0], expected[3])


def test_silu_is_right_everywhere():
    """The features of the MLP are the same for every token, and go through all of its range."""
    cfg = replace(SMALL, mlp="swiglu", hidden=48, n_layers=1)
    for start in (-120.0, -20.0, -3.0, 0.0, 10.0, 80.0):
        exact = problem(cfg, enough(cfg))
        layer = exact["weights"].parts().layers[0]
        layer.fc1.zero_()
        layer.fc1_bias[: cfg.mlp_hidden] = torch.linspace(start, start + 20, cfg.mlp_hidden)
        # The products of the two halves are then of order one for all arguments.
        layer.fc1_bias[cfg.mlp_hidden :] = 1 / (1 + layer.fc1_bias[: cfg.mlp_hidden].abs())
        given = rounded(exact)
        plain = functional.trajectory(**given, backend="reference")
        oracle = functional.trajectory(**exact)
        for name in cpu.instruction_sets():
            for results in zip(launch(given, instruction_set=name), plain, oracle, strict=True):
                check_against_oracle(*results)


@pytest.mark.parametrize("options", [LAYER, RMS], ids=["layer", "rms"])
def test_the_last_element_of_every_weight_reaches_the_output(options):
    cfg = replace(SMALL, **options)
    for index in range(len(DiTWeights(cfg, ()).shapes())):
        given = rounded(problem(cfg, 1))
        given["weights"].tensors[index].view(-1)[-1] = math.nan
        assert functional.trajectory(**given, backend="cpp")[0].isnan().any(), index


def test_context_tokens_and_bottlenecks_are_refused():
    for cfg, phrase in (
        (replace(SMALL, context_tokens=2), "takes no context tokens"),
        (replace(SMALL, patch_bottleneck=3), "takes no bottleneck of patches"),
    ):
        cpu_device = torch.device("cpu")
        for dtype in (torch.float32, torch.bfloat16):
            assert dispatch.obstacle("trajectory", "cpp", cfg, cpu_device, dtype) == phrase
        given = rounded(problem(SMALL, 1))
        weights = DiTWeights(cfg, given["weights"].tensors)
        with pytest.raises(ValueError, match="weights: expected those of a model without context"):
            functional.trajectory(**given | dict(weights=weights, backend="reference"))


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (dict(norm="rms"), "takes no RMSNorms"),
        (dict(modulation_shift=False), "takes no modulation without shifts"),
        (dict(qk_norm="layer"), "takes no norms of queries and keys"),
        (dict(qk_norm="rms"), "takes no norms of queries and keys"),
        (dict(rope=True), "takes no rotary positions"),
        (dict(mlp="swiglu"), "takes no SwiGLU"),
    ],
)
def test_the_kernel_in_triton_refuses_every_option(options, phrase):
    assert definitions.trajectory_obstacle(*kernel_shape(DiTConfig())) is None
    assert definitions.trajectory_obstacle(*kernel_shape(DiTConfig(**options))) == phrase


def test_only_a_rotary_table_may_have_another_dtype():
    cfg = replace(SMALL, **RMS)
    weights = rounded(problem(cfg, 1))["weights"]
    low = weights.to(torch.bfloat16)
    assert low.tensors[-1].dtype == torch.float32 and low.dtype == torch.bfloat16
    assert torch.equal(low.tensors[-1], weights.tensors[-1])
    given = rounded(problem(cfg, 1))
    mixed = DiTWeights(cfg, (*low.tensors[:-2], *weights.tensors[-2:]))
    with pytest.raises(ValueError, match="weights: expected one dtype and device"):
        functional.trajectory(**given | dict(weights=mixed))
    for short, message in (
        (weights.tensors[:-1], "weights: expected 30 tensors, got 29"),
        ((*weights.tensors[:-1], torch.ones(2, 15, 3)), r"expected shape \[2, 15, 2\] at 29"),
    ):
        with pytest.raises(ValueError, match=message):
            functional.trajectory(**given | dict(weights=DiTWeights(cfg, short)))
