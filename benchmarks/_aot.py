"""What each kernel compiles to, by architecture, for `report.py --aot`. It needs no GPU."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from _harness import Row, columns, table
from _runner import DONE, Document
from tqdm import tqdm

CHUNK = 32  # launches between two writes of the file
ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")
FAULTS = "faults"
COLUMNS = columns(
    "kernel, case, arch; warps, registers, spills: d; shared KB: .1f; "
    f"programs, resident warps, load bits: d; matrix; work: .2f; {FAULTS}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("machine code")
    own.add_argument("--aot", action="store_true", help="compile every kernel; needs no GPU")
    own.add_argument("--every", action="store_true", help="not only default configurations")
    own.add_argument("--arch", nargs="+", choices=ARCHES, default=list(ARCHES), metavar="ARCH")
    own.add_argument("--match", metavar="PART", help="only kernels or cases with PART in the name")


def run(args: argparse.Namespace, facts: Row, deadline: float) -> None:
    """Compile and check the kernels; the file is rewritten after every 32 launches.

    Args:
        args: from `add_arguments`, with the report's out, processes and resume.
        facts: what `_harness.machine` returned.
        deadline: when to stop compiling, by `time.monotonic`.
    """
    from fastdit.kernels import aot as compiler
    from fastdit.kernels import gate, gate_cases

    def matches(case: Any) -> bool:
        launches = compiler.record(case.call)
        return any(args.match in f"{launch.kernel.__name__} {case.label}" for launch in launches)

    units: dict[str, list[Any]] = {}
    for arch in args.arch:
        cases = [c for c in gate_cases.cases(arch, args.every) if not args.match or matches(c)]
        for i in range(0, len(cases), CHUNK):
            chunk = cases[i : i + CHUNK]
            units[f"{arch} {i + 1} to {i + len(chunk)} of {len(cases)}"] = chunk
    if not units:
        sys.exit(f"aot: no kernel or case has {args.match!r} in its name")
    document = Document(args.out / "aot" / "aot.json", facts, vars(args))
    if args.resume:
        document.load(args.resume / "aot" / "aot.json")
    document.left_out = [name for name in units if not document.is_done(name)]
    for name in tqdm(list(document.left_out), desc="aot", mininterval=5):
        if time.monotonic() > deadline:
            print(f"aot: left out because of the limit: {', '.join(document.left_out)}")
            break
        jobs = [(str(i), case.call, case.arch) for i, case in enumerate(units[name])]
        done = compiler.compile_all(jobs, args.processes)
        document.left_out.remove(name)
        rows = [_row(units[name][int(i)], code, gate) for i, code in done]
        document.put(name, {"status": DONE}, rows)
    rows = document.rows
    print(table(COLUMNS, rows))
    print(f"{len(rows)} launches, {sum(row[FAULTS] != 'none' for row in rows)} with faults")


def _row(case: Any, code: Any, gate: Any) -> Row:
    row = {"case": case.label, "arch": case.arch}
    if isinstance(code, RuntimeError):
        return row | {"kernel": "-", FAULTS: str(code)}
    needed = case.dot_flop.get(code.kernel)
    return row | {
        "kernel": code.kernel,
        "warps": code.num_warps,
        "registers": code.registers,
        "spills": code.spills,
        "shared KB": code.shared / 1024,
        "programs": code.resident,  # resident on a multiprocessor
        "resident warps": code.resident_warps,
        "load bits": code.load_bits,
        "matrix": " ".join(f"{n} {name}" for name, n in code.matrix.items()) or "-",
        "work": code.dot_flop / needed if needed else None,
        FAULTS: "; ".join(gate.faults(case, code)) or "none",
    }
