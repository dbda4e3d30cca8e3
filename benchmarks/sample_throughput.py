"""Images per second of every way to sample, side by side, with the error beside the speed.

    python benchmarks/sample_throughput.py
    python benchmarks/sample_throughput.py --preset DiT-S/8 --batch 1 4 --steps 10

The ways are timed in turn, round by round, in one process; figures are medians over the rounds,
and ratios, to the reference eager and compiled, medians of the rounds' ratios. Before the rounds
each way samples once with recorded noise, and that result is held against the reference in float64
with the same noise. Weights are random and none is zero: a fresh DiT returns zeros, and neither
speed nor error would mean much.
The share is that of the floor of `roofline.py`, whose ceilings are measured in the same process.
"FMA share", of the C++ trajectory, is the model's FLOP a second over what multiply-adds on
registers alone reach, measured after each of its runs.

Ways: the plain model in the plain loop, eager, compiled for each batch size, or (on CUDA) compiled
with max-autotune and CUDA graphs; diffusers' DiT of the same sizes with its DDPM scheduler, which
is another network and has no error here; fastdit in each of its executions.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import roofline
import torch
from _harness import (
    DTYPES,
    fresh_compile_cache,
    machine,
    median_ratio,
    print_machine,
    seconds,
    table,
    write_json,
)
from torch import Tensor, nn
from tqdm import tqdm

import fastdit
from fastdit import backends, choice, reference, testing, work
from fastdit.diffusion import TerminalSNRWarning
from fastdit.kernels import cpu

BASELINE = "reference eager"
TRAJECTORY = "fastdit trajectory"
COMPILED = ("reference compiled", "reference max-autotune", "fastdit compile")
COLUMNS = {
    "way": "",
    "batch": "d",
    "images/s": ".1f",
    "min": ".1f",
    "max": ".1f",
    "ms/step": ".2f",
    "ratio": ".2f",
    "to compiled": ".2f",
    "share": ".2f",
    "FMA share": ".2f",
    "error": ".1e",
    "compile s": ".1f",
}
MEMORY_COLUMNS = {"peak MiB": ".0f", "parts MiB": ".0f"}  # what a way adds to the model; on CUDA


@dataclass
class Case:
    """One model on one device, and how long and in what dtype it is sampled."""

    preset: str
    model: fastdit.DiT
    scheduler: fastdit.DiffusionScheduler
    dtype: torch.dtype
    device: torch.device
    plain: reference.DiT = field(init=False)
    own: fastdit.DiT = field(init=False)

    def __post_init__(self) -> None:
        self.plain = reference.DiT.from_config(self.model.cfg).to(self.device)
        self.plain.load_state_dict(self.model.state_dict())
        if self.dtype == torch.float64:
            self.plain.double()
        self.own = fastdit.DiT.from_config(self.model.cfg).to(self.device)
        self.own.load_state_dict(self.model.state_dict())
        self.own.to(self.dtype)

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def labels(self, batch: int) -> Tensor:
        return torch.arange(batch, device=self.device) % self.model.cfg.num_classes

    def recorded(self, batch: int) -> tuple[Tensor, Tensor]:
        """(x_T, noise) for one error run."""
        shape = (self.scheduler.T + 1, batch, *self.model.cfg.sample_shape)
        z = torch.randn(shape, generator=torch.Generator().manual_seed(batch)).to(self.device)
        return z[0], z[1:]


# A way: (labels, x_T, noise) -> images; with x_T and noise None it makes its own.
Way = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def reference_way(case: Case, **compile_options: Any) -> Way:
    """The plain loop; in 16 bits under autocast, as its users run it."""
    model: nn.Module = case.plain
    if compile_options:
        # One graph a batch size is the fastest it gets; fullgraph: it never falls back unseen.
        model = torch.compile(model, dynamic=False, fullgraph=True, **compile_options)

    def sample(labels: Tensor, x_T: Tensor | None, noise: Tensor | None) -> Tensor:
        if x_T is None:
            shape = (len(labels), *case.model.cfg.sample_shape)
            x_T = torch.randn(shape, device=case.device, dtype=case.state_dtype)
        low_precision = case.dtype == torch.bfloat16
        with torch.autocast(case.device.type, torch.bfloat16, enabled=low_precision):
            x_T = x_T.to(case.state_dtype)
            return reference.sample(model, case.scheduler, x_T, labels, noise)

    return sample


def diffusers_way(case: Case) -> Way:
    """diffusers' transformer and scheduler in the loop of its DiTPipeline, without guidance."""
    from diffusers import DDPMScheduler, DiTTransformer2DModel

    cfg = case.model.cfg
    model = DiTTransformer2DModel(
        num_attention_heads=cfg.n_heads,
        attention_head_dim=cfg.head_dim,
        in_channels=cfg.in_channels,
        out_channels=cfg.out_channels,
        num_layers=cfg.n_layers,
        sample_size=cfg.img_size,
        patch_size=cfg.patch_size,
        num_embeds_ada_norm=cfg.num_classes,
    )
    model = model.to(case.device).eval()
    if case.dtype != torch.float32:
        model = model.to(case.dtype)
    betas = case.scheduler.tables["betas"].numpy()
    scheduler = DDPMScheduler(case.scheduler.T, trained_betas=betas, clip_sample=False)
    scheduler.set_timesteps(case.scheduler.T)

    @torch.no_grad()
    def sample(labels: Tensor, x_T: Tensor | None, noise: Tensor | None) -> Tensor:
        x = torch.randn(len(labels), *cfg.sample_shape, device=case.device, dtype=case.dtype)
        for t in scheduler.timesteps:
            out = model(x, timestep=t.to(x.device).expand(len(x)), class_labels=labels).sample
            x = scheduler.step(out[:, : cfg.in_channels], t, x).prev_sample
        return x

    return sample


