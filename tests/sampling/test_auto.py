"""What `execution="auto"` chooses, and what it says of itself."""

import warnings
from types import SimpleNamespace

import pytest
import torch

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, Sampler
from fastdit.kernels import cpu
from fastdit.ops import dispatch
from fastdit.sampling import executions
from fastdit.sampling.executions import Subject
from fastdit.testing import randomize, relative_error


def make_model(cfg=None):
    model = fastdit.DiT.from_config(cfg or DiTConfig())
    randomize(model)
    return model.requires_grad_(False)


@pytest.mark.parametrize("options", [dict(hidden=516), dict(img_size=68)], ids=["wide", "long"])
def test_auto_takes_wide_models_and_many_tokens(options, monkeypatch):
    model, scheduler = make_model(DiTConfig(**options, n_layers=1)), DiffusionScheduler(2)
    sampler = Sampler(model, scheduler)
    assert sampler.execution_for() == "trajectory"
    eager = Sampler(model, scheduler, execution="eager")
    assert relative_error(sampler([1, 2]), eager([1, 2])) < 1e-5
    # Without the vectors of AVX2, products of this width are left to PyTorch.
    monkeypatch.setattr(cpu, "instruction_set", lambda: "plain")
    assert sampler.execution_for() == ("eager" if "hidden" in options else "trajectory")


