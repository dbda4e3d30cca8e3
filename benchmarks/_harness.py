"""What the benchmarks share: the machine's description, interleaved timing, tables, JSON."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
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

from fastdit import DiTConfig, reference, testing
from fastdit.data.files import atomic_path

Model = TypeVar("Model", bound=reference.DiT)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
ROOT = Path(__file__).resolve().parent.parent


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure means nothing without: device, versions, threads, commit."""
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
    """Of all source that a figure depends on: the same in a copy without git and after a commit of
    results.
    """
    digest = hashlib.sha256()
    for folder in ("fastdit", "kernels", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp"):
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _commit() -> str:
    """The checkout's commit, marked where files other than results differ from it.

    A copy without git is told it by the variable FASTDIT_COMMIT.
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
    """An empty Inductor cache, so that a compile time is that of a first compilation."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]


def print_machine(facts: dict[str, Any]) -> None:
    print(", ".join(f"{name} {value}" for name, value in facts.items()))


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, the device's work included."""
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build(kind: type[Model], cfg: DiTConfig, device: torch.device) -> Model:
    """A model made on its device, where drawing its weights takes no time worth naming."""
    with torch.device(device):
        return kind.from_config(cfg)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """`testing.randomize`, on a GPU with the same spreads and the device's own generator.

    The CPU draws 675 million weights in many seconds.
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
    """Leaves new weights undrawn, where others are loaded over them at once."""

    _DRAWS = ("kaiming_uniform_", "uniform_", "normal_")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in self._DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def attempt(row: dict[str, Any], figure: str, call: Callable[[], Any]) -> Any:
    """What `call()` returns; where it fails, None, and the row says why instead of its figure.

    Other rows go on: what runs out of memory or breaks may do so alone.
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
    """Median of the ratios round by round, which holds where a machine's speed drifts."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def table(columns: dict[str, str], rows: list[dict[str, Any]], markdown: bool = False) -> str:
    """Rows as aligned text or as Markdown.

    Args:
        columns: heading -> format spec of its values; the key of a value in a row is its heading.
        rows: an absent or None value shows as "-", a string as it is.
        markdown: with pipes and a rule.
    """

    def cell(value: Any, spec: str) -> str:
        if value is None:
            return "-"
        return value if isinstance(value, str) else format(value, spec)

    cells = [list(columns)] + [[cell(r.get(c), s) for c, s in columns.items()] for r in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        [
            text.ljust(w) if i == 0 else text.rjust(w)
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ]
        for line in cells
    ]
    if not markdown:
        return "\n".join("  ".join(line) for line in lines)
    rule = ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def write_json(
    path: Path, facts: dict[str, Any], arguments: dict[str, Any], **results: Any
) -> None:
    """Written whole or not at all, so that a benchmark may write after each unit of its work."""
    document = {"machine": facts, "arguments": arguments, **results}
    with atomic_path(path) as aside:
        aside.write_text(json.dumps(document, indent=1, default=str) + "\n")


class Results(dict[str, Any]):
    """What a benchmark has found so far; its file is written anew whenever there is more."""

    def __init__(
        self, path: Path | None, facts: dict[str, Any], arguments: dict[str, Any], **empty: Any
    ) -> None:
        super().__init__(empty)
        self._path, self._facts, self._arguments = path, facts, arguments

    def write(self) -> None:
        if self._path:
            write_json(self._path, self._facts, self._arguments, **self)
