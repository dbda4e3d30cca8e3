"""Whether a compiled step overtakes the C++ trajectory on a CPU: what "auto" goes by.

    python benchmarks/crossover.py

For models of growing size and batches of growing number, both ways sample in turn in one process
for as many steps as take about a second, but at least ten. A figure is how many times as fast the
trajectory is, the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from _harness import machine, median_ratio, print_machine, seconds, table, write_json
from tqdm import tqdm

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, Sampler, flops, testing

WAYS = ("compile", "trajectory")
COLUMNS = {"model": "", "hidden": "d", "layers": "d", "tokens": "d"}
# The toy wider and longer; then depths at which weights no longer lie in the caches.
MODELS = {
    "toy": DiTConfig(),
    "wider": DiTConfig(hidden=128),
    "longer": DiTConfig(hidden=128, img_size=32),
    "widest": DiTConfig(hidden=256, n_heads=8, img_size=32),
    "DiT-S/4": fastdit.PRESETS["DiT-S/4"],
    "limit": DiTConfig(hidden=512, n_layers=12, n_heads=8, img_size=32),
}
ROUND_FLOP = 2e11


def measure(name: str, cfg: DiTConfig, batch: int, rounds: int) -> dict[str, Any]:
    model = fastdit.DiT.from_config(cfg)
    testing.randomize(model)
    steps = max(10, min(200, int(ROUND_FLOP / flops.flop(cfg, batch))))
    scheduler = DiffusionScheduler(steps, schedule="cosine")
    labels = [i % cfg.num_classes for i in range(batch)]
    samplers = {way: Sampler(model, scheduler, execution=way) for way in WAYS}
    for sampler in samplers.values():
        sampler(labels)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, sampler in samplers.items():
            taken = seconds(lambda s=sampler: s(labels), torch.device("cpu"))
            times[way].append(taken * 200 / steps)  # of 200 steps, as the other tables
    row = {"model": name, "hidden": cfg.hidden, "layers": cfg.n_layers, "tokens": cfg.n_tokens}
    row |= {"batch": batch} | {
        f"{way} img/s": batch / statistics.median(times[way]) for way in WAYS
    }
    return row | {"ratio": median_ratio(times["compile"], times["trajectory"]), "seconds": times}


def summary(rows: list[dict[str, Any]]) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Columns and lines of the table: a line a model, a column a batch."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(row["model"], {name: row[name] for name in COLUMNS})
        line[f"batch {row['batch']}"] = row["ratio"]
    batches = dict.fromkeys(f"batch {row['batch']}" for row in rows)
    return COLUMNS | dict.fromkeys(batches, ".2f"), list(lines.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16, 64], metavar="B")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args()
    facts, rows = machine(torch.device("cpu")), []
    print_machine(facts)
    cases = [(name, batch) for name in args.model for batch in args.batch]
    for name, batch in tqdm(cases, leave=False):
        rows.append(measure(name, MODELS[name], batch, args.rounds))
        if args.json:
            write_json(args.json, facts, vars(args), rows=rows)
    print(table(*summary(rows)))


if __name__ == "__main__":
    main()
