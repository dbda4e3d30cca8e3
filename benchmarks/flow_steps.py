"""How many steps do a diffusion's and a flow's toy need, by solver, with and without guidance?

    python benchmarks/flow_steps.py --runs runs/steps --json results.json --plot plot.png

Both toys are the same model, trained on the same images for the same number of steps, by the
recipes "sharp" and "flow". The judge looks at samples of both in few and in many steps. The folder
of --runs keeps the trainings, so that a second call goes on with them.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import _harness as harness
import torch
from _harness import Results, Row, positive, table
from tqdm import tqdm

from fastdit import DiTConfig, Sampler
from fastdit.data.shapes import LABEL_NAMES, judge
from fastdit.diffusion import TerminalSNRWarning
from fastdit.model import DiT
from fastdit.solvers import DDIM, DDPM, DPMSolverPP, Euler, Heun, Solver
from fastdit.train.monitor import Monitor
from fastdit.train.recipe import RECIPES, SHOWINGS
from fastdit.train.run_folder import RunFolder
from fastdit.train.runtime import Runtime
from fastdit.train.sources import Shapes
from fastdit.train.trainer import Trainer

STEPS = (1, 5, 10, 25, 50, 200)
SOLVERS: dict[str, dict[str, Solver]] = {
    "sharp": {
        "ancestral": DDPM(clip=1.0),
        "DDIM": DDIM(clip=1.0),
        "DPM-Solver++": DPMSolverPP(clip=1.0),
        "Heun": Heun(clip=1.0),
    },
    "flow": {
        "Euler": Euler(),
        "Heun": Heun(),
        "DPM-Solver++": DPMSolverPP(),
    },
}


class Training(NamedTuple):
    """How the toys are trained."""

    scale: float  # factor of the recipes' steps
    images: int  # of each class
    compile: str


def train(name: str, training: Training, folder: Path) -> tuple[DiT, Trainer]:
    """Return a trained toy with averaged weights, and its trainer; a run in the folder goes on."""
    runtime, published = Runtime(compile=training.compile), RECIPES[name]  # type: ignore[arg-type]
    steps = max(2, round(published.steps * training.scale))
    recipe = replace(published, steps=steps, warmup=min(published.warmup, steps - 1))
    if saved := RunFolder(folder).newest():
        trainer = Trainer.resume(saved, folder, runtime, save_every=500)
        if trainer.recipe != recipe:
            raise SystemExit(f"--runs: {folder} holds a run of {trainer.recipe}")
    else:
        config = replace(DiTConfig(), null_class=True)
        source = Shapes(training.images)
        trainer = Trainer(config, recipe, source, folder, runtime, save_every=500)
    trainer.run(Monitor(progress=True))
    model = trainer.sampling_model()
    assert model is not None
    return model, trainer


def measure(
    name: str, model: DiT, trainer: Trainer, steps: Sequence[int], per_class: int, bar: tqdm
) -> list[Row]:
    """Return one row for each solver with and without guidance, with the accuracies by steps."""
    labels = torch.arange(len(LABEL_NAMES)).repeat_interleave(per_class)
    rows = []
    for guidance in (None, SHOWINGS[name].guidance):
        for solver_name, solver in SOLVERS[name].items():
            row: Row = {"recipe": name, "solver": solver_name}
            row["guidance"] = None if guidance is None else guidance.scale
            for count in steps:
                sampler = Sampler(model, trainer.scheduler, solver, count, guidance=guidance)
                accuracy = judge(sampler(labels, seed=0), labels)
                row[str(count)] = {"colour": accuracy.colour, "shape": accuracy.shape}
                row["evaluations"] = len(sampler.table.timesteps)
                bar.update()
            rows.append(row)
    return rows


def summary(rows: list[Row]) -> tuple[dict[str, str], list[Row]]:
    """Return the columns and rows of the table: "colour / shape" under each number of steps."""
    steps = [name for name in rows[0] if name.isdigit()]

    def cells(row: Row) -> Row:
        measured = {n: "{colour:.3f} / {shape:.3f}".format(**row[n]) for n in steps}
        return {name: row[name] for name in ("recipe", "solver", "guidance")} | measured

    columns = harness.columns("recipe, solver; guidance: .1f")
    return columns | dict.fromkeys(steps, ""), [cells(row) for row in rows]


def plot(rows: list[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    styles = {"DDIM": "--", "Heun": ":", "DPM-Solver++": "-."}
    for axes, guided in zip(panels, (False, True), strict=True):
        for row in rows:
            if (row["guidance"] is not None) != guided:
                continue
            steps = [name for name in row if name.isdigit()]
            flow = row["recipe"] == "flow"
            axes.plot(
                [int(n) for n in steps],
                [row[n]["shape"] for n in steps],
                styles.get(row["solver"], "-"),
                marker="o",
                markersize=4,
                color="tab:orange" if flow else "tab:blue",
                label=f"{'flow' if flow else 'diffusion'}, {row['solver']}",
            )
        axes.axhline(0.25, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", xlabel="steps", title="guided" if guided else "without guidance")
        axes.set_xticks(shown := [int(n) for n in rows[0] if n.isdigit()], map(str, shown))
        axes.minorticks_off()
        axes.set_ylim(0, 1.05)
    panels[0].set_ylabel("shape accuracy")
    panels[0].text(1, 0.2, "guessing", color="grey", fontsize=8)
    panels[1].legend(fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = harness.parser(__doc__)
    add = parser.add_argument
    add("--runs", type=Path, metavar="FOLDER", help="keep the trainings here, or go on with them")
    add("--scale", type=float, default=1.0, help="factor of the recipes' steps")
    add("--images", type=positive, default=200, help="for training, of each class")
    add("--steps", type=positive, nargs="+", default=list(STEPS), help="of the solvers")
    add("--per-class", type=positive, default=40, help="judged samples of each class")
    add("--compile", default="whole", choices=["none", "block", "whole"])
    add("--plot", type=Path, metavar="PATH", help="needs matplotlib")
    args = parser.parse_args()
    if args.scale <= 0:
        parser.error("--scale: expected above 0")
    warnings.simplefilter("ignore", TerminalSNRWarning)
    kept, args.runs = args.runs, None  # a path of this machine, which no figure depends on
    results = Results.of(args, torch.device("cpu"))
    training = Training(args.scale, args.images, args.compile)
    with tempfile.TemporaryDirectory() as temporary:
        runs = kept or Path(temporary)
        for name, solvers in SOLVERS.items():
            model, trainer = train(name, training, runs / name)
            total = 2 * len(solvers) * len(args.steps)
            with tqdm(total=total, desc=f"sampling {name}", leave=False) as bar:
                results.add(*measure(name, model, trainer, args.steps, args.per_class, bar))
    print(f"\ncolour / shape accuracy of {16 * args.per_class} samples, by steps")
    print(table(*summary(results["rows"])))
    if args.plot:
        plot(results["rows"], args.plot)


if __name__ == "__main__":
    main()
