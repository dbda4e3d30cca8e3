"""The trajectory kernel against the float64 loop: models, tables, solvers, guidance and noise."""

import math
import os
from dataclasses import dataclass, field

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from fastdit import DiT, noise  # noqa: E402
from fastdit.diffusion import DiffusionScheduler  # noqa: E402
from fastdit.kernels import trajectory as kernels  # noqa: E402
from fastdit.kernels.shape import Shape  # noqa: E402
from fastdit.kernels.trajectory_configs import trajectory_configs  # noqa: E402
from fastdit.ops.trajectory import (  # noqa: E402
    DiTWeights,
    Modulation,
    kernel_shape,
    plain_trajectory,
)
from fastdit.solvers import DDIM, DDPM, DPMSolverPP  # noqa: E402
from fastdit.testing import check_against_oracle, randomize, relative_error  # noqa: E402
from fastdit.update import Guidance  # noqa: E402

PIXELS = dict(n_layers=1)  # 16 tokens of 48 features, hidden 64, heads of 16
LATENTS = dict(  # 16 tokens of 16 features, heads of 32
    img_size=8,
    patch_size=2,
    in_channels=4,
    n_layers=1,
    n_heads=2,
    null_class=True,
    learn_sigma=True,
    gelu="tanh",
    modulation_act="silu",
    ln_eps=1e-6,
    mlp_ln_eps=1e-5,
)
LONG = dict(patch_size=2, n_layers=1)  # 64 tokens of 12 features


