"""Runs the units of a report, each in a process of its own, and keeps what they find.

A unit is a benchmark that rewrites a file of its own after each row. The runner reads this file
while the unit runs, and writes its rows to the file of all units of the same script, as a whole or
not at all. Whatever kills the runner, at most the rows of the last second are lost.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _harness import ROOT, Row, write_json

BENCHMARKS = ROOT / "benchmarks"
POLL = 0.25  # seconds
LEAST = 10.0  # seconds that must be left for a unit to begin
TAIL = 2000  # characters of a unit's output that are kept
SAME = ("device", "python", "torch", "triton", "code")  # must agree for a run to be resumed
DONE = "done"


@dataclass(frozen=True)
class Unit:
    """One benchmark with its options.

    Attributes:
        name: the short name that `--unit` takes.
        command: a script of this folder and its options; `--json PATH` is added.
        estimate: seconds that it should take.
        cap: seconds that it may take.
        source: where the estimate comes from.
    """

    name: str
    command: tuple[Any, ...]
    estimate: float
    cap: float
    source: str

    @property
    def file(self) -> str:
        """The stem of the file that holds the rows of all units of its script."""
        return Path(self.command[0]).stem.lstrip("_")


class Document:
    """A file of units and their rows, which is complete at any moment."""

    def __init__(self, path: Path, facts: Row, arguments: Row) -> None:
        self.path, self._facts, self._arguments = path, facts, arguments
        self.units: dict[str, Row] = {}
        self.rows: list[Row] = []
        self.left_out: list[str] = []

    def load(self, path: Path) -> None:
        """Begin with what an earlier run found, if it ran on this machine and this code."""
        if not path.exists():
            return
        document = json.loads(path.read_text())
        if all(document["machine"].get(k) == self._facts.get(k) for k in SAME):
            self.units, self.rows = document["units"], document["rows"]

    def is_done(self, name: str) -> bool:
        return self.units.get(name, {}).get("status") == DONE

    def put(self, name: str, record: Row, rows: Iterable[Row]) -> None:
        """Set a unit's state and rows; a failed try with fewer rows keeps the earlier rows."""
        new = [{"unit": name} | row for row in rows]
        old = [row for row in self.rows if row["unit"] == name]
        if record["status"] == DONE or len(new) >= len(old):
            self.rows = [row for row in self.rows if row["unit"] != name] + new
        self.units[name] = record
        self.write()

    def write(self) -> None:
        results = {"units": self.units, "left_out": self.left_out, "rows": self.rows}
        write_json(self.path, self._facts, self._arguments, **results)


class Runner:
    """Runs units in order until a deadline."""

    def __init__(
        self,
        folder: Path,
        facts: Row,
        arguments: Row,
        deadline: float,
        earlier: Path | None = None,
        least: float = LEAST,
    ) -> None:
        """Prepare to run.

        Args:
            folder: where the files are written.
            facts: what `_harness.machine` returned.
            arguments: stored with the results.
            deadline: of all units, by `time.monotonic`.
            earlier: folder of an earlier run, whose finished units are skipped.
            least: seconds that must be left for a unit to begin.
        """
        self._folder, self._earlier = folder, earlier
        self._facts, self._arguments = facts, arguments
        self._deadline, self._least = deadline, least
        self._documents: dict[str, Document] = {}

    def run(self, units: Sequence[Unit]) -> bool:
        """Run the units that are not done; return whether all are done now."""
        todo = [unit for unit in units if not self._document(unit).is_done(unit.name)]
        for unit in todo:
            self._document(unit).left_out.append(unit.name)
        for unit in todo:
            left = self._deadline - time.monotonic()
            if left < self._least:
                break
            self._run(unit, min(unit.cap, left))
        for document in self._documents.values():
            if document.left_out:
                document.write()
        self._print(units)
        return all(self._document(unit).is_done(unit.name) for unit in units)

    def _document(self, unit: Unit) -> Document:
        if unit.file not in self._documents:
            path = self._folder / f"{unit.file}.json"
            document = Document(path, self._facts, self._arguments)
            if self._earlier is not None:
                document.load(self._earlier / path.name)
                if document.units:
                    document.write()  # in this run's folder, even if this run adds nothing
            self._documents[unit.file] = document
        return self._documents[unit.file]

    def _run(self, unit: Unit, seconds: float) -> None:
        document, start = self._document(unit), time.monotonic()
        document.left_out.remove(unit.name)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            found, log = Path(folder, "rows.json"), Path(folder, "output")
            record: Row = {"status": "running", "command": list(map(str, unit.command))}
            document.put(unit.name, record, ())
            process = _start(unit, found, log)
            status, seen = "stopped", 0
            try:
                while (code := process.poll()) is None and time.monotonic() - start < seconds:
                    if found.exists() and (now := found.stat().st_mtime_ns) != seen:
                        seen = now
                        document.put(unit.name, *_read(found, record))
                    time.sleep(POLL)
                status = "over its time" if code is None else DONE if code == 0 else "failed"
                record["exit status"] = code
            finally:  # also where a signal ends the runner
                _end(process)
                output = log.read_text(errors="replace")
                record |= {"status": status, "seconds": time.monotonic() - start}
                if status != DONE:
                    record["tail"] = output[-TAIL:]
                record, rows = _read(found, record)
                document.put(unit.name, record, rows)
                print(f"\n{unit.name}: {status} after {record['seconds']:.0f} s, {len(rows)} rows")
                print(output[-TAIL:], flush=True)

    def _print(self, units: Sequence[Unit]) -> None:
        print()
        for unit in units:
            record = self._document(unit).units.get(unit.name, {})
            status = record.get("status", "left out for lack of time")
            if unit.name in self._document(unit).left_out:
                status = f"left out for lack of time ({status} earlier)" if record else status
            print(f"{unit.name}: {status}, estimated {unit.estimate:.0f} s")


def _start(unit: Unit, found: Path, log: Path) -> subprocess.Popen:
    script, *options = map(str, unit.command)
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, str(BENCHMARKS / script), *options, "--json", str(found)],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env=os.environ | {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # so that its own processes end with it
        )


def _end(process: subprocess.Popen) -> None:
    """Kill a unit and the processes that it started, even if the unit itself has died."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(found: Path, record: Row) -> tuple[Row, list[Row]]:
    """Return a unit's record, completed by what its file holds beside the rows, and the rows."""
    if not found.exists():
        return record, []
    document = json.loads(found.read_text())
    rows = document.pop("rows", [])
    return record | {k: v for k, v in document.items() if k not in ("machine", "arguments")}, rows
