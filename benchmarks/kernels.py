"""Each op, forward and backward, beside what PyTorch has for it, with the error beside the speed.

    python benchmarks/kernels.py             # a table, with --json a file; on a CPU in float32
    python benchmarks/kernels.py --quick --op attention         # tiny shapes
    pytest benchmarks/kernels.py --benchmark-enable -k attention

In both cases pytest-benchmark does the timing, with a clock that waits for the device. On a GPU a
timed call is one of the calls in a CUDA graph, which measures device time without the gaps between
launches. A way that cannot be captured is timed by plain calls, and "timed" says so. "alone us" is
the same call made from Python, including launches and synchronization. The calls take turns over
copies of the inputs that together exceed twice the L2 cache, so that data comes from memory; each
copy has results of its own. A backward is timed alone, with its graph retained. On a CPU the calls
are plain calls and the caches are warm.

GB/s and TFLOP/s are computed from `work`, which is what the op must move and multiply, whatever a
way really does. The ceilings are measured in the same run: a copy of similar size, and the best
matrix product of the dtype. "share" is the time of the ceiling over the time of the call, "ratio"
the time of the eager reference over the time of the call.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # pytest's importlib mode does not

import _harness as harness  # noqa: E402
import _ops as ops  # noqa: E402
from _harness import Results, Row, positive, seconds, table  # noqa: E402
from _ops import Case  # noqa: E402

from fastdit import testing  # noqa: E402

COLUMNS = harness.columns(
    "op, pass, way, shape, dtype; us, min, max: .1f; timed; alone us, GB/s: .1f; "
    "TFLOP/s, share, ratio: .2f; error: .1e"
)
SUMMARY = harness.columns("op, pass, shape, dtype; us: .0f; ratio, of compiled: .2f; error: .1e")


def calls(case: Case, function: Callable[..., Any], backward: bool, device: torch.device) -> list:
    """Return one call for each copy of the inputs; for a backward, the forward has run."""

    def call(seed: int) -> Callable[[], Any]:
        tensors, options = ops.inputs(case, device, seed)
        if not backward:
            return torch.no_grad()(lambda: function(*tensors, **options))
        leaves = [t.detach().requires_grad_() for t in tensors]
        weights = [o for o in options.values() if isinstance(o, torch.Tensor) and o.requires_grad]
        outs = ops.outputs(function(*leaves, **options))
        upstream = [torch.randn_like(out) for out in outs]
        asked = leaves + weights
        return lambda: torch.autograd.grad(outs, asked, upstream, retain_graph=True)

    return [call(seed) for seed in range(ops.copies(ops.work(case, backward)[0], device))]


def clock() -> float:
    """The clock of pytest-benchmark, which waits until the device has finished."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(benchmark: Any, turns: list, args: argparse.Namespace) -> Row:
    """Time the calls in turn; all figures come from this function.

    On a GPU a graph holds 16 calls or more and is replayed whenever as many have been requested, so
    that pytest-benchmark divides by the right number; a round lasts at least 2 ms.
    """
    for turn in turns * 2:
        turn()
    cycle = itertools.cycle(turns)
    alone = [seconds(turn, args.device) for turn in itertools.islice(cycle, 11)]
    row: Row = {"copies": len(turns), "alone us": statistics.median(alone) * 1e6, "timed": "calls"}

    def once() -> None:
        next(cycle)()

    target, iterations = once, 1
    if args.device.type == "cuda":
        replay, held = once, 1
        try:
            replay, held = harness.capture(turns, torch.cuda.current_stream())
            row["timed"] = "graph"
        except RuntimeError as error:  # some of the other projects' ways cannot be captured
            row["reason"] = str(error).splitlines()[0]
        iterations = held * math.ceil(max(1.0, 2e-3 / seconds(replay, args.device)))
        counter = itertools.count(1)

        def target() -> None:
            if next(counter) % held == 0:
                replay()

    benchmark.pedantic(target, rounds=args.rounds, iterations=iterations, warmup_rounds=2)
    if not benchmark.enabled:
        return row
    stats = benchmark.stats.stats
    return row | {"us": stats.median * 1e6, "min": stats.min * 1e6, "max": stats.max * 1e6}


