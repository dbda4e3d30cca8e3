"""How a Sampler treats its model: dtypes, copies, changed weights and overridden forwards."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, Guidance, Sampler, reference
from fastdit.testing import randomize, relative_error

TOY = DiTConfig(hidden=32, n_layers=2, n_heads=2)
by_execution = pytest.mark.parametrize(
    "execution",
    ["eager", "compile", pytest.param("graph", marks=pytest.mark.gpu), "trajectory"],
)


def device_of(execution):
    on_gpu = torch.cuda.is_available() and execution != "trajectory"
    return "cuda" if execution == "graph" or on_gpu else "cpu"


def make_model(device="cpu"):
    model = fastdit.DiT.from_config(TOY)
    randomize(model)
    return model.to(device)


def make_scheduler():
    return DiffusionScheduler(12, schedule="cosine")


@by_execution
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["own-dtype", "bfloat16"])
def test_changed_weights_are_seen(execution, dtype):
    """Version counters do not show changes by a fused optimizer, by .data or by assignment."""
    if execution == "trajectory" and dtype == torch.bfloat16:
        if not torch.cpu.get_capabilities().get("avx512_bf16"):
            pytest.skip("the C++ loop needs AVX512-BF16")
    model = make_model(device=device_of(execution))
    sampler = Sampler(model, make_scheduler(), dtype=dtype, execution=execution)

    def check(change):
        before = sampler([1, 2])
        change()
        after = sampler([1, 2])
        fresh = Sampler(model, make_scheduler(), dtype=dtype, execution=execution)([1, 2])
        assert relative_error(after, before) > 1e-3
        assert relative_error(after, fresh) < 1e-6

    def fused_adamw():
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    def data():
        model.final_linear.weight.data = 2 * model.final_linear.weight.data

    def assign():
        other = {name: 1.5 * p for name, p in model.state_dict().items()}
        model.load_state_dict(other, assign=True)

    for change in (fused_adamw, data, assign):
        check(change)


def test_autocast_sets_the_dtype_of_the_forward():
    model, scheduler = make_model(), make_scheduler()
    sampler = Sampler(model, scheduler)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = sampler([1, 2])
    assert torch.equal(under_autocast, Sampler(model, scheduler, dtype=torch.bfloat16)([1, 2]))
    assert not torch.equal(under_autocast, sampler([1, 2]))
    with torch.autocast("cpu", torch.bfloat16):
        kept = Sampler(model, scheduler, dtype=torch.float32)([1, 2])
    assert torch.equal(kept, sampler([1, 2]))


def test_an_eager_sampler_follows_a_cast_of_its_model():
    model = make_model()
    sampler = Sampler(model, make_scheduler())
    single = sampler([1, 2])
    model.double()
    double = sampler([1, 2])
    assert double.dtype == torch.float64 and 0 < relative_error(single, double) < 1e-5


@by_execution
def test_a_model_that_is_cast_after_a_call_is_followed_or_refused(execution):
    """This holds even if `dtype` was given as the model's own dtype."""
    model = make_model(device=device_of(execution))
    sampler = Sampler(model, make_scheduler(), dtype=torch.float32, execution=execution)
    before = sampler([1, 2])
    model.double()
    if execution == "graph":
        with pytest.raises(ValueError, match="make a new Sampler"):
            sampler([1, 2])
    else:
        assert relative_error(sampler([1, 2]), before) < 1e-6


