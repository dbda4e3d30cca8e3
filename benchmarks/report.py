"""All that is measured of fastdit on a GPU, by one command, into benchmarks/results/<device>/.

    python benchmarks/report.py                       # every stage but aot
    python benchmarks/report.py --stage tests tune    # some
    python benchmarks/report.py --aot --every         # what each kernel compiles to; needs no GPU

A stage is a row of units. Its file is written after each of them, so that what is there when it
stops is whole; at --limit it starts no more, and soon after ends those that still run. What was
left out is named in the file, and --resume does that and no more. Without a GPU "tests" and "tune"
do nothing, and "kernels", "sample" and "train" are dry runs on tiny sizes, into build/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import _aot
import torch
from _harness import ROOT, machine, print_machine, table, write_json
from _ops import OPS
from tqdm import tqdm

BENCHMARKS = ROOT / "benchmarks"
GPU_ONLY = "not measured on a GPU: there is none here"
PRESETS = ("DiT-XL/2", "DiT-B/2", "DiT-S/2")
GRACE = 40  # seconds a unit may run on after the limit
SHARD = 40  # tests a process: starting one takes seconds, and their kernels minutes to compile


class Stage:
    """A stage's units and results, and the file they go to."""

    def __init__(self, name: str, args: argparse.Namespace, facts: dict[str, Any]) -> None:
        self.name, self.args, self.facts = name, args, facts
        dry = name != "aot" and not torch.cuda.is_available()
        folder = "dry-run" if dry else "aot" if name == "aot" else slug(facts["device"])
        out = args.out or (ROOT / "build" if dry else BENCHMARKS / "results")
        files = {"sample": "sample_throughput", "train": "train_throughput"}
        self.path = out / folder / f"{files.get(name, name)}.json"
        self.deadline = time.monotonic() + args.limit
        self.units: dict[str, Any] = self._earlier() if args.resume else {}
        self.left_out: list[str] = []

    def _earlier(self) -> dict[str, Any]:
        """Units of a run that was stopped, if it was on this machine and commit."""
        if not self.path.exists():
            return {}
        document = json.loads(self.path.read_text())
        if any(document["machine"].get(k) != v for k, v in self.facts.items() if k != "date"):
            return {}
        rows = iter(document.get("rows", ()))
        for unit in document["units"].values():
            if "count" in unit:
                unit["rows"] = [next(rows) for _ in range(unit.pop("count"))]
        return {k: unit for k, unit in document["units"].items() if not unit.get("exit status")}

    def run(self, units: dict[str, Callable[[], Any]], workers: int = 1) -> None:
        """Run units that are not there yet, so many at a time, until the limit."""
        todo = [name for name in units if name not in self.units]
        self.left_out = list(todo)
        with (
            tqdm(total=len(todo), desc=self.name, mininterval=5) as bar,
            ThreadPoolExecutor(workers) as pool,
        ):
            running = {pool.submit(self._one, units[name]): name for name in todo}
            for done in as_completed(running):
                name, result = running[done], done.result()
                if result is not None:
                    self.units[name] = result
                    self.left_out.remove(name)
                    self.write()
                bar.update()
        self.write()
        if self.left_out:
            print(f"{self.name}: left out at the limit: {', '.join(self.left_out)}")

    def _one(self, unit: Callable[[], Any]) -> Any:
        return unit() if time.monotonic() < self.deadline else None

    def write(self) -> None:
        rows = [row for unit in self.units.values() for row in unit.get("rows", ())]
        results: dict[str, Any] = {"units": self.units, "left_out": self.left_out}
        if rows:  # kept once, where the other benchmarks keep theirs
            units = {
                name: {k: v for k, v in unit.items() if k != "rows"} | {"count": len(unit["rows"])}
                for name, unit in self.units.items()
            }
            results |= {"units": units, "rows": rows}
        write_json(self.path, self.facts, vars(self.args), **results)

    def call(self, *command: Any, **environment: str) -> tuple[int, str]:
        """A Python script's exit status and output; 124 where it was ended after the limit."""
        left = max(1.0, self.deadline + GRACE - time.monotonic())
        try:
            done = subprocess.run(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=left,
                env=os.environ | {"TQDM_DISABLE": "1"} | environment,
            )
        except subprocess.TimeoutExpired as stopped:
            output = stopped.stdout or b""
            return 124, output if isinstance(output, str) else output.decode(errors="replace")
        return done.returncode, done.stdout


