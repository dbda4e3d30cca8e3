"""What the default launch of every kernel compiles to, on four architectures, without a GPU.

`benchmarks/report.py --aot --every` judges every configuration the tuner may choose.
"""

import os
from collections import Counter
from dataclasses import replace

import pytest

from fastdit.kernels import aot, gate

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels have no machine code", allow_module_level=True)


@pytest.fixture(scope="module", params=aot.TARGETS, ids=str)
def compiled(request):
    """[(case, machine)] of an architecture."""
    cases = list(gate.cases(request.param))
    jobs = [(str(i), case.call, case.arch) for i, case in enumerate(cases)]
    results = aot.compile_all(jobs, processes=len(os.sched_getaffinity(0)))
    return [(cases[int(label)], machine) for label, machine in results]


def test_no_launch_has_a_fault(compiled):
    failed = [str(m) for _, m in compiled if isinstance(m, RuntimeError)]
    faults = [
        f"{m.kernel}, {case.label}, {m.arch}: {fault}"
        for case, m in compiled
        if not isinstance(m, RuntimeError)
        for fault in gate.faults(case, m)
    ]
    assert not failed + faults, "\n".join(failed + faults)


def test_every_kernel_is_judged(compiled):
    """Both attention forwards, and matrix work of every 16-bit kernel that has any."""
    kernels = Counter(machine.kernel for _, machine in compiled)
    assert set(kernels) == {
        "layer_norm_modulate_fwd_kernel",
        "layer_norm_modulate_bwd_kernel",
        "sum_partials_kernel",
        "attention_fwd_kernel",
        "attention_one_pass_fwd_kernel",
        "attention_dq_bwd_kernel",
        "attention_dkv_bwd_kernel",
        "sampler_update_kernel",
        "trajectory_kernel",
    }
    weighed = {m.kernel for case, m in compiled if m.kernel in case.dot_flop}
    assert weighed == {k for k in kernels if k.startswith(("attention", "trajectory"))}


def test_head_dim_72_needs_80_columns(compiled):
    """Exactly 80/72 of the ideal, where one piece of 128 would be 128/72."""
    seen = 0
    for case, machine in compiled:
        if case.label.startswith("d72 ") and machine.kernel in case.dot_flop:
            assert machine.dot_flop == case.dot_flop[machine.kernel]
            seen += 1
    assert seen >= 10


def test_the_gate_sees_each_fault():
    """A gate that finds nothing proves nothing: one sound launch, then each thing wrong with it."""
    case = next(c for c in gate.cases("sm_90") if c.label.startswith("d72 N256 bf16"))
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
    ]:
        (fault,) = gate.faults(case, replace(machine, **wrong))
        assert words in fault
