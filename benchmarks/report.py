"""All that is measured of fastdit on a GPU, by one command, into benchmarks/results/<device>/.

    python benchmarks/report.py --plan                # what would run, and how long it should take
    python benchmarks/report.py                       # what decides most first, until the limit
    python benchmarks/report.py --unit xl tune        # some units
    python benchmarks/report.py --resume              # those that are not done
    python benchmarks/report.py --aot --every         # what each kernel compiles to; needs no GPU

A unit is a process of its own, with a cap of its own; --limit is the whole command's. One that
fails, crashes or runs out of memory ends alone, and is recorded with its last words and the rows
that it had. Files are written anew within a second of each row, whole or not at all, so that a kill
at any moment loses nothing else. Without a GPU the units are dry runs on tiny sizes, into build/.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()  # before a first import of torch, which can take half a minute

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import _aot  # noqa: E402
import torch  # noqa: E402
from _advice import print_advice  # noqa: E402
from _harness import ROOT, machine, print_machine  # noqa: E402
from _runner import BENCHMARKS, Runner  # noqa: E402
from _units import DRY, plan, plan_table  # noqa: E402

ON_GPU, ELSEWHERE = 420, 3600  # seconds


def slug(device: str) -> str:
    """A folder's name for a device: "NVIDIA H200" is nvidia-h200."""
    name, _, cpus = device.replace("(R)", "").partition(" (")
    cpus = re.sub(r"\D", "", cpus)
    words = re.findall(r"[a-z0-9]+", name.split(",")[0].lower())
    return "-".join(words + ([f"{cpus}cpu"] if cpus else []))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    limit = ON_GPU if on_gpu else ELSEWHERE
    names = list(dict.fromkeys(unit.name for unit in (*plan(1), *DRY)))
    parser.add_argument("--plan", action="store_true", help="print a GPU's units, and do nothing")
    parser.add_argument("--unit", nargs="+", choices=names, metavar="NAME", help="[all, in order]")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default benchmarks/results; dry runs: build"
    )
    parser.add_argument(
        "--limit", type=float, default=limit, metavar="SECONDS", help=f"of all  [{limit}]"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        type=Path,
        const=True,
        metavar="FOLDER",
        help="skip what was done, on this machine and code, by the run whose --out it was  [--out]",
    )
    processes = min(14, len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--processes", type=int, default=processes, help="of tests, and of compilers"
    )
    _aot.add_arguments(parser)
    args = parser.parse_args(argv)
    for name in ("limit", "processes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name):g}")
    args.out = args.out or (BENCHMARKS / "results" if on_gpu or args.aot else ROOT / "build")
    if args.resume is True:
        args.resume = args.out
    return args


def run_units(args: argparse.Namespace, facts: dict[str, Any], on_gpu: bool) -> bool:
    known = plan(args.processes) if on_gpu else DRY
    if not on_gpu:
        print("There is no GPU here: dry runs on tiny sizes.")
    by_name = {unit.name: unit for unit in known}
    for name in args.unit or ():
        if name not in by_name:
            print(f"{name}: " + ("a dry run" if on_gpu else "not measured, since it needs a GPU"))
    units = [unit for unit in known if unit.name in (args.unit or by_name)]
    folder = slug(facts["device"]) if on_gpu else "dry-run"
    earlier = args.resume and args.resume / folder
    deadline = BEGAN + args.limit
    runner = Runner(args.out / folder, facts, vars(args), deadline, earlier)
    done = runner.run(units)
    if on_gpu and (tuned := args.out / folder / "tune.json").exists():
        print_advice(json.loads(tuned.read_text())["rows"])  # of a unit that was cut short too
    print(f"{time.monotonic() - BEGAN:.0f} s of {args.limit:.0f}; files in {args.out / folder}")
    return done


def main() -> None:
    args = parse()
    if args.plan:
        print(plan_table(plan(args.processes)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    on_gpu = torch.cuda.is_available()
    facts = machine(torch.device("cuda" if on_gpu else "cpu"))
    print_machine(facts)
    if args.aot:
        _aot.run(args, facts, BEGAN + args.limit)
    if not args.aot or args.unit:
        sys.exit(not run_units(args, facts, on_gpu))


if __name__ == "__main__":
    main()