@pytest.fixture
def args(request: pytest.FixtureRequest) -> argparse.Namespace:
    return _args(request.config)


def _args(config: pytest.Config) -> argparse.Namespace:
    script = config.pluginmanager.get_plugin("kernels-script")
    return script.args if script else parse([])


@pytest.fixture(autouse=True)
def side_stream(args: argparse.Namespace) -> Any:
    """Use a stream other than the default one, as capture needs; a backward runs on it too."""
    torch._dynamo.reset()
    if args.device.type == "cpu":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
    torch.cuda.empty_cache()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = _args(metafunc.config)
    on_cpu = options.device.type == "cpu"
    known = ops.QUICK if options.quick else ops.CPU if on_cpu else ops.FULL
    chosen = [case for case in known if case.op in options.op]
    if metafunc.function is test_op:
        cases = [
            pytest.param(case, way, name, id=f"{case}-{name}-{way}".replace(" ", "-"))
            for name in ("forward", "backward")  # in this order, since sampling needs no backward
            for case in chosen
            for way in ops.ways(case, options.quick)
            if name == "forward" or _has_backward(case, way, options.quick)
        ]
        metafunc.parametrize(("case", "way", "direction"), cases)
    elif metafunc.function is test_copy:
        moved = {_power_of_two(ops.work(case, b)[0]) for case in chosen for b in (False, True)}
        metafunc.parametrize("moved", sorted(moved), ids="{}B".format)
    elif metafunc.function is test_matmul:
        dtypes = dict.fromkeys(case.dtype for case in chosen if case.op == ops.ATTENTION)
        sizes = {"bfloat16": (8192, 4096), "float32": (4096,)}
        if options.quick or on_cpu:
            sizes = dict.fromkeys(sizes, (256,) if options.quick else (1024,))
        products = [(dtype, n) for dtype in dtypes for n in sizes[dtype]]
        metafunc.parametrize(("dtype", "n"), products)


def _has_backward(case: Case, way: str, quick: bool) -> bool:
    # Compiling a backward takes a minute on a CPU.
    return case.op != ops.UPDATE and not (quick and way == "compiled")


def _power_of_two(n: int) -> int:
    return 2 ** round(math.log2(n))


timed = pytest.mark.benchmark(timer=clock)


