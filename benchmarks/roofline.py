"""The least time a sampling step can take, from ceilings measured on the model's own shapes.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --preset DiT-XL/2 --rows 2 8 32 128 --dtype bfloat16

A step is one forward of the given number of rows (two for each image under guidance), without the
conditioning, which is computed before the loop. Its floor is the sum of

- its matrix products, each timed alone with the library's `mm` on its shape;
- attention, at the rate of the best of those products or of a copy, whichever takes longer;
- the two passes in each block that LayerNorm, modulation, gate and residual need, at the rate of a
  copy of one of their tensors: they read residual and branch, and write residual and modulated.

GELU, biases and the solver's update cost nothing here, since they can be fused into the rest. On a
GPU, copies of a product's weights that exceed the L2 cache take turns, as the layers of a model do,
while activations stay where they fit; products and copies are timed inside a CUDA graph. On a CPU
each figure includes the cost of calling PyTorch, which dominates for a small model; there the floor
is only a yardstick, and code that avoids these calls can be faster.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import _harness as harness
import torch
from _harness import DTYPES, Results, Row, positive, seconds
from _ops import copies
from tqdm import tqdm

import fastdit
from fastdit.config import MLP_RATIO, DiTConfig
from fastdit.flops import attention_work, flop, pass_bytes, products
from fastdit.sampling.sampler import TABLE_BYTES

ROUNDS = 5
LEAST_SECONDS = 0.01  # of a round
COLUMNS = harness.columns(
    "preset; rows: d; GFLOP: .2f; products ms, TFLOP/s, attention ms, passes ms: .3f; "
    "copy GB/s: .0f; floor ms: .3f; rows/s: .1f"
)


def measure(cfg: DiTConfig, rows: int, dtype: torch.dtype, device: torch.device) -> Row:
    """Return the floor of a step in seconds, and its parts."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    timed = []
    for product in products(cfg, rows):
        a, out = randn(product.rows, product.inner), randn(product.rows, product.columns)
        count = copies(product.inner * product.columns * dtype.itemsize, device)
        weights = [randn(product.columns, product.inner) for _ in range(min(count, cfg.n_layers))]
        calls = [lambda w=w, a=a, out=out: torch.mm(a, w.t(), out=out) for w in weights]
        timed.append((product, _time(calls, device)))
    source = randn(rows * cfg.n_tokens, cfg.hidden)
    target = torch.empty_like(source)
    copy = _time([lambda: target.copy_(source)], device)

    rate = max(product.flop / took for product, took in timed)
    copy_rate = 2 * source.nbytes / copy
    attention_flop, attention_bytes = attention_work(cfg, rows, dtype.itemsize)
    products_s = sum(product.times * took for product, took in timed)
    attention_s = max(attention_flop / rate, attention_bytes / copy_rate)
    passes_s = pass_bytes(cfg, rows, dtype.itemsize) / copy_rate
    return {
        "rows": rows,
        "flop": flop(cfg, rows),
        "products": [product._asdict() | {"seconds": took} for product, took in timed],
        "products s": products_s,
        "product flop": sum(product.times * product.flop for product, _ in timed),
        "attention s": attention_s,
        "passes s": passes_s,
        "copy bytes/s": copy_rate,
        "floor s": products_s + attention_s + passes_s,
    }


def _time(calls: list[Callable[[], Any]], device: torch.device) -> float:
    """Return the seconds of one call: the median over rounds in which the calls take turns."""

    def turns() -> None:
        for call in calls:
            call()

    for _ in range(2):
        turns()
    run, held = turns, len(calls)
    if device.type == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        run, held = harness.capture(calls, stream)

    once = min(seconds(run, device) for _ in range(3))
    times = range(max(1, round(LEAST_SECONDS / once)))
    rounds = [seconds(lambda: [run() for _ in times], device) for _ in range(ROUNDS)]
    return statistics.median(rounds) / len(times) / held


def memory_parts(cfg: DiTConfig, rows: int, dtype: torch.dtype, steps: int) -> dict[str, int]:
    """Return the bytes that sampling with the graph execution needs, by purpose."""
    width = cfg.modulation_width
    residual = rows * cfg.n_tokens * cfg.hidden * dtype.itemsize
    state_item = torch.promote_types(dtype, torch.float32).itemsize
    labels = min(rows, cfg.num_classes)
    return {
        "weights": sum(p.numel() for p in _meta(cfg).parameters()) * dtype.itemsize,
        "tables": min(TABLE_BYTES, steps * labels * width * dtype.itemsize),
        "rows of modulation": 2 * rows * width * dtype.itemsize,  # selected, and in the graph
        "residual stream": 2 * residual,  # before and after a pass
        "widest intermediate": 2 * MLP_RATIO * residual,  # before and after GELU
        "state": 4 * rows * torch.Size(cfg.sample_shape).numel() * state_item,
    }


def _meta(cfg: DiTConfig) -> fastdit.DiT:
    with torch.device("meta"):
        return fastdit.DiT.from_config(cfg)


def row_of(floor: Row) -> Row:
    return {
        "preset": floor["preset"],
        "rows": floor["rows"],
        "GFLOP": floor["flop"] / 1e9,
        "products ms": floor["products s"] * 1e3,
        "TFLOP/s": floor["product flop"] / floor["products s"] / 1e12,
        "attention ms": floor["attention s"] * 1e3,
        "passes ms": floor["passes s"] * 1e3,
        "copy GB/s": floor["copy bytes/s"] / 1e9,
        "floor ms": floor["floor s"] * 1e3,
        "rows/s": floor["rows"] / floor["floor s"],
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = harness.parser(__doc__, device=True)
    on_gpu = torch.cuda.is_available()
    preset, dtype = ("DiT-XL/2", "bfloat16") if on_gpu else ("toy", "float32")
    rows = [2, 8, 32, 128] if on_gpu else [1, 16]
    add = parser.add_argument
    add("--preset", nargs="+", choices=fastdit.PRESETS, metavar="NAME", default=[preset])
    add("--rows", nargs="+", type=positive, metavar="R", default=rows)
    add("--dtype", choices=DTYPES, default=dtype)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    results = Results.of(args, args.device, floors=[])
    cases = [(preset, rows) for preset in args.preset for rows in args.rows]
    for preset, rows in tqdm(cases, leave=False):
        floor = measure(fastdit.PRESETS[preset], rows, DTYPES[args.dtype], args.device)
        results["floors"].append({"preset": preset} | floor)
        results.add(row_of(results["floors"][-1]))
    print(harness.table(COLUMNS, results["rows"]))


if __name__ == "__main__":
    main()
