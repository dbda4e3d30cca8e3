"""The machine code of every kernel's default launch on four architectures, without a GPU.

`benchmarks/report.py --aot --every` judges every configuration the tuner may choose.
"""

import os
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch

from fastdit.kernels import aot, attention, attention_configs, gate, gate_cases, occupancy

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels have no machine code", allow_module_level=True)


@pytest.fixture(scope="module", params=aot.TARGETS, ids=str)
def compiled(request):
    """Return [(case, machine or error)] of an architecture."""
    cases = list(gate_cases.cases(request.param))
    jobs = [(str(i), case.call, case.arch) for i, case in enumerate(cases)]
    results = aot.compile_all(jobs, processes=len(os.sched_getaffinity(0)))
    return [(cases[int(label)], machine) for label, machine in results]


@pytest.fixture(scope="module")
def machines(compiled):
    """Return [(case, machine)] of what was compiled; the first test names what was not."""
    return [(case, machine) for case, machine in compiled if isinstance(machine, aot.Machine)]


def test_no_launch_has_a_fault(compiled):
    faults = [
        f"{getattr(machine, 'kernel', '-')}, {case.label}, {case.arch}: {fault}"
        for case, machine in compiled
        for fault in gate.faults(case, machine)
    ]
    assert not faults, "\n".join(faults)


def test_every_kernel_is_judged(machines):
    """All attention forwards are judged, and all matrix work in 16 bits."""
    kernels = Counter(machine.kernel for _, machine in machines)
    assert set(kernels) == {
        "norm_modulate_fwd_kernel",
        "norm_modulate_bwd_kernel",
        "sum_partials_kernel",
        "attention_fwd_kernel",
        "attention_one_pass_fwd_kernel",
        "attention_dq_bwd_kernel",
        "attention_dkv_bwd_kernel",
        "text_attention_fwd_kernel",
        "text_attention_dq_bwd_kernel",
        "text_attention_dkv_bwd_kernel",
        "qk_norm_rope_fwd_kernel",
        "qk_norm_rope_bwd_kernel",
        "sum_chunks_kernel",
        "swiglu_fwd_kernel",
        "swiglu_bwd_kernel",
        "sampler_update_kernel",
        "trajectory_kernel",
    }
    weighed = {m.kernel for case, m in machines if m.kernel in case.dot_flop}
    assert weighed == {k for k in kernels if k.startswith(("attention", "text", "trajectory"))}


def test_head_dim_72_needs_80_columns(machines):
    """The work is exactly 80/72 of the ideal; one piece of 128 would make it 128/72."""
    seen = 0
    for case, machine in machines:
        if case.label.startswith("d72 ") and machine.kernel in case.dot_flop:
            assert machine.dot_flop == case.dot_flop[machine.kernel]
            seen += 1
    assert seen >= 10


def test_the_gate_sees_each_fault():
    """The gate passes a sound launch, and finds each fault that is put into its result."""
    case = next(c for c in gate_cases.cases("sm_90") if c.label.startswith("d72 N256 bf16"))
    machine = aot.compile_launch(aot.record(case.call)[0], "sm_90")
    assert gate.faults(case, machine) == []
    flop = case.dot_flop[machine.kernel]
    for wrong, words in [
        ({"spills": 2}, "2 spills"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": 228 << 10}, "shared memory"),
        ({"tensor_memory": 513}, "tensor memory"),
        ({"dot_flop": int(flop * 128 / 80)}, "1.60x the matrix work"),
        ({"matrix_flop": int(flop * 2)}, "repeat matrix work 2.00 times"),
        ({"matrix": {"HMMA": 80}}, "no HGMMA among"),
        ({"loads": {64: 10}}, "loads of 64 bits"),
        ({"num_warps": 16, "registers": 255}, "no multiprocessor holds 16 warps of 255 registers"),
    ]:
        (fault,) = gate.faults(case, replace(machine, **wrong))
        assert words in fault


def test_what_the_compiler_refuses_is_a_fault():
    case = next(gate_cases.cases("sm_100"))
    assert gate.faults(case, RuntimeError("case on sm_100: failed")) == ["case on sm_100: failed"]


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_attentions_default_keeps_the_most_warps_resident(arch):
    """This holds at XL's head dim, among the tiles that do not starve the matrix instructions."""
    B, N, h, d = 2, 256, 16, 72
    qkv, out = (gate_cases._meta(B, N, width, dtype=torch.bfloat16) for width in (3 * h * d, h * d))
    lse = gate_cases._meta(B, h, N, dtype=torch.float32)
    configs = attention_configs.attention_fwd_configs(N, torch.bfloat16, arch)
    sound = [
        c for c in configs if c.kwargs["BN"] >= 64 and (arch == "sm_90" or c.kwargs["BM"] > 64)
    ]
    jobs = [
        (str(i), partial(attention.attention_fwd, qkv, h, config), arch)
        for i, config in enumerate(sound)
    ]
    default, *others = (m for _, m in aot.compile_all(jobs, len(os.sched_getaffinity(0))))
    assert sound[0] is configs[0]
    assert default.resident_warps >= max(other.resident_warps for other in others)
    held = occupancy.CHIPS[arch].multiprocessors
    programs = B * h * N // configs[0].kwargs["BM"]
    assert occupancy.rounds(programs, default.resident, held) == 1
    if arch == "sm_90":
        assert programs == 128 and default.resident >= 3
    bwd = partial(attention.attention_bwd, out, qkv, out, lse, h)
    dq, dkv = (aot.compile_launch(launch, arch) for launch in aot.record(bwd))
    assert (dq.resident_warps, dkv.resident_warps) == ((12, 12) if arch == "sm_90" else (8, 8))
