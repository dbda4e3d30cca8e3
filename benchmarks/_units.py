"""The units of a report, the most valuable first: `plan` on a GPU, `DRY` elsewhere."""

from __future__ import annotations

from typing import Any

from _harness import Row, columns, table
from _ops import (
    ATTENTION,
    CROSS,
    GATED_LN,
    GATED_RMS,
    JOINT,
    PLAIN_LN,
    PLAIN_RMS,
    QK,
    SWIGLU,
    UPDATE,
)
from _runner import Unit

START = 30.0  # seconds of the first `import torch` on a machine
GRAPH, EAGER = "fastdit graph", "fastdit eager"
XL = ("--preset", "DiT-XL/2")
XL_SAMPLING = (*XL, "--dtype", "bfloat16", "--steps", 10, "--batch", 2, 32, 128)
GROWING = ("--batch", 64, 128, 192, 256, 384)  # until memory is exhausted
XL_TRAINING = (*XL, "--precision", "bfloat16", "--rounds", 3, "--steps", 3)

# Sources of the estimates. The host's work is in CPU seconds on one core, with compilation, and was
# measured with a simulated driver whose kernels do nothing.
HOST = "host's work"
TIMED = f"{HOST}; 0.2 s for each configuration"
CALLS = f"{HOST}; 0.3 s for each way"
BOTH = f"{HOST}; the device's by FLOP at 475 TFLOP/s"
KERNELS = "923 kernels of 0.25 s on all CPUs, and starting the processes"
ON_CPU = "a CPU"


def _sample(*options: Any) -> tuple[Any, ...]:
    return "sample_throughput.py", *options


def _train(*options: Any) -> tuple[Any, ...]:
    return "train_throughput.py", *XL_TRAINING, *options


def _tune(group: str) -> tuple[Any, ...]:
    return "_tune.py", "--group", group


def _kernels(op: str, estimate: float) -> Unit:
    name = f"kernels-{op.replace('_', '-')}"
    return Unit(name, ("kernels.py", "--op", op), estimate, 2 * estimate, CALLS)


def plan(processes: int) -> list[Unit]:
    """Return all units for a GPU, the most decisive first; tests run in `processes` processes."""
    toy = ("--preset", "toy", "--dtype", "float32", "bfloat16", "--batch", 1, 132, 1056)
    beside = (GRAPH, "reference eager", "reference compiled")
    smaller = ("--preset", "DiT-B/2", "DiT-S/2", *XL_SAMPLING[2:])
    memory = (*XL, "--dtype", "bfloat16", "--steps", 250, "--rounds", 1, "--batch", 8)
    by_block, compiled = "fastdit by block", "plain compiled"
    smoke = ("_tests.py", "--processes", 1, "tests/kernels/test_smoke.py")
    tests = ("_tests.py", "--processes", processes)
    own = ("--rounds", 5, "--way", GRAPH, EAGER)
    return [
        Unit("smoke", smoke, 40, 75, HOST),
        Unit("xl", _sample(*XL_SAMPLING, *own), 40, 90, BOTH),
        Unit("toy", _sample(*toy, "--way", GRAPH, "fastdit trajectory"), 40, 90, HOST),
        Unit("tune", _tune("xl"), 35, 80, TIMED),
        Unit("tune-trajectory", _tune("trajectory"), 15, 50, TIMED),
        Unit("xl-beside", _sample(*XL_SAMPLING, "--way", *beside), 130, 240, BOTH),
        _kernels(ATTENTION, 90),
        _kernels(GATED_LN, 60),
        _kernels(PLAIN_LN, 60),
        _kernels(UPDATE, 30),
        _kernels(QK, 45),
        _kernels(SWIGLU, 45),
        _kernels(CROSS, 40),
        _kernels(JOINT, 40),
        _kernels(GATED_RMS, 20),
        _kernels(PLAIN_RMS, 20),
        Unit("train", _train("--batch", 32, "--way", by_block), 50, 120, BOTH),
        Unit("train-beside", _train("--batch", 32, "--way", by_block, compiled), 150, 240, BOTH),
        Unit("train-growing", _train(*GROWING, "--way", by_block), 90, 150, BOTH),
        Unit("tests", (*tests, "tests/kernels"), 200, 300, KERNELS),
        Unit("tests-elsewhere", (*tests, "--marked", "gpu", "tests"), 60, 120, KERNELS),
        Unit("tune-others", _tune("others"), 40, 90, TIMED),
        Unit("xl-memory", _sample(*memory, "--way", GRAPH), 30, 60, BOTH),
        Unit("smaller", _sample(*smaller, "--way", GRAPH, EAGER), 35, 80, BOTH),
    ]


# Tiny units, which show on a CPU that the machinery works; their speeds mean nothing.
_SHORT = ("--rounds", 1, "--way")
_SAMPLE = ("--preset", "toy", "--batch", 2, "--steps", 2, *_SHORT, "reference eager", EAGER)
_TRAIN = ("--batch", 16, "--per-class", 2, "--steps", 1, *_SHORT, "plain eager", EAGER)
DRY = [
    Unit("kernels", ("kernels.py", "--quick"), 60, 600, ON_CPU),
    Unit("sample", ("sample_throughput.py", *_SAMPLE), 10, 600, ON_CPU),
    Unit("train", ("train_throughput.py", *_TRAIN), 10, 600, ON_CPU),
]

COLUMNS = columns("unit; estimate s, cap s, so far s: .0f")


def plan_table(units: list[Unit]) -> str:
    """Return a table of the units in order, with the time at which each should have ended."""
    so_far, words = START, [("estimate from", "command"), ("a first import of torch", "")]
    rows: list[Row] = [{"unit": "(start)", "estimate s": START, "so far s": START}]
    for unit in units:
        so_far += unit.estimate
        row = {"unit": unit.name, "estimate s": unit.estimate, "cap s": unit.cap}
        rows.append(row | {"so far s": so_far})
        words.append((unit.source, " ".join(map(str, unit.command))))
    width = max(len(source) for source, _ in words)
    lines = zip(table(COLUMNS, rows).splitlines(), words, strict=True)
    return "\n".join(f"{line}  {src:{width}}  {command}".rstrip() for line, (src, command) in lines)
