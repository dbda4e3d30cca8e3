"""Images per second of a text-to-image model in fastdit and in diffusers, with error and memory.

    python benchmarks/text_throughput.py
    python benchmarks/text_throughput.py --preset SD3 --batch 4 --way "fastdit eager"

The models are of the kind of PixArt or of Stable Diffusion 3, in float32 on a CPU: by default 12
layers of 384 channels on latents of 32 x 32 in patches of 2, with 120 or 154 tokens of text of
width 4096. Their weights are random and not zero. All ways load the same file, begin with the same
noise and take the same guided steps: diffusers' transformer and scheduler in the loop of its
pipeline, eager or compiled, and `fastdit.Sampler`. A call begins with the prompts' embeddings.

Each way has a process of its own, which is idle while others are timed, and the ways take turns,
round by round. Speeds are medians over the rounds, ratios medians of the ratios by round. "error"
is relative to diffusers in float64, on the first image of a batch. Of the process's memory "imports
MiB" is what it has after importing the package, before the model is loaded, "peak MiB" is the most
in all, with the loading and the first call, and "call MiB" is the most during the timed calls. They
are read on Linux only. The file of --json is rewritten after every run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import tempfile
from pathlib import Path

import _harness as harness
import _rivals as rivals
import _text_ways as ways
import torch
from _harness import FIGURE, Results, positive, seconds, table
from _text_ways import Case
from torch import Tensor
from tqdm import tqdm

from fastdit import testing

CPU = torch.device("cpu")
JUDGED = 1  # images; float64 takes several times as long
COLUMNS = harness.columns(
    f"way; batch: d; {FIGURE}, min, max: .3f; ms/step: .1f; ratio, to compiled: .2f; error: .1e; "
    "imports MiB, peak MiB, call MiB: .0f; first run s: .1f"
)


class Memory:
    """The resident memory of a process, where the system tells it."""

    def __init__(self, pid: int | None) -> None:
        self._folder = Path(f"/proc/{pid}")

    def now(self) -> float | None:
        return self._mib("VmRSS")

    def most(self) -> float | None:
        """Return the most since the start, or since `forget`."""
        return self._mib("VmHWM")

    def forget(self) -> None:
        if self._folder.exists():
            (self._folder / "clear_refs").write_text("5")

    def _mib(self, field: str) -> float | None:
        if not self._folder.exists():
            return None
        for line in (self._folder / "status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
        return None


class Sampling(harness.SideBySide):
    """All ways to sample one batch, each in its process."""

    BASES = {"ratio": ways.BASELINE, "to compiled": ways.COMPILED}

    def __init__(
        self, case: Case, batch: int, names: list[str], oracle: Tensor, results: Results
    ) -> None:
        rows = {name: {"preset": case.preset, "way": name, "batch": batch} for name in names}
        super().__init__(rows, batch, results)
        self.case, self.labels, self.oracle = case, torch.arange(batch), oracle
        self.processes = contextlib.ExitStack()  # leaving it ends them
        self.memories: dict[str, Memory] = {}

    def begin(self, name: str) -> rivals.Rival:
        """Start the process and sample once, to find its memory and error."""
        row, images = self.rows[name], []
        way = rivals.Rival(name, functools.partial(ways.make_way, name, self.case))
        self.processes.callback(way.close)
        memory = self.memories[name] = Memory(way.process.pid)
        row["imports MiB"] = memory.now()
        row["first run s"] = seconds(lambda: images.append(way(self.labels, None)), CPU)
        row["peak MiB"] = memory.most()
        memory.forget()
        row["error"] = testing.relative_error(images[0][: len(self.oracle)], self.oracle)
        return way

    def turn(self, name: str, way: rivals.Rival) -> float:
        return way.seconds(self.labels)

    def detail(self, name: str, times: list[float]) -> None:
        row = self.rows[name]
        row |= {"seconds": times, "call MiB": self.memories[name].most()}
        row["ms/step"] = self.images / row[FIGURE] / self.case.steps * 1e3


def exact_images(case: Case) -> Tensor:
    """Return the first images of any batch, sampled in float64."""
    way = rivals.Rival(ways.ORACLE, functools.partial(ways.make_way, ways.ORACLE, case))
    with contextlib.closing(way):
        return way(torch.arange(JUDGED), None)


def run(case: Case, args: argparse.Namespace, results: Results) -> None:
    """Add the rows of one preset."""
    torch.manual_seed(0)
    case.make_model().save_pretrained(case.folder)
    oracle, first = exact_images(case), len(results["rows"])
    with tqdm(total=len(args.batch) * len(args.way) * (1 + args.rounds), leave=False) as bar:
        for batch in args.batch:
            sampling = Sampling(case, batch, args.way, oracle, results)
            with sampling.processes:
                sampling.run(args.rounds, bar)
    print(f"\n{case.preset}: {case.steps} guided steps, ratio to {ways.BASELINE}")
    print(table(COLUMNS, results["rows"][first:]))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = harness.parser(__doc__)
    add = parser.add_argument
    presets = f"one or more of {', '.join(ways.PRESETS)}"
    add("--preset", nargs="+", choices=ways.PRESETS, default=list(ways.PRESETS), help=presets)
    add("--batch", nargs="+", type=positive, default=[1, 4], metavar="B")
    add("--steps", type=positive, default=20)
    add("--hidden", type=positive, default=384, help="channels, a multiple of 64")
    add("--layers", type=positive, default=12)
    add("--size", type=positive, default=32, help="of the latents, a side; even")
    default = [way for way in ways.WAYS if way != ways.COMPILE]
    add("--way", nargs="+", choices=ways.WAYS, default=default, help="default: all but the last")
    add("--rounds", type=positive, default=5, help="timed runs of each way")
    args = parser.parse_args(argv)
    if args.hidden % ways.HEAD_DIM:
        parser.error(f"--hidden: expected a multiple of {ways.HEAD_DIM}, got {args.hidden}")
    if args.size % ways.PATCH:
        parser.error(f"--size: expected an even number, got {args.size}")
    args.way = list(dict.fromkeys(args.way))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    results = Results.of(args, CPU, ["diffusers"])
    with harness.fresh_compile_cache():
        for preset in args.preset:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                sizes = args.hidden, args.layers, args.size, args.steps
                run(Case(preset, folder, *sizes, torch.get_num_threads()), args, results)
    return results.has_failures(FIGURE)


if __name__ == "__main__":
    sys.exit(main())
