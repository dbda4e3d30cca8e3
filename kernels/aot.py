"""Compile Triton launches ahead of time, without a GPU, and read their machine code.

`record` runs a launcher on "meta" tensors and keeps its launches instead of making them.
`compile_launch` sends one through Triton's own specialisation and compiler, so that no signature
is kept by hand and the code that is judged is the code that would run.

Matrix work is counted in two ways, which see different things. `dot_flop` sums 2 M N K over the
`tt.dot`s of the TTIR and counts each loop body once; it is the same for every architecture and
shows how much the source pads its tiles. `matrix_flop` sums the shapes of the matrix instructions.
It shows the work that warps repeat because a tile is too small for them, but it also counts
unrolled loops and the iterations that the software pipeliner peels (measured for a plain matmul
loop: 3x on gfx942, 2x on sm_100), so that the two agree only for straight code. Judge padding by
the first, and use the second as a check.
"""

from __future__ import annotations

import math
import multiprocessing
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastdit.kernels import occupancy

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# Bytes of shared memory that one block may use: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability" (163, 227, 227 KB); AMD CDNA3 ISA guide, "Local Data
# Share" (64 KB).
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}

# Columns of tensor memory of a multiprocessor (PTX ISA, "tcgen05"); only sm_100 has it.
TENSOR_MEMORY_LIMIT = 512


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel with its arguments by name, its compile options and its grid."""

    kernel: JITFunction
    args: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]


@dataclass(frozen=True)
class Machine:
    """The contents of a kernel's machine code; an instruction counts once, however often it runs.

    Attributes:
        registers: 32-bit registers per thread; on gfx942 VGPRs and AGPRs.
        spills: STL and LDL instructions; on gfx942 spilled VGPRs.
        sgpr_spills: spilled scalar registers of gfx942, which may go to VGPR lanes.
        stack: bytes of stack and local memory per thread.
        shared: bytes of shared memory per block.
        tensor_memory: columns of tensor memory; 0 on all but sm_100.
        loads, stores: numbers of instructions on global memory by width in bits; cp.async counts
            as a load, and a bulk (TMA) copy as 128 bits.
        matrix: numbers of matrix instructions by family: HMMA, HGMMA, UTCHMMA, v_mfma.
        dot_flop: FLOP of a block's `tt.dot`s, each loop body once.
        matrix_flop: FLOP of a block's matrix instructions; those of UTC*MMA are read in the TTGIR.
    """

    kernel: str
    arch: str
    num_warps: int
    registers: int
    spills: int
    sgpr_spills: int
    stack: int
    shared: int
    tensor_memory: int
    loads: dict[int, int]
    stores: dict[int, int]
    matrix: dict[str, int]
    dot_flop: int
    matrix_flop: int

    @property
    def load_bits(self) -> int:
        """The width of the widest load from global memory; 0 without loads."""
        return max(self.loads, default=0)

    @property
    def resident(self) -> int:
        """The number of programs that a multiprocessor holds; 0: it cannot be launched."""
        needs = self.registers, self.shared, self.num_warps, self.tensor_memory
        return occupancy.resident(self.arch, *needs)

    @property
    def resident_warps(self) -> int:
        """The number of warps that a multiprocessor holds."""
        return self.resident * self.num_warps


def record(call: Callable[[], object]) -> list[Launch]:
    """Return the launches that `call()` would make, without making them. It is not thread-safe.

    Tensors on "meta" suffice: their addresses are their storage offsets, so that a misaligned view
    is specialised as on a GPU. Kernels under `triton.autotune` need exactly one configuration.

    Args:
        call: runs a launcher on tensors.

    Returns:
        The launches in order.

    Raises:
        RuntimeError: kernels are interpreted, or nothing was launched.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("interpreted kernels have no machine code: unset TRITON_INTERPRET")
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = {name: kwargs.pop(name) for name in self.arg_names if name in kwargs}
        bound = self.signature.bind(*args, **named)
        bound.apply_defaults()
        shape = grid(bound.arguments) if callable(grid) else grid
        launches.append(Launch(self, dict(bound.arguments), kwargs, tuple(shape)))

    original = JITFunction.run
    JITFunction.run = run
    try:
        call()
    finally:
        JITFunction.run = original
    if not launches:
        raise RuntimeError("the call launched no Triton kernel")
    return launches


def compile_launch(launch: Launch, arch: str) -> Machine:
    """Compile a recorded launch as Triton's JIT would on `arch`, and read its machine code.

    Args:
        launch: one of the launches that `record` returns.
        arch: a key of `TARGETS`.

    Raises:
        ValueError: arch is unknown. Errors of the compiler are passed on.
    """
    if arch not in TARGETS:
        raise ValueError(f"arch: expected one of {', '.join(TARGETS)}, got {arch!r}")
    kernel, knobs = launch.kernel, triton.knobs
    backend = make_backend(TARGETS[arch])
    # These are the steps of `JITFunction.run`, which asks the driver for the target.
    given = {
        **launch.options,
        "debug": launch.options.get("debug", kernel.debug) or knobs.runtime.debug,
        "instrumentation_mode": knobs.compilation.instrumentation_mode,
    }
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, specialization, _ = binder(**launch.args, **given)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, given, arguments, specialization, None
    )
    source = ASTSource(kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=TARGETS[arch], options=options.__dict__)
    warps = compiled.metadata.num_warps
    if TARGETS[arch].backend == "cuda":
        code = _read_nvidia(compiled.asm["cubin"], compiled.asm["ttgir"], warps)
    else:
        code = _read_amd(compiled.asm["amdgcn"], warps)
    return Machine(
        kernel=kernel.__name__,
        arch=arch,
        num_warps=warps,
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        dot_flop=_dot_flop(compiled.asm["ttir"], r"tt\.dot "),
        **code,
    )