def test_auto_takes_the_trajectory_only_for_an_unchanged_dit():
    def by_hook(model):
        model.blocks[0].mlp.register_forward_hook(lambda module, inputs, out: 2 * out)

    def by_module(model):
        model.blocks[0].mlp[1] = torch.nn.SiLU()

    def by_attribute(model):
        model.blocks[1].norm2.eps = 1e-2

    def by_method(model):
        denoise = model.denoise
        model.denoise = lambda *args: 2 * denoise(*args)

    scheduler = DiffusionScheduler(3, schedule="cosine")

    def by_private_method(model):
        run = model.blocks[0]._run
        model.blocks[0]._run = lambda x, *args: run(2 * x, *args)

    def by_shape(model):
        mlp = model.blocks[0].mlp
        mlp[0].weight = torch.nn.Parameter(mlp[0].weight[:200])
        mlp[0].bias = torch.nn.Parameter(mlp[0].bias[:200])
        mlp[2].weight = torch.nn.Parameter(mlp[2].weight[:, :200])

    def by_bias(model):
        model.blocks[0].mlp[0].bias = None

    class Doubled(torch.Tensor):
        """Weights of another kind, as quantised ones are."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            out = super().__torch_function__(func, types, args, kwargs or {})
            return 2 * out if func is torch.nn.functional.linear else out

    def by_kind(model):
        proj = model.blocks[0].attn.proj
        own = proj.weight.as_subclass(Doubled)
        proj.weight = torch.nn.Parameter(own, requires_grad=False)

    changes = (by_hook, by_module, by_attribute, by_method, by_private_method, by_shape, by_bias)
    changes += (by_kind,)
    for alter in changes:
        model = make_model()
        sampler = Sampler(model, scheduler)
        named = Sampler(model, scheduler, execution="trajectory")
        plain = sampler([1, 2])
        assert sampler.execution_for() == "trajectory"
        alter(model)
        assert sampler.execution_for() == "eager"
        assert relative_error(sampler([1, 2]), plain) > 1e-5
        with pytest.raises(ValueError, match="'trajectory' reads a fastdit.DiT's weights only"):
            named([1, 2])


def test_auto_takes_the_trajectory_on_a_cpu_in_float32():
    model, scheduler = make_model(), DiffusionScheduler(3, schedule="cosine")
    sampler = Sampler(model, scheduler)
    assert sampler.execution_for() == "trajectory"
    with torch.autocast("cpu", torch.float16):
        assert sampler.execution_for() == "eager"
    assert Sampler(model.double(), scheduler).execution_for() == "eager"


@pytest.mark.parametrize(
    ("has", "chosen"),
    [
        (dict(avx512_bf16=True), "trajectory"),
        (dict(avx512_bf16=True, amx_tile=True), "eager"),  # PyTorch's products use AMX
        (dict(), "eager"),
        (dict(architecture="aarch64"), "eager"),
    ],
    ids=["bf16", "amx", "neither", "arm"],
)
def test_auto_in_bfloat16_follows_the_cpus_instructions(has, chosen, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"} | has)
    model, scheduler = make_model(), DiffusionScheduler(3, schedule="cosine")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        sampler = Sampler(model, scheduler, dtype=torch.bfloat16)
    assert sampler.execution_for() == chosen
    slow = [w for w in seen if "slower than float32" in str(w.message)]
    assert len(slow) == (has == {}) and all(w.filename == __file__ for w in slow)


def test_the_rule_of_auto_is_described_in_words():
    described = executions.describe_automatic(DiTConfig())
    assert "on a CPU 'trajectory' in float32, and in bfloat16 with AVX512-BF16" in described
    assert described.endswith("'eager' in other dtypes")
    wide = executions.describe_automatic(fastdit.PRESETS["DiT-XL/2"])
    assert wide.endswith("'eager' in other dtypes or without AVX2")


def on_cuda(monkeypatch, major=9, minor=0):
    """Fake a GPU for the choice of an execution, which reads only its properties."""
    properties = SimpleNamespace(major=major, minor=minor, name="A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return torch.device("cuda", 0)


def test_auto_on_cuda_takes_the_trajectory_only_where_it_was_measured_to_win(monkeypatch):
    device, model = on_cuda(monkeypatch), make_model()

    def automatic(model, dtype=torch.bfloat16):
        return executions.automatic(Subject(model, device, dtype))

    assert executions.WINS == () and automatic(model) == "graph"
    assert executions.describe_automatic(model.cfg).startswith("'graph' on CUDA, ")
    monkeypatch.setattr(executions, "WINS", (executions.Win("sm_90", 16, 64, 4),))
    assert automatic(model) == "trajectory"
    assert automatic(model, torch.float32) == "graph"
    assert executions.describe_automatic(model.cfg).startswith(
        "'graph' on CUDA, but 'trajectory' in 16 bits on sm_90, on a CPU"
    )
    for other in (dict(n_layers=5), dict(hidden=128), dict(patch_size=2)):
        assert automatic(make_model(DiTConfig(**other))) == "graph"
        assert executions.describe_automatic(DiTConfig(**other)).startswith("'graph' on CUDA, ")
    model.blocks[0].register_forward_hook(lambda module, inputs, out: out)
    assert automatic(model) == "graph"
    on_cuda(monkeypatch, 8)
    assert automatic(make_model()) == "graph"


@pytest.mark.parametrize(
    ("options", "dtype", "majors", "message"),
    [
        (dict(hidden=128), torch.float32, (8, 9, 10), "takes a hidden size of 64 in float32, got"),
        (
            dict(img_size=32),
            torch.float32,
            (8, 9, 10),
            "takes up to 16 features of a token where there are 64 tokens in float32, got 48",
        ),
        (
            dict(img_size=32),
            torch.bfloat16,
            (8, 12),
            "takes up to 16 features of a token where there are 64 tokens on A GPU, got 48",
        ),
        (dict(img_size=32, hidden=128), torch.float16, (8, 10, 12), "tokens on A GPU, got 48"),
        (dict(img_size=32), torch.bfloat16, (9, 10), None),
        (dict(patch_size=2, hidden=128), torch.bfloat16, (8, 9, 10, 12), None),
        (dict(patch_size=2), torch.float32, (8, 9, 10, 12), None),
        (dict(), torch.float32, (8, 9, 10, 12), None),
    ],
)
def test_a_model_that_would_spill_on_a_gpu_is_refused_with_the_reason(
    monkeypatch, options, dtype, majors, message
):
    pytest.importorskip("triton")
    cfg = DiTConfig(**options)
    for major in majors:
        device = on_cuda(monkeypatch, major)
        reason = dispatch.obstacle("trajectory", "triton", cfg, device, dtype)
        assert (reason is None) if message is None else (message in reason)