def fastdit_way(case: Case, execution: str) -> Way:
    sampler = fastdit.Sampler(case.own, case.scheduler, execution=execution)

    def sample(labels: Tensor, x_T: Tensor | None, noise: Tensor | None) -> Tensor:
        return sampler(labels, x_T=x_T, noise=noise)

    return sample


WAYS: dict[str, Callable[[Case], Way]] = {
    BASELINE: reference_way,
    "reference compiled": lambda case: reference_way(case, mode="default"),
    "reference max-autotune": lambda case: reference_way(case, mode="max-autotune"),
    "diffusers eager": diffusers_way,
    "fastdit eager": lambda case: fastdit_way(case, "eager"),
    "fastdit compile": lambda case: fastdit_way(case, "compile"),
    "fastdit graph": lambda case: fastdit_way(case, "graph"),
    TRAJECTORY: lambda case: fastdit_way(case, "trajectory"),
}


def obstacle(way: str, device: str) -> str | None:
    """Why a way cannot be timed here, or None."""
    if way in ("reference max-autotune", "fastdit graph") and not device.startswith("cuda"):
        return "needs CUDA"
    if way.startswith("diffusers") and importlib.util.find_spec("diffusers") is None:
        return "needs diffusers; pip install 'fastdit[test]'"
    return None


