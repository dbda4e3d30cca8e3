"""Prepared launches make the same calls of the driver as Triton does, in fewer steps.

A stand-in replaces the driver and has devices that do not exist. Kernels are compiled for it, and
launches are recorded.
"""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from fastdit.kernels import (  # noqa: E402
    adaln,
    aot,
    attention,
    attention_backward,
    launch,
    sampling,
)
from fastdit.ops import registration  # noqa: E402

MODULES = adaln, attention, attention_backward, sampling
FIRST, SECOND = 100, 101  # indices of devices that no machine has


class Driver:
    """Two H100s as Triton sees them; their launches are kept in `calls`."""

    def __init__(self):
        self.device, self.stream, self.calls, self.loaded = FIRST, 0, [], 0
        driver = self

        class Launcher:
            def __init__(self, src, metadata):
                pass

            def __call__(self, x, y, z, stream, function, metadata, *rest):
                *_, enter, leave = rest[:3]
                arguments = [getattr(a, "data_ptr", lambda a=a: a)() for a in rest[3:]]
                driver.calls.append((driver.device, (x, y, z), stream, function, arguments))
                for hook in (enter, leave):
                    if hook is not None:
                        hook(rest[0])

        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            load_binary=self.load, get_device_properties=lambda device: {"max_shared_mem": 232448}
        )

    def load(self, name, kernel, shared, device):
        self.loaded += 1
        return object(), f"{name} {self.loaded} on {device}", 0, 0, 1024

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.stream

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def forget():
    """Forget all prepared launches, so that the next call of any launcher is its first."""
    for module in MODULES:
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@pytest.fixture
def driver(monkeypatch):
    forget()
    stand_in = Driver()
    # set_active could not restore that there was no driver before.
    monkeypatch.setattr(triton.runtime.driver, "_active", stand_in)
    yield stand_in
    for kernel in KERNELS:
        for device in (FIRST, SECOND):
            kernel.device_caches.pop(device, None)
    forget()


@pytest.fixture
def runs(monkeypatch):
    """Record the names of kernels that are launched through Triton, in order."""
    names = []
    through = launch.PreparedLaunch._through_triton

    def counted(self, *args):
        names.append(self._kernel.__name__)
        through(self, *args)

    monkeypatch.setattr(launch.PreparedLaunch, "_through_triton", counted)
    return names


KERNELS = [
    value for module in MODULES for value in vars(module).values() if isinstance(value, JITFunction)
]


def layer_norm_inputs(dtype=torch.bfloat16, offset=0, row=None, B=2, N=5, D=64):
    x = torch.zeros(B * N * D + offset, dtype=dtype)[offset:].view(B, N, D)
    modulation = torch.zeros(B, row or 3 * D, dtype=dtype)[:, : 3 * D]
    return x, torch.zeros_like(x), *modulation.chunk(3, dim=1)


def plain_layer_norm(**changes):
    x, _, _, scale, shift = layer_norm_inputs(**changes)
    return lambda: adaln.norm_modulate_fwd(x, scale, shift, 1e-5)


def gated_layer_norm(**changes):
    x, y, gate, scale, shift = layer_norm_inputs(**changes)
    return lambda: adaln.norm_modulate_fwd(x, scale, shift, 1e-5, None, (y, gate))


def gated_layer_norm_backward(**changes):
    x, y, gate, scale, _ = layer_norm_inputs(**changes)
    statistics = torch.ones(x.shape[:2])
    return lambda: adaln.norm_modulate_bwd(
        y, x, scale, (statistics, statistics), None, (None, y, gate)
    )


def rms_norm_backward(**changes):
    """Without a shift: the numbers of both launches then include None for what is not there."""
    x, y, gate, scale, _ = layer_norm_inputs(**changes)
    rstd, weight = torch.ones(x.shape[:2]), torch.ones(x.shape[-1])
    return lambda: adaln.norm_modulate_bwd(
        y, x, scale, (None, rstd), weight, (None, y, gate), shifted=False
    )


