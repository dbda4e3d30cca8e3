"""Shared by the benchmarks: options, the machine's description, timing in turns, tables, JSON."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from fastdit import DiTConfig, reference, testing
from fastdit.data.files import atomic_path

Model = TypeVar("Model", bound=reference.DiT)
Row = dict[str, Any]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
ROOT = Path(__file__).resolve().parent.parent
FIGURE = "images/s"


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parser(doc: str, device: bool = False) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark; `device` adds --device."""
    made = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    add = made.add_argument
    add("--json", type=Path, metavar="PATH", help="write the results to this file")
    if device:
        add("--device", type=torch.device, default=best_device(), help="default: a GPU if present")
    return made


def positive(text: str) -> int:
    """The type of an option that takes a whole number of at least 1."""
    return int(at_least_one(text, int))


def at_least_one(text: str, kind: type[float] = float) -> float:
    """The type of an option that takes a number of at least 1."""
    if not (number := kind(text)) >= 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number:g}")
    return number


def print_machine(device: torch.device, packages: Sequence[str] = ()) -> Row:
    """Print and return what every figure depends on: device, versions, threads, commit.

    Args:
        device: where the figures are measured.
        packages: further packages whose versions matter.
    """
    facts = machine(device, packages)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    return facts


def machine(device: torch.device, packages: Sequence[str] = ()) -> Row:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_model()} ({os.cpu_count()} CPUs)"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        **{package: _version(package) for package in packages},
        "fastdit": _version("fastdit"),
        "commit": _commit(),
        "code": code_digest(),
        "date": date.today().isoformat(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                isa = "AVX-512" if "avx512f" in cpuinfo.read_text() else "no AVX-512"
                return f"{line.split(':', 1)[1].strip()}, {isa}"
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def code_digest() -> str:
    """Return a digest of all source files that a figure depends on.

    Unlike the commit, it exists in a copy without git and does not change when results are
    committed.
    """
    digest = hashlib.sha256()
    for folder in ("fastdit", "kernels", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp"):
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _commit() -> str:
    """Return the commit, marked as dirty where files other than results differ from it.

    In a copy without git, the variable FASTDIT_COMMIT names the commit.
    """
    if named := os.environ.get("FASTDIT_COMMIT"):
        return named[:10]
    try:
        commit = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@contextmanager
def fresh_compile_cache() -> Iterator[None]:
    """Use an empty Inductor cache, so that a compile time is the time of a first compilation."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the wall time of one call, including its work on the device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def settled_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the wall time of one call on CPUs that are awake.

    A CPU that was idle takes some milliseconds until it is fast, so that on a CPU a short call is
    repeated for a tenth of a second; the figure is the mean of all but the first.
    """
    first = seconds(call, device)
    if device.type != "cpu" or first > 0.05:
        return first
    repeats = math.ceil(0.1 / first)
    return seconds(lambda: [call() for _ in range(repeats)], device) / repeats


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def capture(
    calls: Sequence[Callable[[], Any]], stream: torch.cuda.Stream
) -> tuple[Callable[[], None], int]:
    """Capture the calls in a CUDA graph, repeated until it holds at least 16.

    Returns:
        What replays the graph, and the number of calls in it.
    """
    repeats = math.ceil(16 / len(calls))
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            kept[:] = [call() for call in calls]  # live results do not share memory
    return graph.replay, repeats * len(calls)


def build(kind: type[Model], cfg: DiTConfig, device: torch.device) -> Model:
    """Make a model on its device, since a GPU draws the weights in negligible time."""
    with torch.device(device):
        return kind.from_config(cfg)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Do what `testing.randomize` does, on a GPU with the device's own generator.

    A CPU needs many seconds to draw 675 million weights.
    """
    device = next(model.parameters()).device
    if device.type == "cpu":
        return testing.randomize(model)
    generator = torch.Generator(device).manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            spread = 0.5 * p[0].numel() ** -0.5 if p.dim() > 1 else 0.1
            p.normal_(std=spread, generator=generator)


class WithoutInit(TorchFunctionMode):
    """Skips drawing new weights, for models that are loaded with other weights at once."""

    _DRAWS = ("kaiming_uniform_", "uniform_", "normal_")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in self._DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def attempt(row: Row, figure: str, call: Callable[[], Any]) -> Any:
    """Return what `call()` returns; if it fails, return None and put the reason into the row.

    The benchmark goes on, since one way may run out of memory or break where others do not.
    """
    try:
        return call()
    except torch.cuda.OutOfMemoryError as error:
        row |= {figure: "out of memory", "reason": _first_line(error)}
    except Exception as error:
        traceback.print_exc()
        row |= {figure: "failed", "reason": f"{type(error).__name__}: {_first_line(error)}"}
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios by round, which is robust against a drifting clock speed."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def columns(text: str) -> dict[str, str]:
    """Return heading -> format spec, as `table` takes it, from "way; batch: d; min, max: .1f"."""
    groups = [group.partition(":") for group in text.split(";")]
    return {name.strip(): spec.strip() for names, _, spec in groups for name in names.split(",")}


def table(columns: dict[str, str], rows: list[Row], markdown: bool = False) -> str:
    """Format rows as aligned text or as Markdown.

    Args:
        columns: heading -> format spec; a heading is also the key of its values in the rows.
        rows: a missing value or None is shown as "-", a string unchanged.
        markdown: whether to add pipes and a rule.
    """

    def cell(value: Any, spec: str) -> str:
        if value is None:
            return "-"
        return value if isinstance(value, str) else format(value, spec)

    cells = [list(columns)] + [[cell(r.get(c), s) for c, s in columns.items()] for r in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        [line[0].ljust(widths[0])]
        + [text.rjust(w) for text, w in zip(line[1:], widths[1:], strict=True)]
        for line in cells
    ]
    if not markdown:
        return "\n".join("  ".join(line) for line in lines)
    rule = ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def write_json(path: Path, facts: Row, arguments: Row, **results: Any) -> None:
    """Write the file as a whole or not at all, so that it can be rewritten after every row."""
    document = {"machine": facts, "arguments": arguments, **results}
    with atomic_path(path) as aside:
        aside.write_text(json.dumps(document, indent=1, default=str) + "\n")


class Results(dict[str, Any]):
    """What a benchmark has found so far; `write` rewrites its file, if it has one."""

    def __init__(self, path: Path | None, facts: Row, arguments: Row, **empty: Any) -> None:
        super().__init__({"rows": [], **empty})
        self.facts, self._path, self._arguments = facts, path, arguments

    @classmethod
    def of(
        cls,
        args: argparse.Namespace,
        device: torch.device,
        packages: Sequence[str] = (),
        **empty: Any,
    ) -> Results:
        """Print the machine's description and begin the results that go to `args.json`."""
        arguments = {name: value for name, value in vars(args).items() if name != "json"}
        return cls(args.json, print_machine(device, packages), arguments, **empty)

    def add(self, *rows: Row) -> None:
        self["rows"] += rows
        self.write()

    def write(self) -> None:
        if self._path:
            write_json(self._path, self.facts, self._arguments, **self)

    def has_failures(self, figure: str) -> bool:
        return any(row.get(figure) == "failed" for row in self["rows"])


class SideBySide:
    """Ways to do the same work, which take turns in one process.

    A way that fails leaves a row with the reason and takes no more turns. A subclass defines how a
    way begins, what a turn is, and which figures a row has beyond the rates and their ratios.
    """

    BASES: dict[str, str] = {}  # column of a ratio -> the way that the others are compared to

    def __init__(self, rows: dict[str, Row], images: int, results: Results) -> None:
        """Prepare to time.

        Args:
            rows: a row for each way, by name; they are filled in place.
            images: how many images one turn processes.
            results: where the rows are added, and written after every change.
        """
        self.rows, self.images, self.results = rows, images, results
        # Seconds of each turn, of the ways that did not fail.
        self.times: dict[str, list[float]] = {}

    def begin(self, name: str) -> Any:
        """Make a way and run it once."""
        raise NotImplementedError

    def turn(self, name: str, way: Any) -> float:
        """Return the seconds of one timed turn."""
        raise NotImplementedError

    def detail(self, name: str, times: list[float]) -> None:
        """Add the benchmark's own figures to a row."""

    def run(self, rounds: int, bar: tqdm) -> list[str]:
        """Time all ways; return the names of those that did not fail."""
        ways: dict[str, Any] = {}
        for name, row in self.rows.items():
            bar.set_description(f"{name}, first run")
            self.results["rows"].append(row)
            way = attempt(row, FIGURE, lambda name=name: self.begin(name))
            if way is not None:
                ways[name], self.times[name] = way, []
            self.results.write()
            bar.update()
        for i in range(rounds):
            for name in list(ways):
                bar.set_description(f"{name}, round {i + 1} of {rounds}")
                call = lambda name=name: self.turn(name, ways[name])  # noqa: E731
                taken = attempt(self.rows[name], FIGURE, call)
                if taken is None:
                    del ways[name], self.times[name]
                else:
                    self.times[name].append(taken)
                    self._fill()
                self.results.write()
                bar.update()
        return list(ways)

    def _fill(self) -> None:
        """Compute the figures so far; ratios use the rounds that both ways have finished."""
        for name, times in self.times.items():
            if not times:
                continue
            row, images = self.rows[name], self.images
            row |= {FIGURE: images / statistics.median(times), "min": images / max(times)}
            row["max"] = images / min(times)
            for ratio, base in self.BASES.items():
                if whole := min(len(times), len(self.times.get(base, ()))):
                    row[ratio] = median_ratio(self.times[base][:whole], times[:whole])
            self.detail(name, times)