@timed
def test_copy(moved, args, benchmark, record_property):
    elements = max(1, moved // 4)  # half of the bytes are read; an element has 2 bytes
    size = f"{moved / 2**20:.4g} MiB"
    row = {"op": "copy", "pass": "ceiling", "way": "copy_", "shape": size, "dtype": "bfloat16"}
    row |= {"bytes": 4 * elements, "flop": 0}
    buffers = [
        torch.randn(2, elements, device=args.device).bfloat16()
        for _ in range(ops.copies(moved, args.device))
    ]
    turns = [lambda b=b: b[1].copy_(b[0]) for b in buffers]
    record_property("row", row | measure(benchmark, turns, args))


@timed
def test_matmul(dtype, n, args, benchmark, record_property):
    moved = 3 * n * n * ops.DTYPES[dtype].itemsize
    row = {"op": "matmul", "pass": "ceiling", "way": "@", "shape": f"{n}^3", "dtype": dtype}
    row |= {"bytes": moved, "flop": 2 * n**3}
    pairs = [
        torch.randn(2, n, n, device=args.device).to(ops.DTYPES[dtype])
        for _ in range(ops.copies(moved, args.device))
    ]
    turns = [lambda p=p: p[0] @ p[1] for p in pairs]
    record_property("row", row | measure(benchmark, turns, args))


@timed
def test_op(case, way, direction, args, benchmark, record_property):
    device, backward = args.device, direction == "backward"
    benchmark.group = f"{case} {direction}"
    moved, flop = ops.work(case, backward)
    row = {"op": case.op, "pass": direction, "way": way, "shape": case.size, "dtype": case.dtype}
    row |= {"bytes": moved, "flop": flop}
    function = ops.make(way, case.op, device)
    try:
        tensors, options = ops.inputs(case, device, seed=0)
        with warnings.catch_warnings():
            if way in ops.SDPA:
                warnings.simplefilter("ignore")  # the row says why a kernel cannot run
            if not backward:
                with torch.no_grad():
                    result = ops.outputs(function(*tensors, **options))
            # With donated buffers a compiled backward could run only once.
            with torch._functorch.config.patch(donated_buffer=False):
                turns = calls(case, function, backward, device)
                turns[0]()
    except torch.cuda.OutOfMemoryError:
        row["us"] = "out of memory"
    except RuntimeError as error:
        if way not in ops.SDPA:
            raise
        row |= {"us": "not available", "reason": str(error).splitlines()[0]}
    if "us" in row:
        record_property("row", row)
        pytest.skip(f"{way}: {row['us']}")
    if not backward:
        row["error"] = max(map(testing.relative_error, result, ops.oracle(case, device)))
        del result
    record_property("row", row | measure(benchmark, turns, args))


def _key(row: Row) -> tuple[str, ...]:
    return row["op"], row["pass"], row["shape"], row["dtype"]


def derive(rows: list[Row]) -> None:
    """Add what follows from the times: rates, share of the ceiling, ratio to eager."""
    done = [row for row in rows if isinstance(row.get("us"), float)]
    for row in done:
        row["GB/s"] = row["bytes"] / row["us"] / 1e3
        row["TFLOP/s"] = row["flop"] / row["us"] / 1e6 if row["flop"] else None
    copy = {row["bytes"]: row["GB/s"] for row in done if row["op"] == "copy"}
    peak: dict[str, float] = {}
    for row in done:
        if row["op"] == "matmul":
            peak[row["dtype"]] = max(row["TFLOP/s"], peak.get(row["dtype"], 0.0))
    eager = {_key(row): row["us"] for row in done if row["way"] == "eager"}
    for row in done:
        row["ratio"] = None
        if row["pass"] == "ceiling":
            continue
        floors = [row["flop"] / peak[row["dtype"]] / 1e6] if row["dtype"] in peak else []
        if copy:
            nearest = min(copy, key=lambda size: abs(math.log(size / row["bytes"])))
            floors.append(row["bytes"] / copy[nearest] / 1e3)
        row["share"] = max(floors) / row["us"] if floors else None
        if base := eager.get(_key(row)):
            row["ratio"] = base / row["us"]


def summary(rows: list[Row]) -> list[Row]:
    """Return fastdit's rows only, each with the ratio of the compiled reference added."""
    compiled = {_key(row): row.get("ratio") for row in rows if row["way"] == "compiled"}
    own = [row for row in rows if row["way"] == "fastdit"]
    return [row | {"of compiled": compiled.get(_key(row))} for row in own]


class Script:
    """The plugin of `python benchmarks/kernels.py`, which writes each row to the file at once."""

    __name__ = "kernels-script"  # the name under which pytest registers it

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.results = args, Results.of(args, args.device)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            for name, row in report.user_properties:
                if name == "row":
                    self.results["rows"].append(row)
                    derive(self.results["rows"])
                    self.results.write()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = harness.parser(__doc__, device=True)
    parser.add_argument("--op", nargs="+", choices=ops.OPS, default=list(ops.OPS), metavar="OP")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--rounds", type=positive, help="timed rounds; default 30, quick 5")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (5 if args.quick else 30)
    return args


def main() -> None:
    args = parse()
    script = Script(args)
    options = ["-c", harness.ROOT / "pyproject.toml", "-o", "addopts=--import-mode=importlib", "-q"]
    options += ["--no-header", "--benchmark-quiet", "-p", "no:cacheprovider", __file__]
    with harness.fresh_compile_cache():
        code = pytest.main([str(option) for option in options], plugins=[script])
    where = "Triton"
    if args.device.type == "cpu":
        where = "what is best on this CPU: C++, and PyTorch for attention and small inputs"
    print(f"\nfastdit ran {where}; sizes are {'tiny' if args.quick else 'full'}.")
    print(table(COLUMNS, script.results["rows"]))
    sys.exit(code)


if __name__ == "__main__":
    main()
