"""Run tests in several processes, so that a crash loses one test and a kill loses none.

    python benchmarks/_tests.py --processes 8 --json rows.json tests/kernels
    python benchmarks/_tests.py --marked gpu --json rows.json tests

A process runs some tests one after the other and logs when each begins and ends. If it dies, the
test that was running has failed, and another process runs the rest. Each test is a row.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _harness as harness
from _harness import ROOT, Results, Row
from _pytest_log import LOG

SHARD = 40  # tests in a process; starting one takes seconds, compiling the kernels minutes
WRITE_EVERY = 1.0  # seconds
OPTIONS = ("-p", "_pytest_log", "-q", "--tb=short", "-p", "no:cacheprovider")


class Suite:
    """Collects the rows of tests from all processes as the tests end."""

    def __init__(self, results: Results, threads: int) -> None:
        self._results, self._threads = results, threads
        self._lock, self._changed, self._written = threading.Lock(), False, 0.0

    def add(self, row: Row) -> None:
        with self._lock:
            self._results["rows"].append(row)
            self._changed = True

    def mark(self, name: str, running: bool) -> None:
        """Record which tests are running, so that the file names a test that never ends."""
        with self._lock:
            now = self._results["running"]
            if running:
                now.append(name)
            elif name in now:
                now.remove(name)
            self._changed = True

    def write(self, at_once: bool = False) -> None:
        """Write new rows, at most once a second, since the file is rewritten as a whole."""
        with self._lock:
            due = at_once or time.monotonic() > self._written + WRITE_EVERY
            if self._changed and due:
                self._results.write()
                self._changed, self._written = False, time.monotonic()

    def run(self, names: list[str]) -> None:
        """Run tests in one process, and after a crash the remaining ones in another."""
        while names:
            ended, status, said = self._process(names)
            left = [name for name in names if name not in ended]
            if left and (status in (0, 1) or len(left) == len(names)):  # pytest itself failed
                for name in left:
                    self.add({"test": name, "outcome": "failed", "tail": said[-2000:]})
                return
            names = left

    def _process(self, names: list[str]) -> tuple[set[str], int, str]:
        """Run one process; return the tests that ended or crashed it, its status and output."""
        with tempfile.TemporaryDirectory() as folder:
            log, arguments, output = (Path(folder, name) for name in ("log", "names", "output"))
            arguments.write_text("\n".join(names))
            with output.open("w") as out:
                process = subprocess.Popen(
                    _command(f"@{arguments}"),
                    stdout=out,
                    stderr=out,
                    env=_environment(log) | {"OMP_NUM_THREADS": str(self._threads)},
                )
            rows: dict[str, Row] = {}
            seen, running, over = 0, None, False
            while not over:
                over = process.poll() is not None
                lines = _lines(log)
                for row in lines[seen:]:
                    name = row["test"]
                    self.mark(name, row["outcome"] == "began")
                    if row["outcome"] == "began":
                        running = name
                    elif name in rows:
                        rows[name] |= row  # its teardown failed
                    else:
                        rows[name] = row
                        self.add(row)
                seen = len(lines)
                self.write()
                time.sleep(0 if over else 0.2)
            status, said = process.returncode, output.read_text(errors="replace")
        if status not in (0, 1) and running is not None and running not in rows:
            tail = f"the process ended with status {status}\n{said[-2000:]}"
            rows[running] = {"test": running, "outcome": "failed", "tail": tail}
            self.add(rows[running])
            self.mark(running, False)
        return set(rows), status, said


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "--rootdir=.", *OPTIONS, *arguments]


def _environment(log: Path) -> dict[str, str]:
    log.touch()
    path = f"{ROOT / 'benchmarks'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return os.environ | {LOG: str(log), "PYTHONPATH": path}


def _lines(log: Path) -> list[Row]:
    return [json.loads(line) for line in log.read_text().splitlines(True) if line.endswith("\n")]


def collect(selection: list[str], marked: str | None) -> tuple[list[str], list[Row]]:
    """Return the tests' names, sorted by function, and a row for each file that failed to load."""
    mark = ["-m", marked] if marked else []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        command = _command("--collect-only", *mark, *selection)
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(log))
        rows = _lines(log)
    names = [row["test"] for row in rows if row["outcome"] == "found"]
    failed = [row for row in rows if row["outcome"] == "failed"]
    if done.returncode not in (0, 5) and not failed:
        tail = f"{done.stdout}{done.stderr}"[-2000:]
        failed = [{"test": " ".join(selection), "outcome": "failed", "tail": tail}]
    return sorted(dict.fromkeys(names), key=lambda name: name.split("[")[0]), failed


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.add_argument("tests", nargs="+", help="files, folders or names, as pytest takes them")
    parser.add_argument("--marked", metavar="MARK", help="only tests that pytest's -m selects")
    processes = min(8, len(os.sched_getaffinity(0)))
    parser.add_argument("--processes", type=harness.positive, default=processes)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    results = Results.of(args, harness.best_device(), running=[])
    suite = Suite(results, max(1, len(os.sched_getaffinity(0)) // args.processes))
    names, broken = collect(args.tests, args.marked)
    for row in broken:
        suite.add(row)
    size = max(1, min(SHARD, math.ceil(len(names) / args.processes)))
    shards = [names[i : i + size] for i in range(0, len(names), size)]
    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(suite.run, shards))
    suite.write(at_once=True)
    rows = results["rows"]
    counts = {o: sum(r["outcome"] == o for r in rows) for o in ("passed", "failed", "skipped")}
    for row in rows:
        if row["outcome"] == "failed":
            print(f"\n{row['test']}\n{row.get('tail', '')[-600:]}")
    print(f"\n{counts} of {len(names)} tests")
    sys.exit(counts["failed"] > 0 or not names)


if __name__ == "__main__":
    main()
