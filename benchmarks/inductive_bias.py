"""Does a U-Net of the same size do better than the toy DiT at this scale, and with how much data?

    python benchmarks/inductive_bias.py --json results.json --plot plot.png

Both are trained by the same recipe, scheduler and draws of noise, for the same number of optimizer
steps, on sets of three sizes; both are sampled by the same sampler. The held-out loss is that of
1,600 images no model has seen, under one drawing of noise for all.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _harness import machine, print_machine, table, write_json
from torch import Tensor, nn
from tqdm import tqdm

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, Sampler
from fastdit.data.shapes import LABEL_NAMES, judge
from fastdit.diffusion import TerminalSNRWarning, timestep_embedding
from fastdit.train.loading import ShuffledOrder
from fastdit.train.objective import Objective
from fastdit.train.recipe import RECIPES, SHOWINGS, Recipe
from fastdit.train.sources import ImageBatch, Shapes

COLUMNS = {
    "model": "",
    "parameters": ",d",
    "images": ",d",
    "steps": ",d",
    "training loss": ".4f",
    "held-out loss": ".4f",
    "colour": ".3f",
    "shape": ".3f",
}
HELD_OUT_PER_CLASS = 100
HELD_OUT_SEED = 10**6  # of images, and of the noise they are judged with


class ResBlock(nn.Module):
    """Two convolutions, the conditioning added between them."""

    def __init__(self, channels_in: int, channels: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels_in), nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conditioning = nn.Linear(width, channels)
        self.skip = (
            nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()
        )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.conditioning(c)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class UNet(nn.Module):
    """Ho et al. 2020's, small and plain: three resolutions, a block each way at every one.

    No attention, no dropout; the DiT's embeddings of timestep and label.
    """

    def __init__(self, channels: tuple[int, ...] = (32, 40, 56), width: int = 64) -> None:
        super().__init__()
        self.t_embed = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.y_embed = nn.Embedding(len(LABEL_NAMES), width)
        self.width, pairs = width, list(zip(channels, channels[1:], strict=False))
        self.enter = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down = nn.ModuleList(ResBlock(a, a, width) for a in channels[:-1])
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.middle = nn.ModuleList(ResBlock(channels[-1], channels[-1], width) for _ in range(2))
        self.grow = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in reversed(pairs))
        self.up = nn.ModuleList(ResBlock(2 * a, a, width) for a in reversed(channels[:-1]))
        self.norm, self.leave = (
            nn.GroupNorm(8, channels[0]),
            nn.Conv2d(channels[0], 3, 3, padding=1),
        )
        nn.init.zeros_(self.leave.weight)  # as adaLN-Zero begins
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = F.silu(self.t_embed(timestep_embedding(t, self.width)) + self.y_embed(y))
        h, skips = self.enter(x), []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            h = block(h, c)
            skips.append(h)
            h = shrink(h)
        for block in self.middle:
            h = block(h, c)
        for grow, block in zip(self.grow, self.up, strict=True):
            h = grow(F.interpolate(h, scale_factor=2.0))
            h = block(torch.cat([h, skips.pop()], dim=1), c)
        return self.leave(F.silu(self.norm(h)))


MODELS = {"DiT": fastdit.DiT, "U-Net": UNet}


def train(name: str, recipe: Recipe, source: Shapes) -> tuple[nn.Module, list[float]]:
    """The recipe's loop, for any model: the losses of all steps."""
    torch.manual_seed(recipe.seed)
    model = MODELS[name]()
    scheduler = DiffusionScheduler(recipe.T, schedule=recipe.schedule)
    objective = Objective(model, DiTConfig(), scheduler, recipe.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
    )
    order, losses = ShuffledOrder(len(source), recipe.seed), []
    for step in tqdm(range(recipe.steps), desc=f"{name}, {len(source)} images", leave=False):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        first = step * recipe.batch_size
        numbers = torch.arange(first, first + recipe.batch_size)
        loss = objective(source.take(order.rows(first, recipe.batch_size)), numbers)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@torch.no_grad()
def held_out_loss(model: nn.Module, recipe: Recipe) -> float:
    source = Shapes(HELD_OUT_PER_CLASS, HELD_OUT_SEED)
    scheduler = DiffusionScheduler(recipe.T, schedule=recipe.schedule)
    objective = Objective(model, DiTConfig(), scheduler, HELD_OUT_SEED)
    everything: ImageBatch = source.take(torch.arange(len(source)))
    return objective(everything, torch.arange(len(source))).item()


def measure(name: str, recipe: Recipe, per_class: int, samples: int) -> dict[str, Any]:
    start = time.perf_counter()
    model, losses = train(name, recipe, Shapes(per_class))
    seconds = time.perf_counter() - start
    labels = torch.arange(len(LABEL_NAMES)).repeat_interleave(samples)
    sampler = Sampler(
        model,
        DiffusionScheduler(recipe.T, schedule=recipe.schedule),
        SHOWINGS[recipe.name].solver,
        sample_shape=(3, 16, 16),
    )
    accuracy = judge(sampler(labels, seed=0), labels)
    last = losses[-max(1, len(losses) // 30) :]
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "images": 16 * per_class,
        "steps": recipe.steps,
        "training loss": sum(last) / len(last),
        "held-out loss": held_out_loss(model, recipe),
        "colour": accuracy.colour,
        "shape": accuracy.shape,
        "seconds": seconds,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    measures = ("held-out loss", "colour", "shape")
    panels = figure.subplots(1, 3)
    steps = sorted({row["steps"] for row in rows})
    for axes, what in zip(panels, measures, strict=True):
        for name, colour in (("DiT", "tab:blue"), ("U-Net", "tab:orange")):
            for count, line in zip(steps, ("--", "-", ":"), strict=False):
                own = [row for row in rows if (row["model"], row["steps"]) == (name, count)]
                label = f"{name}, {count:,} steps"
                xs, ys = [row["images"] for row in own], [row[what] for row in own]
                axes.plot(xs, ys, line, marker="o", color=colour, label=label)
        axes.set(xscale="log", xlabel="training images", title=what)
        if what != "held-out loss":
            axes.set_ylim(0, 1.05)
            axes.axhline(0.25, color="grey", linewidth=0.8, linestyle=":")
    panels[0].legend(fontsize=8)
    panels[2].text(rows[0]["images"], 0.2, "guessing", color="grey", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[400, 3200, 25600])
    parser.add_argument("--steps", type=int, nargs="+", default=[750, 3000], help="up to three")
    parser.add_argument("--samples", type=int, default=20, help="judged, of each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="needs matplotlib")
    args = parser.parse_args()
    if any(n < 16 or n % 16 for n in args.images) or min(*args.steps, args.samples) < 1:
        parser.error("expected --images in multiples of 16, --steps and --samples of at least 1")
    warnings.simplefilter("ignore", TerminalSNRWarning)  # the recipe is the seed's, on purpose
    facts = machine(torch.device("cpu"))
    print_machine(facts)
    rows: list[dict[str, Any]] = []
    for steps in args.steps:
        recipe = replace(RECIPES["seed"], steps=steps, seed=args.seed)
        for images in args.images:
            for name in MODELS:
                rows.append(measure(name, recipe, images // 16, args.samples))
                print(table(COLUMNS, rows[-1:]), flush=True)
                if args.json:
                    write_json(args.json, facts, vars(args), rows=rows)
    print(f"\nbatches of {RECIPES['seed'].batch_size}; accuracies over {16 * args.samples} samples")
    print(table(COLUMNS, rows))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