_JOBS: list[tuple[str, Launch, str]] = []


def compile_all(
    jobs: Iterable[tuple[str, Callable[[], object], str]], processes: int
) -> list[tuple[str, Machine | RuntimeError]]:
    """Compile many launches in forked processes, which inherit the kernels, as these do not pickle.

    Args:
        jobs: (label, call, arch) of each; a call may launch several kernels.
        processes: the number of processes.

    Returns:
        (label, machine) of every launch in the jobs' order, or (label, error) if one failed.
    """
    _JOBS[:] = [(label, launch, arch) for label, call, arch in jobs for launch in record(call)]
    context = multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            results = list(pool.map(_compile_job, range(len(_JOBS))))
        return [(job[0], result) for job, result in zip(_JOBS, results, strict=True)]
    finally:
        _JOBS.clear()


def _compile_job(index: int) -> Machine | RuntimeError:
    label, launch, arch = _JOBS[index]
    try:
        return compile_launch(launch, arch)
    except Exception as error:  # Triton's own exceptions do not survive pickling
        return RuntimeError(f"{label} on {arch}: {type(error).__name__}: {error}")


def _dot_flop(ir: str, op: str) -> int:
    """Return the sum of 2 M N K over an operation's occurrences, from its operands' types."""
    total = 0
    for types in re.findall(rf"{op}.*? : (.*)", ir):
        a, b = re.findall(r"(?:tensor|memdesc)<((?:\d+x)+)", types)[:2]
        m_k, k_n = ([int(n) for n in dims.split("x")[:-1]] for dims in (a, b))
        total += 2 * math.prod(m_k) * k_n[-1]
    return total


# Opcodes that access global memory, with the width in bits of one that names none.
_NVIDIA_LOADS = {"LDG": 32, "LDGSTS": 32, "UTMALDG": 128}
_NVIDIA_STORES = {"STG": 32, "UTMASTG": 128}
_NVIDIA_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


def _read_nvidia(cubin: bytes, ttgir: str, warps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(path)]
        text = subprocess.check_output(command, stderr=subprocess.STDOUT, text=True)

    def usage(name: str) -> int:
        return max(map(int, re.findall(rf"\b{name}:(\d+)", text)))

    # "/*0a30*/   @!P0 LDG.E.128 R4, ...", with or without the predicate
    opcodes = [
        opcode.split(".")
        for opcode in re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)", text)
    ]

    def widths(moves: dict[str, int]) -> dict[int, int]:
        return Counter(
            next((_NVIDIA_BITS[s] for s in suffixes if s in _NVIDIA_BITS), moves[name])
            for name, *suffixes in opcodes
            if name in moves
        )

    matrix = [opcode for opcode in opcodes if opcode[0].endswith("MMA")]
    return {
        "registers": usage("REG"),
        "spills": sum(name in ("STL", "LDL") for name, *_ in opcodes),
        "sgpr_spills": 0,
        "stack": usage("STACK") + usage("LOCAL"),
        "loads": widths(_NVIDIA_LOADS),
        "stores": widths(_NVIDIA_STORES),
        "matrix": Counter(name for name, *_ in matrix),
        "matrix_flop": _dot_flop(ttgir, r"ttng\.tc_gen5_mma ")
        + sum(_nvidia_flop(name, suffixes, warps) for name, *suffixes in matrix),
    }


def _nvidia_flop(name: str, suffixes: list[str], warps: int) -> int:
    if name.startswith("UTC"):
        return 0  # its shape is in a descriptor; the caller counts it in the TTGIR
    shape = re.fullmatch(r"(64)x(\d+)x(\d+)|(16)(8)(\d+)", suffixes[0])
    if shape is None:
        raise ValueError(f"{name}.{suffixes[0]}: a matrix instruction of unknown shape")
    # HGMMA.64x72x16 is the work of four warps, HMMA.16816 that of one
    return 2 * math.prod(int(n) for n in shape.groups() if n) * warps // (4 if shape[1] else 1)


def _read_amd(text: str, warps: int) -> dict[str, Any]:
    def field(name: str) -> int:
        return max(map(int, re.findall(rf"\.{name}:\s+(\d+)", text)))

    bits = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}

    def widths(way: str) -> dict[int, int]:
        opcode = rf"^\s+(?:global|buffer|flat)_{way}_(?:lds_)?[us]?(dword(?:x\d)?|short|byte)"
        return Counter(bits[width] for width in re.findall(opcode, text, re.MULTILINE))

    # v_mfma_f32_32x32x8_bf16, or v_mfma_f32_32x32x4_2b_bf16 for two blocks at once
    mfma = re.findall(r"^\s+v_mfma_\w+?_(\d+)x(\d+)x(\d+)_(?:(\d+)b_)?", text, re.MULTILINE)
    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count"),
        "sgpr_spills": field("sgpr_spill_count"),
        "stack": field("private_segment_fixed_size"),
        "loads": widths("load"),
        "stores": widths("store"),
        "matrix": Counter("v_mfma" for _ in mfma),
        "matrix_flop": sum(2 * math.prod(int(n or 1) for n in dims) for dims in mfma) * warps,
    }
