"""The sampler_update kernel against float64, and the words of its noise against `fastdit.noise`."""

import dataclasses
import math
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from fastdit import noise, reference  # noqa: E402
from fastdit.kernels import sampling  # noqa: E402
from fastdit.testing import check_against_oracle  # noqa: E402
from fastdit.update import Guidance  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
SEEDS = [[7, 0], [-(2**62) + 11, 2**32 - 1], [2**40 + 5, 3]]  # one for each image
# Columns as in update.COEFFICIENTS: row 1 clips, row 2 is a last step, row 3 uses all columns.
ROWS = [
    (9.0,) * 10,
    (1.3, -0.7, 1.25, 0.4, 0.3, 0.5, -0.2, 0.6, -1.5, -0.5),
    (1.3, -0.7, math.inf, 0.4, 0.3, 0.5, -0.2, 0.0, -math.inf, -0.5),
    (1.1, -0.4, math.inf, 0.7, -0.2, 0.3, 0.4, 0.8, -2.0, -1.0),
]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOKENS4, TOKENS3 = (3, 343, 4), (3, 463, 3)  # 1372 and 1389 elements an image
IMAGES3, IMAGES4, TINY = (3, 3, 21, 22), (3, 4, 20, 18), (60, 23, 3)  # 1386, 1440 and 69