@dataclass
class Case:
    """A model, a batch, and the K = `steps` steps of a loop."""

    model: dict
    solver: object = field(default_factory=DDPM)
    steps: int = 2
    guidance: Guidance | None = None
    noise: str | None = "seeds"
    dtype: torch.dtype = torch.float32
    first: int = 0
    images: int | None = None  # None: as many as the error rule needs

    def __post_init__(self):
        model = DiT(**self.model)
        randomize(model)
        cfg, self.weights = model.cfg, DiTWeights.of(model).to(self.dtype)
        sizes, eps = kernel_shape(cfg)
        self.shape = Shape(*sizes, *eps)
        elements = self.shape.tokens * self.shape.features
        B = self.images or -(-4096 // elements)
        table = self.solver.table(DiffusionScheduler(T=50, schedule="cosine"), self.steps)
        K = len(table.timesteps)
        torch.manual_seed(0)
        x, x0 = torch.randn(2, B, elements // cfg.in_channels, cfg.in_channels)
        self.arguments = dict(
            x=x,
            x0=x0,
            coefficients=table.coefficients,
            first=self.first,
            seeds=torch.tensor([[7 * i - 3, i] for i in range(B)]),
            noise=torch.randn(K, *x.shape),
        ) | {name: None for name in ("seeds", "noise") if name != self.noise}
        self.modulation = self.tables(model, table.timesteps, B)

    @torch.no_grad()
    def tables(self, model, timesteps, B):
        """Return modulation for three labels, which images have in turn, and for a null label."""
        t = torch.tensor(timesteps)
        labels = torch.tensor([5, 0, 11, 16])[: 3 + model.cfg.null_class]
        rows = torch.arange(B) % 3
        if self.guidance is not None:
            rows = torch.cat([rows, torch.full((B,), 3)])
        if model.cfg.modulation_act == "none":
            both, one = model.modulation(t, labels[:1].expand(len(t))), labels[:1]
            by_label = model.modulation(t[:1].expand(len(labels)), labels)
            by_label = by_label - model.modulation(t[:1], one)
            return Modulation(both[:, None], by_label, rows)
        by_step = [model.modulation(step.expand(len(labels)), labels) for step in t]
        return Modulation(torch.stack(by_step), None, rows)

    def launch(self, device, config=None, **changed):
        arguments = self.arguments | dict(modulation=self.modulation) | changed
        on = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
        tables = [None if t is None else t.to(device) for t in on["modulation"]]
        guidance = self.guidance and (self.guidance.scale, self.guidance.channels)
        results = kernels.trajectory(
            on["x"],
            on["x0"],
            self.weights.packed.to(device),
            *tables,
            on["coefficients"],
            on["first"],
            on["seeds"],
            on["noise"],
            guidance,
            self.shape,
            config,
        )
        return [t.cpu() for t in results]

    def plain(self, dtype):
        """Run the reference loop entirely in dtype."""
        arguments = {
            k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in self.arguments.items()
        }
        if self.noise == "seeds" and dtype == torch.float64:
            arguments |= dict(seeds=None, noise=self.normal64())
        by_step, by_label, rows = self.modulation
        by_label = None if by_label is None else by_label.to(dtype)
        return plain_trajectory(
            weights=self.weights.to(dtype),
            modulation=Modulation(by_step.to(dtype), by_label, rows),
            guidance=self.guidance,
            **arguments,
        )

    def normal64(self):
        """Return `fastdit.noise`, computed in float64 from the float32 u and v on."""
        x, seeds = self.arguments["x"], self.arguments["seeds"]
        quads = torch.arange(x[0].numel() // 4)
        steps = torch.arange(len(self.arguments["coefficients"])) + self.first + 1
        counter = (quads, steps[:, None, None], seeds[:, 1:], torch.zeros_like(seeds[:, 1:]))
        r0, r1, r2, r3 = noise.philox4x32(counter, seeds[:, :1])
        pairs = []
        for a, b in ((r0, r1), (r2, r3)):
            u = (a.float() * 2**-32 + 2**-33).double()
            signed = torch.where(b >= 2**31, b - 2**32, b)
            angle = math.pi * signed.float().double() * 2**-31
            radius = torch.sqrt(-2 * torch.log(u))
            pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
        return torch.stack(pairs, dim=-1).view(len(steps), *x.shape)


CASES = {
    "seed-8-steps": dict(model=dict(n_layers=2), steps=8),
    "given-noise": dict(model=PIXELS, noise="noise"),
    "later-steps": dict(model=PIXELS, solver=DDIM(eta=0.5), first=2**31 - 3),
    "clipped": dict(model=PIXELS, solver=DDPM(clip=0.3)),
    "two-step-solver": dict(model=PIXELS, solver=DPMSolverPP(), steps=4, noise=None),
    "guided": dict(
        model=PIXELS | dict(null_class=True), solver=DDIM(), guidance=Guidance(2.0), noise=None
    ),
    "learned-range": dict(model=LATENTS),
    "guided-channels-learned-range": dict(model=LATENTS, guidance=Guidance(3.0, channels=3)),
    "64-tokens": dict(model=LONG),
    "hidden-128": dict(model=PIXELS | dict(hidden=128, n_heads=8), noise="noise"),
    "64-tokens-hidden-128-guided": dict(
        model=LATENTS | dict(img_size=16, hidden=128, n_heads=4), guidance=Guidance(3.0, channels=3)
    ),
    "bfloat16-weights": dict(model=PIXELS, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loop_meets_the_error_rule(name, device):
    case = Case(**CASES[name])
    oracle = case.plain(torch.float64)
    plain = case.plain(case.dtype if device.type == "cuda" else torch.float32)
    for triple in zip(case.launch(device), plain, oracle, strict=True):
        check_against_oracle(*triple)
        if case.dtype == torch.float32:
            assert relative_error(triple[0], triple[2]) < 1e-5


def assert_same_arithmetic(a, b):
    """Compare results of two kernels, which may be compiled to different fused multiply-adds.

    Interpreted, the bits must agree. Compiled, fewer than sixteen roundings of two steps differ.
    """
    assert torch.equal(a, b) if INTERPRETED else relative_error(a, b) < 16 * 2**-24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tables_in_the_weights_dtype_are_read_as_they_are(dtype, device):
    case = Case(PIXELS, images=2, steps=1)
    by_step, by_label, rows = case.modulation
    rounded = Modulation(by_step.to(dtype), by_label.to(dtype), rows)
    widened = Modulation(rounded.by_step.float(), rounded.by_label.float(), rows)
    results = [case.launch(device, modulation=tables) for tables in (rounded, widened)]
    for a, b in zip(*results, strict=True):
        assert_same_arithmetic(a, b)


def test_both_kinds_of_tables_give_the_same_images(device):
    case = Case(PIXELS, images=3)
    by_step, by_label, rows = case.modulation
    tables = Modulation(by_step + by_label, None, rows)
    for a, b in zip(case.launch(device, modulation=tables), case.launch(device), strict=True):
        assert_same_arithmetic(a, b)


def test_an_image_does_not_depend_on_its_batch(device):
    case = Case(LATENTS, guidance=Guidance(3.0, channels=3), images=3)
    together = case.launch(device)
    for i in range(3):
        alone = {k: case.arguments[k][i : i + 1] for k in ("x", "x0", "seeds")}
        tables = case.modulation._replace(rows=case.modulation.rows[i::3])
        for a, b in zip(case.launch(device, modulation=tables, **alone), together, strict=True):
            assert torch.equal(a[0], b[i])


@pytest.mark.parametrize("solver", [DDPM(), DPMSolverPP()], ids=["ddpm", "dpm++"])
def test_two_calls_in_succession_are_one(solver, device):
    case = Case(PIXELS, solver, steps=3, images=2)
    once = case.launch(device)
    x, x0, tables = case.arguments["x"], case.arguments["x0"], case.modulation
    before = x.clone(), x0.clone()
    for k in (slice(0, 2), slice(2, 3)):
        x, x0 = case.launch(
            device,
            x=x,
            x0=x0,
            first=k.start,
            coefficients=case.arguments["coefficients"][k],
            modulation=tables._replace(by_step=tables.by_step[k]),
        )
    for a, b in zip((x, x0), once, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(before[0], case.arguments["x"])  # nothing is written in place
    assert torch.equal(before[1], case.arguments["x0"])


def strided(t):
    """Return a view with the same values, in every other element of a transposed buffer."""
    buffer = torch.full((*t.shape[::-1], 2), 77 if t.dtype == torch.int64 else math.nan).to(t)
    view = buffer[..., 1].permute(*reversed(range(t.dim())))
    view.copy_(t)
    return view


@pytest.mark.parametrize("kind", ["seeds", "noise"])
def test_strides_do_not_matter(kind, device):
    case = Case(PIXELS, noise=kind, images=2)
    if kind == "noise":
        case.arguments["noise"][:, 1] = case.arguments["noise"][:, 0]
    packed = case.launch(device)
    tensors = {k: v for k, v in case.arguments.items() if torch.is_tensor(v)}
    views = {k: strided(v.to(device)) for k, v in tensors.items()}
    if kind == "noise":
        views["noise"] = case.arguments["noise"][:, :1].expand(-1, 2, -1, -1)
    tables = Modulation(*(strided(t.to(device)) for t in case.modulation))
    for a, b in zip(case.launch(device, modulation=tables, **views), packed, strict=True):
        assert torch.equal(a, b)


def test_nan_stays_in_its_image(device):
    case = Case(PIXELS, DDPM(clip=1.0), images=2)
    sound = case.launch(device)
    case.arguments["x"][1, 100, 1] = math.nan
    for a, b in zip(case.launch(device), sound, strict=True):
        assert torch.equal(a[0], b[0]) and a[1].isnan().all()


@pytest.mark.parametrize("model", [PIXELS, LONG], ids=["heads-together", "head-by-head"])
def test_great_scores_are_right_under_fused_multiply_adds(model, contracted, device):
    """With scores of 1e12, the rounding error that a fused product leaves would overflow exp2."""
    case = Case(model, images=1, steps=1)
    layer = case.weights.parts().layers[0]
    layer.qkv[:128].mul_(1e6)  # queries and keys
    for a, b in zip(case.launch(device), case.plain(torch.float64), strict=True):
        assert relative_error(a, b) < 1e-4


def test_a_last_step_adds_no_noise(device):
    case = Case(PIXELS, noise="noise", images=1)
    assert case.arguments["coefficients"][-1, 7] == 0
    case.arguments["noise"][-1] = math.nan
    assert all(t.isfinite().all() for t in case.launch(device))


@pytest.mark.parametrize("name", ["seed-8-steps", "64-tokens"])
def test_every_configuration_gives_the_same_images(name, device):
    case = Case(CASES[name]["model"], images=1)
    default = case.launch(device)
    configs = trajectory_configs(case.shape, torch.bfloat16, "sm_80")
    for config in configs[:1] if INTERPRETED else configs:
        for a, b in zip(case.launch(device, config), default, strict=True):
            assert relative_error(a, b.double()) < 1e-6


def test_nothing_is_launched_for_an_empty_batch(device):
    case = Case(PIXELS, images=1)
    empty = {k: case.arguments[k][:0] for k in ("x", "x0", "seeds")}
    tables = case.modulation._replace(rows=case.modulation.rows[:0])
    results = case.launch(device, modulation=tables, **empty)
    assert [list(t.shape) for t in results] == [[0, 256, 3]] * 2


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (dict(hidden=96, heads=6), "takes a hidden size of 64 or 128, got 96"),
        (dict(tokens=256), "takes 16 or 64 tokens, got 256"),
        (dict(heads=1), "takes head dims of 16 or 32, got 64"),
        (dict(features=68), "takes up to 64 features of a token, a multiple of 4, got 68"),
        (dict(features=27), "takes up to 64 features of a token, a multiple of 4, got 27"),
        (dict(rms=True), "takes no RMSNorms"),
        (dict(block_parts=4), "takes no modulation without shifts"),
        (dict(qk_norm=2), "takes no norms of queries and keys"),
        (dict(rope=True), "takes no rotary positions"),
        (dict(swiglu=True), "takes no SwiGLU"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_a_model_it_cannot_run_is_refused(changed, words, device):
    case = Case(PIXELS, images=1)
    assert kernels.obstacle(case.shape) is None
    case.shape = case.shape._replace(**changed)
    assert kernels.obstacle(case.shape) == words
    with pytest.raises(ValueError, match="^shape: the trajectory " + words):
        case.launch(device)