def slug(device: str) -> str:
    """A folder's name for a device: "NVIDIA H200" is nvidia-h200."""
    name, _, cpus = device.replace("(R)", "").partition(" (")
    cpus = re.sub(r"\D", "", cpus)
    words = re.findall(r"[a-z0-9]+", name.split(",")[0].lower())
    return "-".join(words + ([f"{cpus}cpu"] if cpus else []))


def tests(stage: Stage) -> None:
    """Everything that runs compiled on a GPU: tests/kernels, and what is marked gpu elsewhere."""
    names: dict[str, None] = {}
    for selection in (["tests/kernels"], ["-m", "gpu", "tests"]):
        code, output = stage.call("-m", "pytest", "--collect-only", "-q", *selection)
        if code not in (0, 5):
            sys.exit(f"tests: pytest could not collect {' '.join(selection)}\n{output[-2000:]}")
        names |= dict.fromkeys(line for line in output.splitlines() if "::" in line)
    # All of a function in a row, so that a process compiles what its neighbours do not.
    ids = sorted(names, key=lambda name: name.split("[")[0])
    shards = [ids[i : i + SHARD] for i in range(0, len(ids), SHARD)]
    units = {
        f"{i + 1} of {len(shards)}, from {shard[0]}": lambda shard=shard: _pytest(stage, shard)
        for i, shard in enumerate(shards)
    }
    stage.run(units, stage.args.processes)
    rows = stage.units.values()
    counts = {k: sum(row[k] for row in rows) for k in ("passed", "failed", "skipped")}
    print(f"tests: {counts}, {len(stage.left_out)} of {len(shards)} shards left out")
    for row in rows:
        for failure in row["failures"]:
            print(f"\n{failure['test']}\n{failure['tail'][-800:]}")


