"""All measurements of fastdit on a GPU with one command, into benchmarks/results/<device>/.

    python benchmarks/report.py --plan                # what would run, and how long it should take
    python benchmarks/report.py                       # the most decisive units first, to the limit
    python benchmarks/report.py --unit xl tune        # some units
    python benchmarks/report.py --resume              # the units that are not done
    python benchmarks/report.py --aot --every         # what each kernel compiles to; needs no GPU

A unit is a process with a time limit of its own; --limit is for the whole command. A unit that
fails, crashes or runs out of memory does not affect the others; its last output and the rows that
it had are recorded. Files are rewritten within a second of each row, as a whole or not at all, so
that a kill at any moment loses nothing else. Without a GPU the units are dry runs on tiny sizes,
and go to build/.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()  # before the first import of torch, which can take half a minute

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import _aot  # noqa: E402
import _harness as harness  # noqa: E402
from _advice import print_advice  # noqa: E402
from _runner import BENCHMARKS, Runner  # noqa: E402
from _units import DRY, plan, plan_table  # noqa: E402

ON_GPU, ELSEWHERE = 420, 3600  # seconds


def slug(device: str) -> str:
    """Return a folder name for a device: "NVIDIA H200" becomes nvidia-h200."""
    name, _, cpus = device.replace("(R)", "").partition(" (")
    cpus = re.sub(r"\D", "", cpus)
    words = re.findall(r"[a-z0-9]+", name.split(",")[0].lower())
    return "-".join(words + ([f"{cpus}cpu"] if cpus else []))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = harness.best_device().type == "cuda"
    limit = ON_GPU if on_gpu else ELSEWHERE
    names = list(dict.fromkeys(unit.name for unit in (*plan(1), *DRY)))
    add, folder = parser.add_argument, {"type": Path, "metavar": "FOLDER"}
    add("--plan", action="store_true", help="only print the units for a GPU")
    add("--unit", nargs="+", choices=names, metavar="NAME", help="default: all, in order")
    add("--out", **folder, help="default: benchmarks/results; dry runs: build")
    of_all = f"of the whole command; default: {limit}"
    add("--limit", type=harness.at_least_one, default=limit, metavar="SECONDS", help=of_all)
    skip = "skip what the run with this --out did on this machine and code; default: this --out"
    add("--resume", nargs="?", const=True, **folder, help=skip)
    processes = min(14, len(os.sched_getaffinity(0)))
    add("--processes", type=harness.positive, default=processes, help="for tests and for compiling")
    _aot.add_arguments(parser)
    args = parser.parse_args(argv)
    results = BENCHMARKS / "results" if on_gpu or args.aot else harness.ROOT / "build"
    args.out = args.out or results
    if args.resume is True:
        args.resume = args.out
    return args


def run_units(args: argparse.Namespace, facts: harness.Row, on_gpu: bool) -> bool:
    known = plan(args.processes) if on_gpu else DRY
    if not on_gpu:
        print("There is no GPU here: dry runs on tiny sizes.")
    by_name = {unit.name: unit for unit in known}
    for name in args.unit or ():
        if name not in by_name:
            print(f"{name}: " + ("a dry run" if on_gpu else "not measured, since it needs a GPU"))
    folder = slug(facts["device"]) if on_gpu else "dry-run"
    earlier = args.resume and args.resume / folder
    runner = Runner(args.out / folder, facts, vars(args), BEGAN + args.limit, earlier)
    done = runner.run([unit for unit in known if unit.name in (args.unit or by_name)])
    if on_gpu and (tuned := args.out / folder / "tune.json").exists():
        print_advice(json.loads(tuned.read_text())["rows"])  # even if a unit was cut short
    print(f"{time.monotonic() - BEGAN:.0f} s of {args.limit:.0f}; files in {args.out / folder}")
    return done


def main() -> None:
    args = parse()
    if args.plan:
        print(plan_table(plan(args.processes)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    device = harness.best_device()
    facts = harness.print_machine(device)
    if args.aot:
        _aot.run(args, facts, BEGAN + args.limit)
    if not args.aot or args.unit:
        sys.exit(not run_units(args, facts, device.type == "cuda"))


if __name__ == "__main__":
    main()