def attention_inputs(dtype=torch.bfloat16, offset=0, B=2, N=40, D=64):
    return torch.zeros(B * N * 3 * D + offset, dtype=dtype)[offset:].view(B, N, 3 * D)


def attention_forward(**changes):
    qkv = attention_inputs(**changes)
    return lambda: attention.attention_fwd(qkv, 2)


def attention_backward(**changes):
    qkv = attention_inputs(**changes)
    out = qkv[..., :64].contiguous()
    lse = torch.zeros(2, 2, qkv.shape[1])
    return lambda: attention.attention_bwd(out, qkv, out, lse, 2)


def update(dtype=torch.float32, guidance=(4.0, 3), B=2):
    x, model_out = torch.zeros(B, 16, 4, dtype=dtype), torch.zeros(2 * B, 16, 8)
    table, step = torch.zeros(3, 10), torch.tensor(0)
    seeds = torch.zeros(B, 2, dtype=torch.int64)
    return lambda: sampling.sampler_update(x, model_out, table, step, x, seeds, None, guidance)


LAUNCHERS = [
    plain_layer_norm,
    gated_layer_norm,
    gated_layer_norm_backward,
    rms_norm_backward,
    attention_forward,
    attention_backward,
    update,
]
by_launcher = pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda f: f.__name__)


@pytest.fixture
def compared(driver, monkeypatch):
    """Make every launch three times, first by Triton and then prepared, and compare the calls."""
    call = launch.PreparedLaunch.__call__
    same = []

    def thrice(self, tensors, *numbers):
        before = len(driver.calls)
        self._kernel[self._grid](*tensors, *numbers, **self._constants)
        call(self, tensors, *numbers)
        call(self, tensors, *numbers)
        plain, *others = driver.calls[before:]
        assert others == [plain, plain]
        same.append(plain)

    monkeypatch.setattr(launch.PreparedLaunch, "__call__", thrice)
    return same


@by_launcher
def test_a_prepared_launch_is_the_launch_that_triton_makes(launcher, compared, runs):
    launcher()()
    first = len(runs)
    assert first == len(compared)
    launcher()()
    assert len(runs) == first and len(compared) == 2 * first


@by_launcher
def test_a_second_call_makes_no_configuration(launcher, driver, runs, monkeypatch):
    call = launcher()
    call()
    launched = list(runs)
    monkeypatch.setattr(triton.Config, "__init__", lambda *_, **__: pytest.fail("a Config is made"))
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: pytest.fail("a device is switched to"))
    call()
    assert runs == launched and len(driver.calls) == 2 * len(launched)