def _pytest(stage: Stage, names: list[str]) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder, "junit.xml")
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={xml}"]
        threads = max(1, len(os.sched_getaffinity(0)) // stage.args.processes)
        command = ("-m", "pytest", *options, *names)
        code, output = stage.call(*command, OMP_NUM_THREADS=str(threads))
        if code == 124:
            return None
        if code not in (0, 1) or not xml.exists():  # a crash: none has been seen to pass
            failure = {"test": f"exit status {code}", "tail": output[-2000:]}
            return {"passed": 0, "failed": len(names), "skipped": 0, "failures": [failure]}
        cases = list(ElementTree.parse(xml).iter("testcase"))
    failures = [
        {"test": f"{case.get('classname')}::{case.get('name')}", "tail": (e.text or "")[-2000:]}
        for case in cases
        for e in case
        if e.tag in ("failure", "error")
    ]
    failed = sum(any(e.tag in ("failure", "error") for e in case) for case in cases)
    skipped = sum(any(e.tag == "skipped" for e in case) for case in cases)
    return {
        "passed": len(cases) - failed - skipped,
        "failed": failed,
        "skipped": skipped,
        "failures": failures,
    }


def kernels(stage: Stage) -> None:
    quick = [] if torch.cuda.is_available() else ["--quick"]
    units = {
        op: lambda op=op: _script(stage, "kernels.py", "--op", op, *quick)
        for op in stage.args.op or OPS
    }
    stage.run(units)


def sample(stage: Stage) -> None:
    """One preset a unit, the main job first; DiTs in bfloat16, the toy in float32."""
    units = {
        preset: ("--preset", preset, "--dtype", "bfloat16", "--batch", 2, 32, 128)
        for preset in PRESETS
    }
    # What 250 steps hold at once, beside the sum of its parts.
    memory = ("--steps", 250, "--rounds", 1, "--batch", 8, "--way", "fastdit graph")
    units["DiT-XL/2 memory"] = ("--preset", "DiT-XL/2", "--dtype", "bfloat16", *memory)
    units["toy"] = ("--preset", "toy")
    if not torch.cuda.is_available():
        tiny = ("--batch", 2, "--steps", 2, "--rounds", 1, "--way", "fastdit eager")
        units = {"toy": (*units["toy"], *tiny)}
    _scripts(stage, "sample_throughput.py", units)


def train(stage: Stage) -> None:
    """XL/2 on 256 x 256 latents at growing batches, up to the largest that fits; the toy."""
    units = {
        f"DiT-XL/2 batch {batch}": (
            *("--preset", "DiT-XL/2", "--batch", batch, "--precision", "bfloat16"),
            *("--rounds", 5, "--steps", 5, "--way", "plain compiled", "fastdit compiled"),
        )
        for batch in (64, 128, 192, 256)
    }
    units["toy"] = ()
    if not torch.cuda.is_available():
        tiny = ("--batch", 16, "--per-class", 2, "--rounds", 1, "--steps", 1)
        units = {"toy": (*tiny, "--way", "fastdit eager")}
    _scripts(stage, "train_throughput.py", units)


def _scripts(stage: Stage, script: str, units: dict[str, tuple[Any, ...]]) -> None:
    """A benchmark with other options for each unit."""
    stage.run(
        {
            name: lambda options=options: _script(stage, script, *options)
            for name, options in units.items()
        }
    )


def _script(stage: Stage, script: str, *options: Any) -> dict[str, Any]:
    """Another benchmark's rows; those it had when it ended early or failed, and its last words."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        code, output = stage.call(BENCHMARKS / script, *options, "--json", path)
        print(f"\n{output}")
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
    unit: dict[str, Any] = {"rows": rows, "exit status": code}
    return unit if code == 0 else unit | {"tail": output[-2000:]}


def tune(stage: Stage) -> None:
    import _tune

    units = {name: lambda job=job: {"rows": job()} for name, job in _tune.jobs()}
    stage.run(units)
    rows = [row for unit in stage.units.values() for row in unit["rows"]]
    print(table(_tune.COLUMNS, rows))


STAGES = {
    "tests": tests,
    "kernels": kernels,
    "sample": sample,
    "train": train,
    "tune": tune,
    "aot": _aot.run,
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    default = ["tests", "kernels", "sample", "train", "tune"] if on_gpu else ["aot", "kernels"]
    parser.add_argument(
        "--stage", nargs="+", choices=STAGES, help=f"default here: {' '.join(default)}"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default benchmarks/results; dry runs: build"
    )
    parser.add_argument("--limit", type=float, default=520, metavar="SECONDS", help="of a stage")
    parser.add_argument("--resume", action="store_true", help="only units a file lacks")
    processes = max(1, min(8, len(os.sched_getaffinity(0))))
    parser.add_argument(
        "--processes", type=int, default=processes, help="of tests, and of compilers"
    )
    parser.add_argument("--op", nargs="+", choices=OPS, metavar="OP", help="of stage kernels")
    own = parser.add_argument_group("stage aot")
    own.add_argument("--aot", action="store_true", help="the same as --stage aot")
    own.add_argument("--every", action="store_true", help="not only the default configurations")
    arches = list(_aot.ARCHES)
    own.add_argument("--arch", nargs="+", choices=arches, default=arches, metavar="ARCH")
    own.add_argument("--match", metavar="PART", help="of a kernel's or a case's name")
    args = parser.parse_args(argv)
    for name in ("limit", "processes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name):g}")
    args.stage = args.stage or ([] if args.aot else default)
    if args.aot and "aot" not in args.stage:
        args.stage = [*args.stage, "aot"]
    return args


def main() -> None:
    args = parse()
    on_gpu = torch.cuda.is_available()
    facts = machine(torch.device("cuda" if on_gpu else "cpu"))
    print_machine(facts)
    if not on_gpu and set(args.stage) - {"aot"}:
        print("There is no GPU here: a dry run on tiny sizes.")
    for name in args.stage:
        if name in ("tests", "tune") and not on_gpu:
            print(f"{name}: {GPU_ONLY}")
            continue
        start = time.monotonic()
        stage = Stage(name, args, facts)
        STAGES[name](stage)
        print(f"{name}: {time.monotonic() - start:.0f} s, {stage.path}")


if __name__ == "__main__":
    main()
