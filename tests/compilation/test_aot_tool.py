"""The ahead-of-time compiler sees spills, matrix work, narrow loads and shared memory."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: there is no machine code", allow_module_level=True)

from fastdit.kernels import aot, occupancy  # noqa: E402

ARCHES = list(aot.TARGETS)
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


@triton.jit
def copy_kernel(p_x, p_y, n, stride, scale, p_none, BLOCK: tl.constexpr):
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_x + o_x * stride, mask=o_x < n)
    if p_none is None:
        x = (x * scale).to(x.dtype)
    tl.store(p_y + o_x, x, mask=o_x < n)


@triton.jit(do_not_specialize=["n"])
def count_kernel(p_y, n, flag):
    tl.store(p_y, n + tl.where(flag, 1, 0))


@triton.jit
def dot_kernel(p_a, p_b, p_c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    b_a = tl.load(p_a + o_m[:, None] * K + o_k[None, :])
    b_b = tl.load(p_b + o_k[:, None] * N + o_n[None, :])
    tl.store(p_c + o_m[:, None] * N + o_n[None, :], tl.dot(b_a, b_b))


@triton.jit
def loop_kernel(p_a, p_b, p_c, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK)
    acc = tl.zeros([M, N], tl.float32)
    for k in range(0, K, BK):
        b_a = tl.load(p_a + o_m[:, None] * K + k + o_k[None, :])
        b_b = tl.load(p_b + (k + o_k)[:, None] * N + o_n[None, :])
        acc = tl.dot(b_a, b_b, acc)
    tl.store(p_c + o_m[:, None] * N + o_n[None, :], acc)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_copy(x=None, n=4096, stride=1, scale=2.0, **options):
    x = empty(4096) if x is None else x
    copy_kernel[lambda args: (n // args["BLOCK"],)](
        x, empty(4096), n, stride, scale, None, BLOCK=2048, num_warps=4, **options
    )


def launch_dot(m=64, n=64, k=64, dtype=torch.bfloat16, num_warps=4, **options):
    a, b, c = empty(m, k, dtype=dtype), empty(k, n, dtype=dtype), empty(m, n, dtype=torch.float32)
    dot_kernel[(1,)](a, b, c, M=m, N=n, K=k, num_warps=num_warps, **options)


def launch_loop(m=128, n=128):
    a, b, c = empty(m, 256), empty(256, n), empty(m, n, dtype=torch.float32)
    loop_kernel[(1, 1)](a, b, c, 256, M=m, N=n, BK=64, num_warps=4, num_stages=3)


def machine(call, arch):
    (launch,) = aot.record(call)
    return aot.compile_launch(launch, arch)


def test_a_recorded_launch_keeps_arguments_options_and_grid():
    (launch,) = aot.record(lambda: launch_copy(num_stages=2))
    assert launch.kernel is copy_kernel
    assert launch.grid == (2,)
    assert launch.options == {"num_warps": 4, "num_stages": 2}
    assert list(launch.args) == copy_kernel.arg_names
    assert [launch.args[k] for k in ("n", "stride", "scale", "p_none", "BLOCK")] == [
        4096,
        1,
        2.0,
        None,
        2048,
    ]


def test_every_launch_of_a_call_is_recorded_in_order():
    launches = aot.record(lambda: (launch_copy(), launch_dot(), launch_copy()))
    assert [launch.kernel for launch in launches] == [copy_kernel, dot_kernel, copy_kernel]


def test_a_failing_call_leaves_triton_as_it_was():
    run = triton.runtime.jit.JITFunction.run
    with pytest.raises(ZeroDivisionError):
        aot.record(lambda: 1 / 0)
    assert triton.runtime.jit.JITFunction.run is run


def test_a_call_that_launches_nothing_is_refused():
    with pytest.raises(RuntimeError, match="launched no Triton kernel"):
        aot.record(lambda: None)


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        aot.record(launch_copy)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="sm_70"):
        machine(launch_copy, "sm_70")


@pytest.mark.parametrize("arch", ARCHES)
def test_a_copy_moves_128_bits_at_a_time_and_spills_nothing(arch):
    m = machine(launch_copy, arch)
    assert (m.kernel, m.arch, m.num_warps) == ("copy_kernel", arch, 4)
    assert set(m.loads) == {128} and set(m.stores) == {128}
    assert m.load_bits == 128
    assert (m.spills, m.sgpr_spills, m.stack, m.shared) == (0, 0, 0, 0)
    assert 0 < m.registers < 64
    assert (m.matrix, m.dot_flop, m.matrix_flop) == ({}, 0, 0)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    "misuse",
    [
        pytest.param(lambda: launch_copy(stride=2), id="stride-2"),
        pytest.param(lambda: launch_copy(empty(4097)[1:]), id="misaligned-view"),
        pytest.param(lambda: launch_copy(n=4095), id="odd-length"),
    ],
)
def test_narrow_loads_are_seen(arch, misuse):
    assert machine(misuse, arch).load_bits < 128


@pytest.mark.parametrize("n", [1, 16, 17, 2**40], ids=["one", "multiple-of-16", "odd", "64-bit"])
@pytest.mark.parametrize("flag", [True, False])
def test_integers_of_every_kind_compile(n, flag):
    m = machine(lambda: count_kernel[(1,)](empty(1, dtype=torch.int64), n, flag), "sm_90")
    assert sum(m.stores.values()) == 1


@pytest.mark.parametrize("arch", ARCHES)
def test_a_dot_becomes_matrix_instructions_of_its_own_flop(arch):
    m = machine(lambda: launch_dot(m=128), arch)
    assert list(m.matrix) == [MATRIX[arch]]
    assert m.dot_flop == m.matrix_flop == 2 * 128 * 64 * 64
    assert m.spills == 0
    assert (m.tensor_memory > 0) == (arch == "sm_100")
    assert m.shared <= aot.SHARED_LIMIT[arch] and m.tensor_memory <= aot.TENSOR_MEMORY_LIMIT


def test_hopper_instructions_are_counted_by_warp_group():
    m = machine(launch_dot, "sm_90")
    assert m.matrix == {"HGMMA": 4}  # 64 x 64 x 16 each
    assert m.matrix_flop == 2 * 64 * 64 * 64


def test_work_repeated_by_idle_warps_is_seen():
    m = machine(lambda: launch_dot(m=16, n=16, num_warps=4), "sm_80")
    assert m.dot_flop == 2 * 16 * 16 * 64
    assert m.matrix_flop == 2 * m.dot_flop


def test_float32_dots_use_tensor_cores_only_as_tf32():
    m = machine(lambda: launch_dot(dtype=torch.float32), "sm_80")
    assert m.matrix_flop == m.dot_flop == 2 * 64 * 64 * 64


@pytest.mark.parametrize("arch", ARCHES)
def test_a_loop_counts_once_however_it_is_peeled(arch):
    m = machine(launch_loop, arch)
    assert m.dot_flop == 2 * 128 * 128 * 64
    assert m.matrix_flop % m.dot_flop == 0
    assert m.load_bits == 128


@pytest.mark.parametrize(
    "arch, call",
    [
        pytest.param("sm_80", lambda: launch_dot(m=128, n=128, maxnreg=64), id="sm_80"),
        pytest.param("sm_90", lambda: launch_dot(m=128, n=128, maxnreg=96), id="sm_90"),
        pytest.param("sm_100", lambda: launch_dot(m=128, n=128, maxnreg=40), id="sm_100"),
        pytest.param("gfx942", lambda: launch_dot(m=256, n=256, num_warps=1), id="gfx942"),
    ],
)
def test_spills_are_seen(arch, call):
    m = machine(call, arch)
    assert m.spills > 0 and m.stack > 0


@pytest.mark.parametrize(
    "needs, expected, why",
    [
        (
            ("sm_90", 142, 80 << 10, 8),
            1,
            "14 warps of 4,608 registers are 3 a scheduler, 12 in all",
        ),
        (("sm_90", 127, 70 << 10, 4), 3, "228 KB are three times 71"),
        (("sm_90", 127, 50 << 10, 4), 4, "16 warps of 4,096 registers"),
        (("sm_90", 128, 80 << 10, 8), 2, "16 warps of 4,096 registers"),
        (("sm_90", 32, 0, 4), 16, "64 warps"),
        (("sm_90", 16, 0, 1), 32, "32 programs"),
        (("sm_90", 255, 0, 16), 0, "512 threads have 128 registers each"),
        (("sm_80", 168, 50 << 10, 4), 3, "12 warps of 5,376 registers; 164 KB are three times 51"),
        (("sm_86", 168, 50 << 10, 4), 1, "100 KB are once 51"),
        (("sm_100", 198, 100 << 10, 8, 512), 1, "all columns of tensor memory"),
        (("sm_100", 96, 60 << 10, 4, 129), 2, "129 columns are handed out as 256"),
        (("sm_100", 96, 60 << 10, 4, 656), 0, "656 columns of 512"),
        (("gfx942", 264, 16 << 10, 4), 1, "a wave of 264 registers a SIMD"),
        (("gfx942", 256, 8 << 10, 2), 4, "two waves of 256 registers a SIMD"),
        (("gfx942", 64, 36 << 10, 4), 1, "64 KB are once 36"),
        (("gfx942", 8, 0, 4), 8, "eight waves a SIMD"),
    ],
)
def test_resident_programs_are_those_counted_by_hand(needs, expected, why):
    assert occupancy.resident(*needs) == expected, why


def test_rounds_are_how_often_the_multiprocessors_fill():
    assert occupancy.rounds(128, 4, 132) == 1
    assert occupancy.rounds(2048, 4, 132) == 4  # 32 rows of XL/2 in tiles of 64
    assert occupancy.rounds(529, 4, 132) == 2


@pytest.mark.parametrize("arch", ARCHES)
def test_a_machine_knows_what_is_resident(arch):
    m = machine(lambda: launch_dot(m=128, num_warps=8), arch)
    needs = m.registers, m.shared, m.num_warps, m.tensor_memory
    assert m.resident == occupancy.resident(arch, *needs) > 0
    assert m.resident_warps == 8 * m.resident


def test_compile_all_keeps_order_and_reports_what_the_compiler_refuses():
    jobs = [
        ("copy", launch_copy, "sm_90"),
        ("bad", lambda: launch_dot(k=8), "sm_90"),
        ("two", lambda: (launch_copy(), launch_dot()), "sm_80"),
    ]
    labels, results = zip(*aot.compile_all(jobs, processes=2), strict=True)
    assert labels == ("copy", "bad", "two", "two")
    assert isinstance(results[1], RuntimeError) and "bad on sm_90" in str(results[1])
    assert [r.kernel for r in (results[0], *results[2:])] == [
        "copy_kernel",
        "copy_kernel",
        "dot_kernel",
    ]