@pytest.mark.parametrize(
    ("launcher", "changes", "code"),
    [
        (plain_layer_norm, {"offset": 1}, "other"),
        (plain_layer_norm, {"row": 256}, "same"),
        (plain_layer_norm, {"row": 193}, "other"),
        (plain_layer_norm, {"D": 72}, "other"),
        (plain_layer_norm, {"N": 16}, "other"),
        (plain_layer_norm, {"N": 7}, "same"),
        (plain_layer_norm, {"dtype": torch.float32}, "other"),
        (gated_layer_norm_backward, {"offset": 1}, "other"),
        (attention_forward, {"offset": 1}, "other"),
        (attention_forward, {"N": 64}, "other"),
        (attention_forward, {"dtype": torch.float16}, "other"),
        (update, {"dtype": torch.bfloat16}, "other"),
        (update, {"guidance": (1.0, 3)}, "same"),
        (update, {"guidance": (4.0, None)}, "other"),
        (update, {"B": 1}, "other"),
    ],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_another_kind_of_argument_has_a_launch_of_its_own(launcher, changes, code, compared):
    """The two kinds alternate, so that each could be taken for the other."""
    for given in ({}, changes, {}, changes):
        launcher(**given)()
    functions = [function for _, _, _, function, _ in compared]
    half = len(functions) // 2
    assert functions[:half] == functions[half:]
    assert (functions[0] != functions[half // 2]) == (code == "other")


def test_the_precision_of_products_is_obeyed_at_every_call(compared):
    matmul = torch.backends.cuda.matmul
    before, call = matmul.fp32_precision, attention_forward(dtype=torch.float32)
    try:
        for precision in ("ieee", "tf32", "ieee"):
            matmul.fp32_precision = precision
            call()
    finally:
        matmul.fp32_precision = before
    assert [("tf32" in c[4], "ieee" in c[4]) for c in compared] == [(0, 1), (1, 0), (0, 1)]


def test_the_current_stream_is_launched_on(driver, runs):
    call = gated_layer_norm()
    for driver.stream in (0, 7, 0):
        call()
    assert [stream for _, _, stream, *_ in driver.calls] == [0, 7, 0] and len(runs) == 1


def test_each_device_runs_what_was_compiled_for_it(driver):
    call = gated_layer_norm()
    for driver.device in (FIRST, SECOND, FIRST, SECOND):
        call()
    for device, _, _, function, _ in driver.calls:
        assert function.endswith(f"on {device}")


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("leading", [(), (None,)], ids=["first", "second"])
def test_an_op_leaves_the_current_device_only_for_its_own(current, leading, monkeypatch):
    switched = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)

    class Switch:
        def __init__(self, tensor):
            switched.append(tensor.get_device())

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "device_of", Switch)
    tensor = SimpleNamespace(is_cuda=True, get_device=lambda: 1)
    assert (
        registration.on_its_device(lambda *args: len(args))(*leading, tensor, 2) == len(leading) + 2
    )
    assert switched == ([] if current == 1 else [1])


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profilers_hook_sees_every_launch(hook, driver):
    call, seen = gated_layer_norm(), []
    call()
    chain = getattr(triton.knobs.runtime, hook)
    chain.add(seen.append)
    try:
        call()
        call()
    finally:
        chain.remove(seen.append)
    assert [metadata.get()["name"] for metadata in seen] == ["norm_modulate_fwd_kernel"] * 2


def test_a_switched_debugger_has_kernels_compiled_anew(driver, monkeypatch):
    call = gated_layer_norm()
    call()
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    call()
    monkeypatch.setattr(triton.knobs.runtime, "debug", False)
    call()
    plain, debugged, again = (function for _, _, _, function, _ in driver.calls)
    assert plain == again != debugged


def test_launches_are_recorded_that_were_made_before(driver):
    call = gated_layer_norm()
    call()
    (recorded,) = aot.record(call)
    assert recorded.kernel is adaln.norm_modulate_fwd_kernel and len(driver.calls) == 1


def sums_launch(module):
    constants = dict(D=64, GATED=False, RMS=False, SHIFTED=True, BLOCK=256, num_warps=1)
    return module.PreparedLaunch(adaln.sum_partials_kernel, (1, 1), **constants)


def test_a_tool_that_was_there_first_does_not_make_every_launch_slow(monkeypatch):
    """Kernels are imported late, when a tool may already have replaced Triton's function."""
    spec = importlib.util.spec_from_file_location("launch_imported_late", launch.__file__)
    late = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda *_, **__: None)
        spec.loader.exec_module(late)
        prepared = sums_launch(late)
        assert prepared._is_watched()
    assert not prepared._is_watched()


def test_a_float_that_is_new_at_every_call_is_no_other_kind(driver, runs):
    for i in range(5):
        update(guidance=(1 + i / 7, 3))()
        assert driver.calls[-1][4][9] == 1 + i / 7
    assert runs == ["sampler_update_kernel"]


def test_an_integer_that_is_new_at_every_call_is_not_kept_for_ever(driver):
    prepared = sums_launch(launch)
    partial, scale, shift = torch.zeros(1, 1, 3, 64), torch.zeros(1, 64), torch.zeros(1, 64)
    for chunks in range(1, 3 * launch._KINDS):
        prepared((partial, None, None, scale, shift, None, None), None, chunks)
        assert driver.calls[-1][4][8] == chunks
    assert len(prepared._compiled) <= launch._KINDS
