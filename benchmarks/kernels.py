"""Each op, forward and backward, beside what PyTorch has for it, with the error beside the speed.

    python benchmarks/kernels.py             # a table, with --json a file; on a CPU in float32
    python benchmarks/kernels.py --quick --op attention         # tiny shapes
    pytest benchmarks/kernels.py --benchmark-enable -k attention

pytest-benchmark does the timing in both spellings, and its clock waits for the device. On a GPU a
timed call is one of those recorded in a CUDA graph, so that device time is measured without the
gaps between launches (a way that cannot be captured is timed by plain calls, and marked so);
"alone us" is the same call made from Python, launches and wait included. The calls take turns over
copies of the inputs that together exceed twice the L2 cache, so that data comes from memory;
results land in as many places. A backward is timed alone, its graph retained. On a CPU the calls
are plain calls and the caches are warm.

GB/s and TFLOP/s come from `work`, what the op must move and multiply, whatever a way really does.
A ceiling is measured in the same run: a copy of like size, the best matrix product of the dtype.
Share is the ceiling's time over the call's; ratio the eager reference's time over the call's.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # pytest's importlib mode does not

from _harness import (  # noqa: E402
    ROOT,
    fresh_compile_cache,
    machine,
    print_machine,
    seconds,
    table,
    write_json,
)
from _ops import (  # noqa: E402
    ATTENTION,
    CPU,
    DTYPES,
    FULL,
    OPS,
    QUICK,
    SDPA,
    UPDATE,
    Case,
    copies,
    inputs,
    make,
    oracle,
    outputs,
    ways,
    work,
)

from fastdit import testing  # noqa: E402

COLUMNS = {
    "op": "",
    "pass": "",
    "way": "",
    "shape": "",
    "dtype": "",
    "us": ".1f",
    "min": ".1f",
    "max": ".1f",
    "timed": "",
    "alone us": ".1f",
    "GB/s": ".1f",
    "TFLOP/s": ".2f",
    "share": ".2f",
    "ratio": ".2f",
    "error": ".1e",
}


def calls(case: Case, function: Callable[..., Any], backward: bool, device: torch.device) -> list:
    """One call a set of inputs; those of a backward have had their forward."""

    def call(seed: int) -> Callable[[], Any]:
        tensors, options = inputs(case, device, seed)
        if not backward:
            return torch.no_grad()(lambda: function(*tensors, **options))
        leaves = [t.detach().requires_grad_() for t in tensors]
        outs = outputs(function(*leaves, **options))
        upstream = [torch.randn_like(out) for out in outs]
        return lambda: torch.autograd.grad(outs, leaves, upstream, retain_graph=True)

    return [call(seed) for seed in range(copies(work(case, backward)[0], device))]


def clock() -> float:
    """pytest-benchmark's clock: the device's work is done when it is read."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(benchmark: Any, turns: list, args: argparse.Namespace) -> dict[str, Any]:
    """Time the calls in turn; the one routine behind every figure.

    On a GPU a graph holds 16 calls or more and is replayed when as many have been asked for, so
    that pytest-benchmark divides by the right count; a round lasts 2 ms or more.
    """
    device = torch.device(args.device)
    for turn in turns * 2:
        turn()
    alone = sorted(seconds(turn, device) for turn in itertools.islice(itertools.cycle(turns), 11))
    row: dict[str, Any] = {"copies": len(turns), "alone us": alone[5] * 1e6}
    if device.type == "cuda":
        try:
            replay, held = _graph(turns)
            row["timed"] = "graph"
        except RuntimeError as error:  # not every rival can be captured: plain calls, then
            cycle = itertools.cycle(turns)
            replay, held = lambda: next(cycle)(), 1
            row |= {"timed": "calls", "reason": str(error).splitlines()[0]}
        iterations = held * math.ceil(max(1.0, 2e-3 / seconds(replay, device)))
        counter = itertools.count(1)

        def target() -> None:
            if next(counter) % held == 0:
                replay()
    else:
        cycle, iterations = itertools.cycle(turns), 1
        row["timed"] = "calls"

        def target() -> None:
            next(cycle)()

    benchmark.pedantic(target, rounds=args.rounds, iterations=iterations, warmup_rounds=2)
    if not benchmark.enabled:
        return row
    stats = benchmark.stats.stats
    return row | {"us": stats.median * 1e6, "min": stats.min * 1e6, "max": stats.max * 1e6}