def measure(
    case: Case, ways: dict[str, Way], batch: int, rounds: int, bar: tqdm
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row a way, and the floor of a step."""
    labels = case.labels(batch)
    x_T, noise = case.recorded(batch)
    bar.set_description(f"batch {batch}, float64 oracle")
    exact = reference.DiT.from_config(case.model.cfg).to(case.device)
    exact.load_state_dict(case.model.state_dict())
    oracle = reference.sample(exact.double(), case.scheduler, x_T.double(), labels, noise.double())
    del exact
    bar.update()

    bar.set_description(f"batch {batch}, floor")
    floor = roofline.measure(case.model.cfg, batch, case.dtype, case.device)
    bar.update()

    rows: dict[str, dict[str, Any]] = {}
    for name, sample in ways.items():
        bar.set_description(f"batch {batch}, {name}, first run")
        rows[name] = {"preset": case.preset, "way": name, "batch": batch}
        rows[name] |= first_run(case, name, sample, (labels, x_T, noise), oracle)
        bar.update()

    timed = {name: way for name, way in ways.items() if "first run s" in rows[name]}
    times: dict[str, list[float]] = {name: [] for name in timed}
    peaks: list[float] = []
    for i in range(rounds):
        for name, sample in timed.items():
            bar.set_description(f"batch {batch}, {name}, round {i + 1} of {rounds}")
            times[name].append(seconds(lambda s=sample: s(labels, None, None), case.device))
            if name == TRAJECTORY and case.device.type == "cpu":
                peaks.append(cpu.peak_flop_per_second())
            bar.update()
    for name, row in rows.items():
        if name in times:
            row |= figures(case, batch, times[name])
            row["ratio"] = median_ratio(times[BASELINE], times[name])
            if "reference compiled" in times:
                row["to compiled"] = median_ratio(times["reference compiled"], times[name])
            row["share"] = floor["floor s"] * 1e3 / row["ms/step"]
            if name == TRAJECTORY and peaks:
                flop = work.flop(case.model.cfg, batch) * case.scheduler.T
                achieved = [flop / taken for taken in times[name]]
                row["FMA share"] = median_ratio(achieved, peaks)
                row["FMA peaks"] = peaks
            if name in COMPILED:
                # 0 where a graph was there already
                row["compile s"] = max(0.0, row["first run s"] - statistics.median(times[name]))
    return list(rows.values()), {"preset": case.preset} | floor


def first_run(
    case: Case, name: str, sample: Way, given: tuple[Tensor, Tensor, Tensor], oracle: Tensor
) -> dict[str, Any]:
    """How long a first run takes and, on CUDA, what it holds; then the error, with given noise."""
    row: dict[str, Any] = {}
    on_gpu, labels = case.device.type == "cuda", given[0]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    try:
        row["first run s"] = seconds(lambda: sample(labels, None, None), case.device)
        if on_gpu:
            row["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        if not name.startswith("diffusers"):
            row["error"] = testing.relative_error(sample(*given), oracle)
    except torch.cuda.OutOfMemoryError:
        return {"images/s": "out of memory"}
    except torch._dynamo.exc.TorchDynamoException as error:
        print(f"{name}, batch {len(labels)}: {str(error).splitlines()[0]}")
        return {"images/s": "did not compile"}
    if on_gpu and name == "fastdit graph":
        parts = roofline.memory_parts(case.model.cfg, len(labels), case.dtype, case.scheduler.T)
        row |= {"parts": parts, "parts MiB": sum(parts.values()) / 2**20}
    return row


def figures(case: Case, batch: int, times: list[float]) -> dict[str, Any]:
    median = statistics.median(times)
    return {
        "images/s": batch / median,
        "min": batch / max(times),
        "max": batch / min(times),
        "ms/step": median / case.scheduler.T * 1e3,
        "seconds": times,
    }


def run(case: Case, args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """The rows and the floors of a preset."""
    print(
        f"\n{case.preset}: {case.scheduler.T} steps, {args.dtype}; error is against the float64 "
        f"reference with the same noise; ratio is to {BASELINE}, share that of the floor"
    )
    rows, floors, chosen = [], [], list(args.way)
    reason = choice.obstacle("trajectory", case.own, case.device, case.dtype)
    if reason is None and case.device.type == "cpu" and not backends.has_cpp():
        reason = "needs a C++ compiler"
    if TRAJECTORY in chosen and reason:
        print(f"without {TRAJECTORY}, which {reason}")
        chosen.remove(TRAJECTORY)
    total = len(args.batch) * (2 + len(chosen) * (1 + args.rounds))
    with tqdm(total=total, leave=False) as bar:
        for batch in args.batch:
            # Made anew, so that what each holds is seen; compiled code is kept by PyTorch.
            ways = {name: WAYS[name](case) for name in chosen}
            own, floor = measure(case, ways, batch, args.rounds, bar)
            rows += own
            floors.append(floor)
    memory = MEMORY_COLUMNS if case.device.type == "cuda" else {}
    print(table(COLUMNS | memory, rows))
    return rows, floors


def build(preset: str, args: argparse.Namespace, device: torch.device) -> Case:
    steps = args.steps or (200 if preset == "toy" else 50)
    schedule = "linear" if preset == "toy" else "cosine"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TerminalSNRWarning)  # random weights: no samples to spoil
        scheduler = fastdit.DiffusionScheduler(steps, device, schedule)
    model = fastdit.DiT.from_config(fastdit.PRESETS[preset])
    testing.randomize(model)
    return Case(preset, model.to(device), scheduler, DTYPES[args.dtype], device)


def plot(path: Path, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Images per second by batch, one group of bars a batch."""
    import matplotlib.pyplot as plt

    timed = [row for row in rows if "seconds" in row]
    presets = list(dict.fromkeys(row["preset"] for row in timed))
    figure, axes = plt.subplots(
        1, len(presets), figsize=(6 * len(presets), 4), squeeze=False, layout="constrained"
    )
    for axis, preset in zip(axes[0], presets, strict=True):
        own = [row for row in timed if row["preset"] == preset]
        names = list(dict.fromkeys(row["way"] for row in own))
        batches = list(dict.fromkeys(row["batch"] for row in own))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            bars = [row for row in own if row["way"] == name]
            places = [batches.index(row["batch"]) + i * width for row in bars]
            axis.bar(places, [row["images/s"] for row in bars], width, label=name)
        axis.set_xticks([b + 0.4 - width / 2 for b in range(len(batches))], batches)
        axis.set(xlabel="batch", ylabel="images/s", title=f"{preset} on {facts['device']}")
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument(
        "--preset",
        nargs="+",
        choices=fastdit.PRESETS,
        metavar="NAME",
        default=["toy", "DiT-S/2", "DiT-B/2", "DiT-XL/2"] if on_gpu else ["toy"],
        help=f"one or more of {', '.join(fastdit.PRESETS)}",
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64], metavar="B")
    parser.add_argument("--steps", type=int, help="default: 200 for the toy, 50 for the others")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--way",
        nargs="+",
        choices=WAYS,
        metavar="NAME",
        help=f"one or more of {', '.join(WAYS)}; default: all that can run here",
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each way")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="needs fastdit[plots]")
    args = parser.parse_args(argv)
    for name in ("batch", "steps", "rounds"):
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    obstacles = {way: obstacle(way, args.device) for way in WAYS}
    for way in args.way or ():
        if obstacles[way]:
            parser.error(f"--way: {way!r} {obstacles[way]}")
    chosen = args.way or [way for way in WAYS if not obstacles[way]]
    args.way = [way for way in WAYS if way in chosen or way == BASELINE]
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: needs matplotlib; pip install 'fastdit[plots]'")
    return args


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    facts = machine(device)
    print_machine(facts)
    rows, floors = [], []
    with fresh_compile_cache():
        # The compiler's own start is no way's compile time.
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
        for preset in args.preset:
            torch._dynamo.reset()
            try:
                of_preset = run(build(preset, args, device), args)
                rows += of_preset[0]
                floors += of_preset[1]
            except torch.cuda.OutOfMemoryError as error:
                print(f"{preset}: does not fit ({str(error).splitlines()[0]})")
    if args.json:
        write_json(args.json, facts, vars(args), rows=rows, floors=floors)
    if args.plot:
        plot(args.plot, facts, rows)


if __name__ == "__main__":
    main()
