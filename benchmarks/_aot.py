"""What each kernel compiles to, by architecture: `report.py --aot`. It asks for no GPU."""

from __future__ import annotations

import sys
from typing import Any

from _harness import table

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


def run(stage: Any) -> None:
    """Each kernel's machine code by architecture; no GPU is asked for."""
    from fastdit.kernels import aot as compiler
    from fastdit.kernels import gate

    match = stage.args.match

    def matches(case: Any) -> bool:
        kernels = (launch.kernel.__name__ for launch in compiler.record(case.call))
        return not match or any(match in f"{kernel} {case.label}" for kernel in kernels)

    def compile_some(chunk: list) -> dict[str, Any]:
        jobs = [(str(i), case.call, case.arch) for i, case in enumerate(chunk)]
        done = compiler.compile_all(jobs, stage.args.processes)
        return {"rows": [_row(chunk[int(i)], machine_code, gate) for i, machine_code in done]}

    units = {}
    for arch in stage.args.arch:
        cases = [case for case in gate.cases(arch, stage.args.every) if matches(case)]
        for i in range(0, len(cases), 32):
            chunk = cases[i : i + 32]
            name = f"{arch} {i + 1} to {i + len(chunk)} of {len(cases)}"
            units[name] = lambda chunk=chunk: compile_some(chunk)
    if not units:
        sys.exit(f"aot: no kernel or case has {match!r} in its name")
    stage.run(units)
    rows = [row for unit in stage.units.values() for row in unit["rows"]]
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