def _graph(turns: list) -> tuple[Callable[[], None], int]:
    """Replays each call so often that there are 16 or more, and how many those are."""
    repeats = math.ceil(16 / len(turns))
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(repeats):
            kept[:] = [turn() for turn in turns]  # results that live on have memory of their own
    return graph.replay, repeats * len(turns)


@pytest.fixture
def args(request: pytest.FixtureRequest) -> argparse.Namespace:
    return _args(request.config)


def _args(config: pytest.Config) -> argparse.Namespace:
    script = config.pluginmanager.get_plugin("kernels-script")
    return script.args if script else parse([])


@pytest.fixture(autouse=True)
def side_stream(args: argparse.Namespace) -> Any:
    """Capture needs a stream other than the default, and a backward runs on its forward's."""
    torch._dynamo.reset()
    if args.device == "cpu":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
    torch.cuda.empty_cache()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = _args(metafunc.config)
    known = QUICK if options.quick else CPU if options.device == "cpu" else FULL
    chosen = [c for c in known if c.op in options.op]
    passes = {"forward": False, "backward": True}
    cases = [
        pytest.param(case, way, name, id=f"{case}-{name}-{way}".replace(" ", "-"))
        for name, backward in passes.items()  # all forwards first: sampling needs no others
        for case in chosen
        if not (backward and case.op == UPDATE)
        for way in ways(case, options.quick)
        if not (backward and options.quick and way == "compiled")  # a minute of compiling on a CPU
    ]
    if metafunc.function is test_op:
        metafunc.parametrize(("case", "way", "direction"), cases)
    elif metafunc.function is test_copy:
        moved = {_power_of_two(work(case, b)[0]) for case in chosen for b in passes.values()}
        metafunc.parametrize("moved", sorted(moved), ids="{}B".format)
    elif metafunc.function is test_matmul:
        dtypes = dict.fromkeys(case.dtype for case in chosen if case.op == ATTENTION)
        sizes = {"bfloat16": (8192, 4096), "float32": (4096,)}
        if options.quick or options.device == "cpu":
            sizes = dict.fromkeys(sizes, (256,) if options.quick else (1024,))
        products = [(dtype, n) for dtype in dtypes for n in sizes[dtype]]
        metafunc.parametrize(("dtype", "n"), products)


def _power_of_two(n: int) -> int:
    return 2 ** round(math.log2(n))


timed = pytest.mark.benchmark(timer=clock)