@dataclasses.dataclass
class Case:
    shape: tuple
    dtype: torch.dtype = F32
    model_dtype: torch.dtype = F32
    guided: int | None = None  # number of channels; 0: all of them
    learned: bool = False
    prev: bool = False
    noise: str | None = "seeds"
    step: int = 1

    def __str__(self):
        names = (str(d).removeprefix("torch.") for d in (self.dtype, self.model_dtype))
        guided = "" if self.guided is None else f"guided{self.guided or ''}"
        flags = ("learned" * self.learned, "prev" * self.prev, self.noise or "", f"step{self.step}")
        shape = "x".join(map(str, self.shape))
        return "-".join(filter(None, (shape, *names, guided, *flags)))

    def arguments(self):
        """Return the launcher's arguments without guidance, on the CPU."""
        torch.manual_seed(0)
        B, dim = self.shape[0], 1 if len(self.shape) == 4 else 2
        model_shape = list(self.shape)
        model_shape[dim] *= 1 + self.learned
        model_shape[0] *= 1 if self.guided is None else 2
        x, prev, z = torch.randn(3, *self.shape).to(self.dtype)
        seeds = [[SEEDS[i % 3][0] + i // 3, SEEDS[i % 3][1]] for i in range(B)]
        return dict(
            x=x,
            model_out=torch.randn(model_shape).to(self.model_dtype),
            coefficients=torch.tensor(ROWS),
            step=torch.tensor(self.step),
            x0_prev=prev if self.prev else None,
            seeds=torch.tensor(seeds),
            noise=z,
        ) | {name: None for name in ("seeds", "noise") if name != self.noise}

    @property
    def guidance(self):
        return None if self.guided is None else Guidance(3.5, channels=self.guided or None)


def launch(arguments, guidance=None, **options):
    moved = {k: None if v is None else v.to(DEVICE) for k, v in arguments.items()}
    pair = guidance and (guidance.scale, guidance.channels)
    return [t.cpu() for t in sampling.sampler_update(**moved, guidance=pair, **options)]


def words_of(seeds, step, elements):
    key, stream = seeds[:, :1], seeds[:, 1:]
    quads = torch.arange(-(-elements // 4))
    counter = (quads, torch.tensor(step), stream, torch.zeros_like(stream))
    return torch.stack(noise.philox4x32(counter, key), dim=-1)  # [B, quads, 4]


def box_muller64(r0, r1):
    """Return normals by noise.py's formula, in float64 from the float32 u and v on."""
    u = (r0.float() * 2**-32 + 2**-33).double()
    signed = torch.where(r1 >= 2**31, r1 - 2**32, r1)
    angle = math.pi * signed.float().double() * 2**-31
    radius = torch.sqrt(-2 * torch.log(u))
    return radius * torch.cos(angle), radius * torch.sin(angle)


def normal64(seeds, step, elements):
    r0, r1, r2, r3 = words_of(seeds, step, elements).unbind(-1)
    normals = torch.stack([*box_muller64(r0, r1), *box_muller64(r2, r3)], dim=-1)
    return normals.flatten(1)[:, :elements]


CASES = [
    Case(TOKENS4),
    Case(TOKENS4, BF16, BF16, guided=3, learned=True),
    Case(TOKENS4, F32, BF16, guided=3, learned=True, step=3),
    Case(TOKENS4, F32, BF16, guided=0, prev=True, noise=None, step=3),
    Case(TOKENS4, F16, F16, learned=True, prev=True, noise="noise"),
    Case(TOKENS4, F32, F32, guided=3, learned=True, step=2),
    Case(TOKENS3, F32, F32, guided=2, learned=True, prev=True),
    Case(TOKENS3, F32, BF16, learned=True, step=3),
    Case(TOKENS3, BF16, BF16, prev=True, noise="noise", step=3),
    Case(TOKENS3, F16, F16, guided=0),
    Case(TOKENS3, BF16, F32, guided=1, noise=None),
    Case(IMAGES3, F32, F32, learned=True, step=3),
    Case(IMAGES3, F32, BF16, guided=2, prev=True),
    Case(IMAGES3, BF16, BF16, guided=0, learned=True, noise="noise", step=3),
    Case(IMAGES3, F16, F16, prev=True, noise=None, step=2),
    Case(IMAGES4, F32, BF16, guided=3, learned=True, prev=True, step=3),
    Case(IMAGES4, F32, F32, noise="noise"),
    Case(IMAGES4, BF16, BF16, learned=True, noise="noise", step=2),
    Case(IMAGES4, F16, BF16, guided=0, learned=True),
    Case(TINY, F32, BF16, guided=1, learned=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_update_meets_the_error_rule(case):
    arguments = case.arguments()
    actual = launch(arguments, case.guidance)
    plain = reference.sampler_update(**arguments, guidance=case.guidance)
    exact = {
        name: t.double() if t is not None and t.is_floating_point() else t
        for name, t in arguments.items()
    }
    if case.noise == "seeds":
        z = normal64(exact["seeds"], case.step + 1, exact["x"][0].numel())
        exact |= dict(seeds=None, noise=z.view(case.shape))
    oracle = reference.sampler_update(**exact, guidance=case.guidance)
    for triple in zip(actual, plain, oracle, strict=True):
        assert triple[0].dtype == case.dtype
        check_against_oracle(*triple)


@triton.jit
def words_kernel(p_seeds, p_step, p_words, p_normals, QUADS: tl.constexpr):
    i_b = tl.program_id(0)
    o = tl.arange(0, QUADS)
    key, stream = tl.load(p_seeds + i_b * 2), tl.load(p_seeds + i_b * 2 + 1)
    r0, r1, r2, r3 = sampling.philox_words(key, tl.load(p_step), stream, o)
    p_words += i_b * QUADS * 4 + o * 4
    tl.store(p_words, r0.to(tl.int64))
    tl.store(p_words + 1, r1.to(tl.int64))
    tl.store(p_words + 2, r2.to(tl.int64))
    tl.store(p_words + 3, r3.to(tl.int64))
    b_normals = sampling.philox_normals(key, tl.load(p_step), stream, o)
    tl.store(p_normals + i_b * QUADS * 4 + tl.arange(0, QUADS * 4), b_normals)


@pytest.mark.parametrize("step", [0, 250, 2**32 - 1], ids="step{}".format)
def test_words_are_noise_pys_to_the_bit_and_normals_to_rounding(step):
    seeds, quads = torch.tensor([*SEEDS, [-1, 2**31], [0, 0]]), 256
    words = torch.zeros(5, quads, 4, dtype=torch.int64, device=DEVICE)
    normals = torch.zeros(5, quads * 4, device=DEVICE)
    steps = torch.tensor(step, device=DEVICE)
    words_kernel[(5,)](seeds.to(DEVICE), steps, words, normals, quads)
    assert torch.equal(words.cpu(), words_of(seeds, step, quads * 4))
    plain = noise.normal(seeds, torch.tensor([step]), quads * 4)[0]
    check_against_oracle(normals.cpu(), plain, normal64(seeds, step, quads * 4))


@triton.jit
def box_muller_kernel(p_r0, p_r1, p_out, N: tl.constexpr):
    o = tl.arange(0, N)
    r0, r1 = tl.load(p_r0 + o).to(tl.uint32), tl.load(p_r1 + o).to(tl.uint32)
    b_cos, b_sin = sampling._box_muller(r0, r1)
    tl.store(p_out + o, b_cos)
    tl.store(p_out + N + o, b_sin)


def test_box_muller_holds_at_the_ends_and_the_octants_of_its_range():
    eighths = [k * 2**29 + d for k in range(8) for d in (-1, 0, 1)]
    ends = [0, 1, 2, 2**24 - 1, 2**24 + 1, 2**32 - 2**7, 2**32 - 2, 2**32 - 1]
    edges = torch.tensor([e % 2**32 for e in eighths] + ends)
    words = torch.cat([edges, torch.randint(2**32, (64 - len(edges),))])
    r0, r1 = words.repeat_interleave(64), words.repeat(64)
    out = torch.zeros(2, 4096, device=DEVICE)
    box_muller_kernel[(1,)](r0.to(DEVICE), r1.to(DEVICE), out, 4096)
    plain, oracle = torch.stack(noise.box_muller(r0, r1)), torch.stack(box_muller64(r0, r1))
    assert out.isfinite().all()
    check_against_oracle(out.cpu(), plain, oracle)


def strided(t):
    """Return a view with the same values, in every other element of a transposed buffer."""
    buffer = torch.full((*t.shape[::-1], 2), math.nan, dtype=t.dtype)
    view = buffer[..., 1].permute(*reversed(range(t.dim())))
    view.copy_(t)
    assert not view.is_contiguous()
    return view


@pytest.mark.parametrize("shape", [TOKENS4, IMAGES3], ids=["tokens", "images"])
def test_strides_do_not_matter(shape):
    case = Case(shape, guided=2, learned=True, prev=True, noise="noise")
    arguments = case.arguments()
    views = {k: None if v is None else strided(v) if v.dim() else v for k, v in arguments.items()}
    for a, b in zip(launch(views, case.guidance), launch(arguments, case.guidance), strict=True):
        assert torch.equal(a, b)


def test_an_image_does_not_depend_on_its_batch():
    case = Case(TOKENS3, guided=2, learned=True)
    arguments = case.arguments()
    together = launch(arguments, case.guidance)
    for i in range(3):
        alone = arguments | dict(
            x=arguments["x"][i : i + 1],
            model_out=arguments["model_out"][i::3],
            seeds=arguments["seeds"][i : i + 1],
        )
        for a, b in zip(launch(alone, case.guidance), together, strict=True):
            assert torch.equal(a[0], b[i])


@pytest.mark.parametrize("config", sampling.sampler_update_configs()[1:], ids=str)
def test_every_configuration_gives_the_same_bits(config):
    case = Case(TOKENS3, F32, BF16, guided=2, learned=True)
    arguments = case.arguments()
    default = launch(arguments, case.guidance)
    for a, b in zip(launch(arguments, case.guidance, config=config), default, strict=True):
        assert torch.equal(a, b)


def test_a_last_step_reads_neither_noise_nor_range_and_nan_survives_the_clamp():
    arguments = Case(TOKENS4, learned=True, noise="noise", step=2).arguments()
    arguments["model_out"][..., 4:] = math.nan
    arguments["noise"].fill_(math.nan)
    assert all(t.isfinite().all() for t in launch(arguments))
    arguments = Case(TOKENS4, noise=None, step=1).arguments()
    arguments["x"][1, 300, 2] = math.nan
    for t in launch(arguments):
        assert torch.equal(t.isnan(), arguments["x"].isnan())


@pytest.mark.parametrize("prev", [False, True], ids=["one-step", "two-step"])
def test_results_may_replace_the_state(prev):
    case = Case(TOKENS3, guided=2, learned=True, prev=prev)
    arguments = case.arguments()
    expected = launch(arguments, case.guidance)
    moved = {k: None if v is None else v.to(DEVICE) for k, v in arguments.items()}
    place = moved["x"], moved["x0_prev"] if prev else torch.empty_like(moved["x"])
    guidance = case.guidance.scale, case.guidance.channels
    results = sampling.sampler_update(**moved, guidance=guidance, out=place)
    for result, own, value in zip(results, place, expected, strict=True):
        assert result is own and torch.equal(own.cpu(), value)


def test_nothing_is_launched_for_an_empty_batch():
    arguments = Case(TOKENS4).arguments()
    arguments |= {k: arguments[k][:0] for k in ("x", "model_out", "seeds")}
    assert [list(t.shape) for t in launch(arguments)] == [[0, 343, 4]] * 2


def test_a_launch_can_be_recorded_without_data(monkeypatch):
    launches = []

    def record(self, tensors, *numbers):
        launches.append((self._grid, numbers, self._constants))

    monkeypatch.setattr(sampling.PreparedLaunch, "__call__", record)
    arguments = Case(TOKENS4, guided=3, learned=True).arguments()
    meta = {k: None if v is None else v.to("meta") for k, v in arguments.items()}
    sampling.sampler_update(**meta, guidance=(4.0, 3))
    ((grid, numbers, constants),) = launches
    assert grid == (6,)
    assert numbers == (4.0, arguments["coefficients"].shape[0], 3, 1372, 1)
    expected = dict(CHANNELS=4, GUIDED=3, LEARNED=True, HAS_PREV=False, NOISE=1, BLOCK=1024)
    assert expected.items() <= constants.items()