def test_a_copy_has_all_tensors_of_the_model_and_follows_them():
    class Scaled(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.register_buffer("scale", torch.tensor(2.0), persistent=False)

        def forward(self, x):
            return super().forward(x) * self.scale

    model = make_model()
    layer = Scaled(32, 96)
    layer.load_state_dict(model.blocks[0].attn.qkv.state_dict())
    model.blocks[0].attn.qkv = layer
    sampler = Sampler(model, make_scheduler(), dtype=torch.bfloat16)
    for value in (2.0, 0.5):
        layer.scale.fill_(value)
        assert relative_error(sampler([1, 2]), Sampler(model, make_scheduler())([1, 2])) < 0.02


def test_a_model_of_mixed_dtypes_is_cast_to_one():
    model, mixed = make_model(), make_model()
    mixed.blocks.bfloat16()
    single = Sampler(mixed, make_scheduler(), dtype=torch.float32)([1, 2])
    assert relative_error(single, Sampler(model, make_scheduler())([1, 2])) < 0.02


def test_an_overridden_or_hooked_forward_is_called():
    """The forward of a subclass or one with a hook is called, without precomputed modulation."""

    class Halved(fastdit.DiT):
        def forward(self, x, t, y=None):
            return 0.5 * super().forward(x, t, y)

    own, hooked = Halved.from_config(TOY), make_model()
    randomize(own)
    hooked.register_forward_hook(lambda module, inputs, out: 0.5 * out)
    plain = make_model()
    with torch.no_grad():
        plain.final_linear.weight.mul_(0.5)
        plain.final_linear.bias.mul_(0.5)
    expected = Sampler(plain, make_scheduler())([1, 2])
    for model in (own, hooked):
        assert relative_error(Sampler(model, make_scheduler())([1, 2]), expected) < 1e-5
        with pytest.raises(ValueError, match="execution: 'compile' needs a fastdit.DiT whose forw"):
            Sampler(model, make_scheduler(), execution="compile")


def test_a_sampler_can_be_copied_and_pickled():
    sampler = Sampler(make_model(), make_scheduler(), dtype=torch.bfloat16)
    images = sampler([1, 2])
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert torch.equal(other([1, 2]), images)


def test_a_model_that_cannot_be_copied_is_named():
    model = make_model()
    model.lock = threading.Lock()
    assert Sampler(model, make_scheduler())([1]).isfinite().all()
    with pytest.raises(ValueError, match="model: this execution or dtype needs a copy of it"):
        Sampler(model, make_scheduler(), dtype=torch.bfloat16)([1])


def test_a_copy_refuses_a_model_of_another_shape():
    model = make_model()
    sampler = Sampler(model, make_scheduler(), dtype=torch.bfloat16, execution="eager")
    sampler([1])
    model.final_mod = nn.Linear(32, 96)
    with pytest.raises(ValueError, match="model: its parameters have other names or shapes"):
        sampler([1])


@pytest.mark.parametrize("name", ["compile", "graph"])
def test_executions_of_a_dit_refuse_other_models(name):
    plain = reference.DiT.from_config(TOY)
    with pytest.raises(ValueError, match=f"execution: '{name}' needs a fastdit.DiT.*got DiT"):
        Sampler(plain, make_scheduler(), execution=name)
    with pytest.raises(ValueError, match="dtype: expected torch.float32 or None"):
        Sampler(plain, make_scheduler(), dtype=torch.bfloat16)


def test_a_wrapped_model_makes_the_images_of_the_model_inside():
    """Also one whose forward is called as it is: its state lies in tokens too."""
    model = make_model()
    model.register_forward_hook(lambda module, inputs, out: out)
    wrapped = nn.DataParallel(model)
    expected = Sampler(model, make_scheduler())([1, 2], seed=5)
    assert torch.equal(Sampler(wrapped, make_scheduler())([1, 2], seed=5), expected)


def test_a_model_with_a_config_of_its_own_is_not_taken_for_a_dit():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.cfg = inner, inner.cfg

        def forward(self, x, t, y):
            return self.inner(x, t, y)

    wrapper = Wrapper(make_model())
    with pytest.raises(
        ValueError, match="sample_shape: expected .C, H, W., since the model is not"
    ):
        Sampler(wrapper, make_scheduler())
    with pytest.raises(ValueError, match="model: expected a fastdit.DiT.*got Wrapper"):
        fastdit.save(wrapper, "unused.safetensors")


@pytest.mark.parametrize("execution", ["eager", "trajectory"])
def test_a_samplers_attributes_may_be_changed_between_calls(execution):
    model = fastdit.DiT(hidden=32, n_layers=2, n_heads=2, null_class=True)
    randomize(model)
    sampler = Sampler(model, make_scheduler(), execution=execution)
    plain, guidance = sampler([1, 2]), Guidance(3.0)
    sampler.guidance = guidance
    guided = Sampler(model, make_scheduler(), guidance=guidance, execution=execution)([1, 2])
    assert torch.equal(sampler([1, 2]), guided)
    sampler.guidance = None
    assert torch.equal(sampler([1, 2]), plain)
    sampler.table = sampler.solver.table(make_scheduler(), 4)
    assert torch.equal(
        sampler([1, 2]), Sampler(model, make_scheduler(), steps=4, execution=execution)([1, 2])
    )
