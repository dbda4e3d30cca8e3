"""Whether a compiled step overtakes the C++ trajectory on a CPU, which decides what "auto" takes.

    python benchmarks/crossover.py

Both ways sample in turn in one process, for models and batches of growing size. A run has as many
steps as take about a second, but at least ten. The figure says how many times as fast as the
compiled step the trajectory is: the median of the ratios by round.
"""

from __future__ import annotations

import statistics

import _harness as harness
import torch
from _harness import Results, Row, median_ratio, positive, seconds
from tqdm import tqdm

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, Sampler, flops, testing

WAYS = ("compile", "trajectory")
COLUMNS = harness.columns("model; hidden, layers, tokens: d")
# The toy, made wider and longer; then models so deep that their weights no longer fit the caches.
MODELS = {
    "toy": DiTConfig(),
    "wider": DiTConfig(hidden=128),
    "longer": DiTConfig(hidden=128, img_size=32),
    "widest": DiTConfig(hidden=256, n_heads=8, img_size=32),
    "DiT-S/4": fastdit.PRESETS["DiT-S/4"],
    "DiT-B/4": fastdit.PRESETS["DiT-B/4"],
}
ROUND_FLOP = 2e11


def measure(name: str, batch: int, rounds: int) -> Row:
    cfg = MODELS[name]
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
            times[way].append(taken * 200 / steps)  # scaled to 200 steps, as in the other tables
    row = {"model": name, "hidden": cfg.hidden, "layers": cfg.n_layers, "tokens": cfg.n_tokens}
    row["batch"] = batch
    row |= {f"{way} img/s": batch / statistics.median(times[way]) for way in WAYS}
    return row | {"ratio": median_ratio(times["compile"], times["trajectory"]), "seconds": times}


def summary(rows: list[Row]) -> tuple[dict[str, str], list[Row]]:
    """Return the table's columns and lines: a line for each model, a column for each batch size."""
    lines: dict[str, Row] = {}
    for row in rows:
        line = lines.setdefault(row["model"], {name: row[name] for name in COLUMNS})
        line[f"batch {row['batch']}"] = row["ratio"]
    batches = dict.fromkeys(f"batch {row['batch']}" for row in rows)
    return COLUMNS | dict.fromkeys(batches, ".2f"), list(lines.values())


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--batch", nargs="+", type=positive, default=[1, 4, 16, 64], metavar="B")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=positive, default=5)
    args = parser.parse_args()
    results = Results.of(args, torch.device("cpu"))
    for name, batch in tqdm([(n, b) for n in args.model for b in args.batch], leave=False):
        results.add(measure(name, batch, args.rounds))
    print(harness.table(*summary(results["rows"])))


if __name__ == "__main__":
    main()
