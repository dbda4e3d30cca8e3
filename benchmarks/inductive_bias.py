"""Does a U-Net of the same size do better than the toy DiT at this scale, and with how much data?

    python benchmarks/inductive_bias.py --json results.json --plot plot.png

Both models are trained with the same recipe, scheduler and noise, for the same number of optimizer
steps, on sets of three sizes; both are sampled by the same sampler. The held-out loss is computed
on 1,600 images that no model has seen, with the same noise for all models.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from pathlib import Path

import _harness as harness
import torch
import torch.nn.functional as F
from _harness import Results, Row, positive, table
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

COLUMNS = harness.columns(
    "model; parameters, images, steps: ,d; training loss, held-out loss: .4f; colour, shape: .3f"
)
HELD_OUT_PER_CLASS = 100
HELD_OUT_SEED = 10**6  # for the images and for the noise of their loss


class ResBlock(nn.Module):
    """Two convolutions with the conditioning added between them."""

    def __init__(self, channels_in: int, channels: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels_in)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conditioning = nn.Linear(width, channels)
        same = channels_in == channels
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.conditioning(c)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class UNet(nn.Module):
    """A small, plain U-Net after Ho et al. 2020, with the DiT's embeddings of timestep and label.

    It has three resolutions, with one block on the way down and one on the way up at each, and
    neither attention nor dropout.
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
        self.norm = nn.GroupNorm(8, channels[0])
        self.leave = nn.Conv2d(channels[0], 3, 3, padding=1)
        nn.init.zeros_(self.leave.weight)  # as in adaLN-Zero
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
    """Train by the recipe; return the model and the losses of all steps.

    `Trainer` is not used, since it trains a DiT only.
    """
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


def measure(name: str, recipe: Recipe, per_class: int, samples: int) -> Row:
    start = time.perf_counter()
    model, losses = train(name, recipe, Shapes(per_class))
    seconds = time.perf_counter() - start
    labels = torch.arange(len(LABEL_NAMES)).repeat_interleave(samples)
    scheduler = DiffusionScheduler(recipe.T, schedule=recipe.schedule)
    solver = SHOWINGS[recipe.name].solver
    sampler = Sampler(model, scheduler, solver, sample_shape=(3, 16, 16))
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


def plot(rows: list[Row], path: Path) -> None:
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
    parser = harness.parser(__doc__)
    add = parser.add_argument
    add("--images", type=int, nargs="+", default=[400, 3200, 25600])
    add("--steps", type=positive, nargs="+", default=[750, 3000], help="up to three")
    add("--samples", type=positive, default=20, help="judged, of each class")
    add("--seed", type=int, default=0)
    add("--plot", type=Path, metavar="PATH", help="needs matplotlib")
    args = parser.parse_args()
    if any(n < 16 or n % 16 for n in args.images):
        parser.error("--images: expected multiples of 16")
    warnings.simplefilter("ignore", TerminalSNRWarning)  # the seed recipe has it on purpose
    results = Results.of(args, torch.device("cpu"))
    for steps in args.steps:
        recipe = replace(RECIPES["seed"], steps=steps, seed=args.seed)
        for images in args.images:
            for name in MODELS:
                results.add(measure(name, recipe, images // 16, args.samples))
                print(table(COLUMNS, results["rows"][-1:]), flush=True)
    print(f"\nbatches of {RECIPES['seed'].batch_size}; accuracies over {16 * args.samples} samples")
    print(table(COLUMNS, results["rows"]))
    if args.plot:
        plot(results["rows"], args.plot)


if __name__ == "__main__":
    main()
