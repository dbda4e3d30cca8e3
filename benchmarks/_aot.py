"""What each kernel compiles to, by architecture: `report.py --aot`. It asks for no GPU."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from _harness import table
from _runner import DONE, Document
from tqdm import tqdm

CHUNK = 32  # launches between two writes
ARCHES = ("sm_80", "sm_90", "sm_100", "gfx942")
FAULTS = "faults"
COLUMNS = {
    "kernel": "",
    "case": "",
    "arch": "",
    "warps": "d",
    "registers": "d",
    "spills": "d",
    "shared KB": ".1f",
    "programs": "d",
    "resident warps": "d",
    "load bits": "d",
    "matrix": "",
    "work": ".2f",
    FAULTS: "",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("machine code")
    own.add_argument("--aot", action="store_true", help="compile every kernel; no GPU is asked for")
    own.add_argument("--every", action="store_true", help="not only the default configurations")
    own.add_argument("--arch", nargs="+", choices=ARCHES, default=list(ARCHES), metavar="ARCH")
    own.add_argument("--match", metavar="PART", help="of a kernel's or a case's name")


def run(args: argparse.Namespace, facts: dict[str, Any], deadline: float) -> None:
    """Compile and judge; the file is written anew after every 32 launches.

    Args:
        args: `add_arguments`'s, and out, processes and resume of the report.
        facts: of `_harness.machine`.
        deadline: after it no more are compiled, by `time.monotonic`.
    """
    from fastdit.kernels import aot as compiler
    from fastdit.kernels import gate

    def matches(case: Any) -> bool:
        kernels = (launch.kernel.__name__ for launch in compiler.record(case.call))
        return not args.match or any(args.match in f"{name} {case.label}" for name in kernels)

    units: dict[str, list[Any]] = {}
    for arch in args.arch:
        cases = [case for case in gate.cases(arch, args.every) if matches(case)]
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
            print(f"aot: left out at the limit: {', '.join(document.left_out)}")
            break
        jobs = [(str(i), case.call, case.arch) for i, case in enumerate(units[name])]
        done = compiler.compile_all(jobs, args.processes)
        document.left_out.remove(name)
        rows = [_row(units[name][int(i)], code, gate) for i, code in done]
        document.put(name, {"status": DONE}, rows)
    rows = document.rows
    print(table(COLUMNS, rows))
    print(f"{len(rows)} launches, {sum(row[FAULTS] != 'none' for row in rows)} with faults")


def _row(case: Any, code: Any, gate: Any) -> dict[str, Any]:
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
        "programs": code.resident,  # that a multiprocessor holds at once
        "resident warps": code.resident_warps,
        "load bits": code.load_bits,
        "matrix": " ".join(f"{n} {name}" for name, n in code.matrix.items()) or "-",
        "work": code.dot_flop / needed if needed else None,
        FAULTS: "; ".join(gate.faults(case, code)) or "none",
    }
