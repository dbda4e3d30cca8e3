"""Occupancy: how many programs a multiprocessor holds at once, by what their machine code needs.

Sources: NVIDIA, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and
the occupancy calculator of Nsight Compute for the units in which registers and shared memory are
allocated; PTX ISA, "Tensor Memory Allocation"; AMD, CDNA3 ISA Reference Guide, "VGPR Allocation"
and "Local Data Share", and LLVM's AMDGPU backend (`AMDGPUBaseInfo`) for the waves of a SIMD.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """The resources of a multiprocessor (AMD: compute unit).

    Attributes:
        multiprocessors: how many the product named in `CHIPS` has.
        lanes: threads of a warp (AMD: wave).
        schedulers: of a multiprocessor; each holds an equal share of its warps and registers.
        warps: the most that one scheduler holds.
        programs: the most that a multiprocessor holds.
        registers: 32-bit registers of a scheduler, all lanes together.
        register_unit: a warp's registers, all lanes together, are a multiple of it.
        shared: bytes of shared memory (AMD: LDS).
        shared_unit: a program's bytes of shared memory are a multiple of it.
        shared_reserved: bytes of shared memory that the system takes for each program.
        tensor_memory: columns of tensor memory.
    """

    multiprocessors: int
    lanes: int
    schedulers: int
    warps: int
    programs: int
    registers: int
    register_unit: int
    shared: int
    shared_unit: int
    shared_reserved: int
    tensor_memory: int = 0


def _nvidia(multiprocessors: int, warps: int, programs: int, kb: int, columns: int = 0) -> Chip:
    registers = (16384, 256)  # 65,536 for four schedulers
    shared = (kb << 10, 128, 1024)
    return Chip(multiprocessors, 32, 4, warps // 4, programs, *registers, *shared, columns)


CHIPS: dict[str, Chip] = {
    "sm_80": _nvidia(108, 64, 32, 164),  # A100
    "sm_86": _nvidia(84, 48, 16, 100),  # RTX 3090, A40
    "sm_89": _nvidia(142, 48, 24, 100),  # L40S
    "sm_90": _nvidia(132, 64, 32, 228),  # H100 SXM, H200
    "sm_100": _nvidia(148, 64, 32, 228, 512),  # B200
    "gfx942": Chip(304, 64, 4, 8, 32, 512 * 64, 8 * 64, 64 << 10, 512, 0),  # MI300X
}


def resident(arch: str, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> int:
    """Return how many programs of one kernel a multiprocessor holds; 0: it cannot be launched.

    Args:
        arch: a key of `CHIPS`.
        registers: registers per thread, as the compiler reports them.
        shared: bytes of shared memory per program.
        warps: warps per program.
        tensor_memory: columns of tensor memory per program.
    """
    chip = CHIPS[arch]
    of_warp = _up(max(1, registers) * chip.lanes, chip.register_unit)
    held = chip.schedulers * min(chip.warps, chip.registers // of_warp)
    limits = [chip.programs, held // warps]
    if taken := _up(shared + chip.shared_reserved, chip.shared_unit):
        limits.append(chip.shared // taken)
    if tensor_memory:  # a power of two, at least 32
        limits.append(chip.tensor_memory // max(32, 1 << (tensor_memory - 1).bit_length()))
    return min(limits)


def rounds(programs: int, resident: int, multiprocessors: int) -> int:
    """Return how many times all multiprocessors are filled, `resident` programs each."""
    return -(-programs // (resident * multiprocessors))


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
