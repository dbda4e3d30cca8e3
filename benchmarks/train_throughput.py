"""Training on the coloured shapes: the plain eager loop beside fastdit's, in one process.

    python benchmarks/train_throughput.py                      # images per second, 4 epochs
    python benchmarks/train_throughput.py --epochs 30 --seeds 0 1 2   # and what was learned

The two loops train the same model on the same images from the same initial weights, in turn,
seed by seed; the order of the images and the noise are each loop's own. The judge looks at 160
samples of each trained model, ten a class.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _harness import fresh_compile_cache, machine, median_ratio, print_machine, table, write_json
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import fastdit
from fastdit import reference
from fastdit.data import LABEL_NAMES, coloured_shapes, judge
from fastdit.diffusion import TerminalSNRWarning
from fastdit.train import PUBLISHED_LOSS, Recipe, Trainer, TrainResult

SAMPLES_PER_CLASS = 10
COLUMNS = {
    "way": "",
    "seed": "d",
    "images/s": ".0f",
    "first step s": ".1f",
    "final loss": ".4f",
    "colour": ".3f",
    "shape": ".3f",
}


def plain_loop(recipe: Recipe, initial: dict[str, torch.Tensor]) -> TrainResult:
    """Textbook PyTorch: a DataLoader, AdamW, clipping, a cosine rate by step."""
    torch.manual_seed(recipe.seed)
    model = reference.DiT()
    model.load_state_dict(initial)
    scheduler = fastdit.DiffusionScheduler(recipe.T, schedule=recipe.schedule)
    data = TensorDataset(*coloured_shapes(recipe.per_class, recipe.seed))
    loader = DataLoader(data, recipe.batch_size, shuffle=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    steps = recipe.epochs * len(loader)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    epoch_losses, images, start, first_step = [], 0, time.perf_counter(), 0.0
    for _ in tqdm(range(recipe.epochs), desc=f"plain, seed {recipe.seed}", leave=False):
        losses = []
        for x0, y in loader:
            t = torch.randint(recipe.T, (len(x0),))
            eps = torch.randn_like(x0)
            loss = F.mse_loss(model(scheduler.q_sample(x0, t, eps), t, y), eps)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            rate.step()
            losses.append(loss.item())
            if first_step:
                images += len(x0)
            else:
                first_step, start = time.perf_counter() - start, time.perf_counter()
        epoch_losses.append(statistics.mean(losses))
    return TrainResult(model, epoch_losses, images / (time.perf_counter() - start), first_step)


def run(name: str, recipe: Recipe) -> dict[str, Any]:
    trainer = Trainer(fastdit.DiTConfig(), recipe, compile=name == "fastdit compiled")
    if name == "plain eager":
        result = plain_loop(recipe, trainer.model.state_dict())
    else:
        result = trainer.run(progress=True)
    labels = torch.arange(len(LABEL_NAMES)).repeat_interleave(SAMPLES_PER_CLASS)
    model = fastdit.DiT()
    model.load_state_dict(result.model.state_dict())
    accuracy = judge(fastdit.Sampler(model, trainer.scheduler)(labels, progress=True), labels)
    return {
        "way": name,
        "seed": recipe.seed,
        "images/s": result.images_per_second,
        "first step s": result.first_step_seconds,
        "final loss": result.epoch_losses[-1],
        "epoch losses": result.epoch_losses,
        "colour": accuracy.colour,
        "shape": accuracy.shape,
    }


def print_summary(rows: list[dict[str, Any]], ways: list[str]) -> None:
    by_way = {name: [row for row in rows if row["way"] == name] for name in ways}
    losses = {name: [row["final loss"] for row in own] for name, own in by_way.items()}
    rates = {name: [row["images/s"] for row in own] for name, own in by_way.items()}
    baseline = ways[0]
    spread = max(losses[baseline]) - min(losses[baseline])
    print(f"\n{baseline}: final loss {statistics.mean(losses[baseline]):.4f}, spread {spread:.4f}")
    for name in ways[1:]:
        difference = statistics.mean(losses[name]) - statistics.mean(losses[baseline])
        print(
            f"{name}: final loss {difference:+.4f} from that, "
            f"{median_ratio(rates[name], rates[baseline]):.2f}x its images/s"
        )
    epochs = len(by_way[baseline][0]["epoch losses"])
    lines = [
        {"epoch": epoch, "published": PUBLISHED_LOSS[epoch]}
        | {
            name: statistics.mean(row["epoch losses"][epoch - 1] for row in own)
            for name, own in by_way.items()
        }
        for epoch in PUBLISHED_LOSS
        if epoch <= epochs
    ]
    print("\nloss by epoch, mean over the seeds (the published run drew another set)")
    print(table({"epoch": "d", "published": ".4f"} | dict.fromkeys(ways, ".4f"), lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--per-class", type=int, default=Recipe.per_class)
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args()
    warnings.simplefilter("ignore", TerminalSNRWarning)  # the recipe is the seed's, on purpose
    facts = machine(torch.device("cpu"))
    print_machine(facts)
    print(f"{args.epochs} epochs of {16 * args.per_class} images, seeds {args.seeds}")
    ways = ["plain eager", "fastdit eager"] + ["fastdit compiled"] * args.compile
    rows = []
    with fresh_compile_cache():
        for seed in args.seeds:
            recipe = Recipe(epochs=args.epochs, seed=seed, per_class=args.per_class)
            rows += [run(name, recipe) for name in ways]
    print(table(COLUMNS, rows))
    print_summary(rows, ways)
    if args.json:
        write_json(args.json, facts, vars(args), rows=rows)


if __name__ == "__main__":
    main()