@timed
def test_copy(moved, args, benchmark, record_property):
    device, elements = torch.device(args.device), max(1, moved // 4)  # half of it read, 2 B each
    buffers = [
        torch.randn(2, elements, device=device).bfloat16() for _ in range(copies(moved, device))
    ]
    row = measure(benchmark, [lambda b=b: b[1].copy_(b[0]) for b in buffers], args)
    size = f"{moved / 2**20:.4g} MiB"
    facts = {"op": "copy", "pass": "ceiling", "way": "copy_", "shape": size, "dtype": "bfloat16"}
    record_property("row", facts | row | {"bytes": 4 * elements, "flop": 0})


@timed
def test_matmul(dtype, n, args, benchmark, record_property):
    device, moved = torch.device(args.device), 3 * n * n * DTYPES[dtype].itemsize
    pairs = [
        torch.randn(2, n, n, device=device).to(DTYPES[dtype]) for _ in range(copies(moved, device))
    ]
    row = measure(benchmark, [lambda p=p: p[0] @ p[1] for p in pairs], args)
    facts = {"op": "matmul", "pass": "ceiling", "way": "@", "shape": f"{n}^3", "dtype": dtype}
    record_property("row", facts | row | {"bytes": moved, "flop": 2 * n**3})


@timed
def test_op(case, way, direction, args, benchmark, record_property):
    device, backward = torch.device(args.device), direction == "backward"
    benchmark.group = f"{case} {direction}"
    moved, flop = work(case, backward)
    row = {"op": case.op, "pass": direction, "way": way, "shape": case.size, "dtype": case.dtype}
    row |= {"bytes": moved, "flop": flop}
    function = make(way, case.op, device)
    try:
        tensors, options = inputs(case, device, seed=0)
        with warnings.catch_warnings():
            if way in SDPA:
                warnings.simplefilter("ignore")  # why a kernel cannot run: the row says that
            if not backward:
                with torch.no_grad():
                    result = outputs(function(*tensors, **options))
            # A compiled backward gives its saved tensors away otherwise, and runs once.
            with torch._functorch.config.patch(donated_buffer=False):
                turns = calls(case, function, backward, device)
                turns[0]()
    except torch.cuda.OutOfMemoryError:
        row["us"] = "out of memory"
    except RuntimeError as error:
        if way not in SDPA:
            raise
        row |= {"us": "not available", "reason": str(error).splitlines()[0]}
    if "us" in row:
        record_property("row", row)
        pytest.skip(f"{way}: {row['us']}")
    if not backward:
        row["error"] = max(map(testing.relative_error, result, oracle(case, device)))
        del result
    record_property("row", row | measure(benchmark, turns, args))


def derive(rows: list[dict[str, Any]]) -> None:
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
    key = ("op", "pass", "shape", "dtype")
    eager = {tuple(row[k] for k in key): row["us"] for row in done if row["way"] == "eager"}
    for row in done:
        row["ratio"] = None
        if row["pass"] == "ceiling":
            continue
        floors = [row["flop"] / peak[row["dtype"]] / 1e6] if row["dtype"] in peak else []
        if copy:
            like = min(copy, key=lambda size: abs(math.log(size / row["bytes"])))
            floors.append(row["bytes"] / copy[like] / 1e3)
        row["share"] = max(floors) / row["us"] if floors else None
        if base := eager.get(tuple(row[k] for k in key)):
            row["ratio"] = base / row["us"]


SUMMARY = {
    **{"op": "", "pass": "", "shape": "", "dtype": "", "us": ".0f"},
    **{"ratio": ".2f", "of compiled": ".2f", "error": ".1e"},
}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """fastdit's rows alone, with the compiled reference's ratio beside their own."""
    key = ("op", "pass", "shape", "dtype")
    compiled = {tuple(r[k] for k in key): r.get("ratio") for r in rows if r["way"] == "compiled"}
    own = [row for row in rows if row["way"] == "fastdit"]
    return [row | {"of compiled": compiled.get(tuple(row[k] for k in key))} for row in own]


class Script:
    """The plugin of `python benchmarks/kernels.py`: every row goes to the file as it comes."""

    __name__ = "kernels-script"  # pytest registers a plugin by it

    def __init__(self, args: argparse.Namespace, facts: dict[str, Any]) -> None:
        self.args, self.facts = args, facts
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        new = [value for name, value in report.user_properties if name == "row"]
        if report.when != "call" or not new:
            return
        self.rows += new
        derive(self.rows)
        if self.args.json:
            write_json(self.args.json, self.facts, vars(self.args), rows=self.rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), metavar="OP")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--rounds", type=int, help="timed rounds of each; default 30, quick 5")
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args(argv)
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    args.rounds = args.rounds or (5 if args.quick else 30)
    return args


def main() -> None:
    args = parse()
    facts = machine(torch.device(args.device))
    print_machine(facts)
    script = Script(args, facts)
    options = ["-c", ROOT / "pyproject.toml", "-o", "addopts=--import-mode=importlib", "-q"]
    options += ["--no-header", "--benchmark-quiet", "-p", "no:cacheprovider", __file__]
    with fresh_compile_cache():
        code = pytest.main([str(option) for option in options], plugins=[script])
    where = (
        "Triton"
        if args.device != "cpu"
        else "what is best on this CPU: C++, and PyTorch for attention and few elements"
    )
    print(f"\nfastdit ran {where}; sizes {'tiny' if args.quick else 'full'}.")
    print(table(COLUMNS, script.rows))
    sys.exit(code)


if __name__ == "__main__":
    main()
