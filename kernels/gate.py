"""The ahead-of-time gate: what the machine code of every shipped launch must be like.

`gate_cases.cases` lists the launches that the package may make. `faults` says what is wrong with
the machine code of one of them: spills, more shared memory than the chip has, no matrix
instructions where they apply, more matrix work than the shape needs, or narrow loads.
"""

from __future__ import annotations

from fastdit.kernels.aot import SHARED_LIMIT, TENSOR_MEMORY_LIMIT, Machine
from fastdit.kernels.gate_cases import Case

MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}

# Matrix work may be 15% above that of the padded columns, 80 for a head dim of 72.
PADDING = 1.15

# Launches of sm_80 also run on sm_86, sm_89 and sm_120, which have less shared memory (see
# `aot.SHARED_LIMIT` for the source).
_SM_86_SHARED = 99 << 10


def faults(case: Case, machine: Machine | RuntimeError) -> list[str]:
    """Return what is wrong with the machine code; the list is empty for a launch that may ship.

    Args:
        case: one of `gate_cases.cases`.
        machine: its result of `aot.compile_all`, which may be the compiler's error.
    """
    if isinstance(machine, RuntimeError):
        return [str(machine)]
    found = []
    if machine.spills or machine.stack:
        found.append(f"{machine.spills} spills, {machine.stack} bytes of stack")
    limit = _SM_86_SHARED if case.arch == "sm_80" else SHARED_LIMIT[case.arch]
    if machine.shared > limit:
        found.append(f"{machine.shared} bytes of shared memory, limit {limit}")
    if machine.tensor_memory > TENSOR_MEMORY_LIMIT:
        found.append(f"{machine.tensor_memory} columns of tensor memory")
    if not machine.resident and not found:
        found.append(
            f"no multiprocessor holds {machine.num_warps} warps of {machine.registers} registers"
        )
    # 128 bits for each of AMD's 64 lanes would need tiles of twice the size.
    if case.wide_loads and machine.load_bits < (64 if case.arch == "gfx942" else 128):
        found.append(f"loads of {machine.load_bits} bits")
    needed = case.dot_flop.get(machine.kernel)
    if needed is None:
        return found
    if machine.dot_flop > PADDING * needed:
        found.append(f"{machine.dot_flop / needed:.2f}x the matrix work the shape needs")
    # On other architectures software pipelining copies loop bodies, so static counts say nothing.
    straight = case.arch in ("sm_80", "sm_90")
    if straight and machine.matrix_flop > PADDING * case.repeats * needed:
        found.append(f"warps repeat matrix work {machine.matrix_flop / needed:.2f} times")
    # Warp groups take 64 rows, and tensor memory takes 64 lanes; smaller tiles use HMMA.
    family = MATRIX[case.arch] if case.rows[machine.kernel] >= 64 else "HMMA"
    family = "v_mfma" if case.arch == "gfx942" else family
    if not machine.matrix.get(family):
        found.append(f"no {family} among {dict(machine.matrix)}")
    return found
