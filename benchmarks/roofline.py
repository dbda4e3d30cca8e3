"""The least time a sampling step can take, from ceilings measured on the model's own shapes.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --preset DiT-XL/2 --rows 2 8 32 128 --dtype bfloat16

A step is one forward of so many rows (two an image under guidance), its conditioning hoisted out
of the loop. Its floor is the sum of

- its matrix products, each timed alone by the library's own `mm` on its shape;
- attention, at the rate of the best of those products or of a copy, whichever takes longer;
- the two passes a block that LayerNorm, modulation, gate and residual need, at the rate of a copy
  of one of their tensors: residual and branch read, residual and modulated written.

GELU, biases and the solver's update are free: they can ride in what is counted. On a GPU the
weights of a product take turns over copies that exceed the L2 cache, as a model's layers do, while
activations stay where they fit; products and copies are timed inside a CUDA graph. On a CPU what
calling PyTorch costs is in each figure, and for a small model is most of it: there this is a
yardstick, and code that does not pay for calls can run below it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _harness import DTYPES, machine, print_machine, seconds, table, write_json
from _ops import copies
from tqdm import tqdm

import fastdit
from fastdit.config import MLP_RATIO, DiTConfig
from fastdit.flops import attention_work, flop, pass_bytes, products
from fastdit.sampling.sampler import TABLE_BYTES

ROUNDS = 5
LEAST_SECONDS = 0.01  # a round's
COLUMNS = {
    "preset": "",
    "rows": "d",
    "GFLOP": ".2f",
    "products ms": ".3f",
    "TFLOP/s": ".3f",
    "attention ms": ".3f",
    "passes ms": ".3f",
    "copy GB/s": ".0f",
    "floor ms": ".3f",
    "rows/s": ".1f",
}


def measure(cfg: DiTConfig, rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The floor of a step in seconds, and what it is made of."""

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
    """Seconds a call, the median of rounds of many calls that take turns."""

    def turns(times: int = 1) -> None:
        for _ in range(times):
            for call in calls:
                call()

    turns(2)
    run, held = turns, len(calls)
    if device.type == "cuda":
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        repeats = -(-16 // len(calls))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.graph(graph, stream=stream):
            turns(repeats)
        held = repeats * len(calls)

        def run(times: int = 1) -> None:
            for _ in range(times):
                graph.replay()

    once = min(seconds(run, device) for _ in range(3))
    times = max(1, round(LEAST_SECONDS / once))
    rounds = [seconds(lambda: run(times), device) for _ in range(ROUNDS)]
    return statistics.median(rounds) / times / held


def memory_parts(cfg: DiTConfig, rows: int, dtype: torch.dtype, steps: int) -> dict[str, int]:
    """Bytes that a sampler of the graph execution needs beside the model, by what they are for."""
    width = (6 * cfg.n_layers + 2) * cfg.hidden
    residual = rows * cfg.n_tokens * cfg.hidden * dtype.itemsize
    state_item = torch.promote_types(dtype, torch.float32).itemsize
    labels = min(rows, cfg.num_classes)
    return {
        "weights": sum(p.numel() for p in _meta(cfg).parameters()) * dtype.itemsize,
        "tables": min(TABLE_BYTES, steps * labels * width * dtype.itemsize),
        "rows of modulation": 2 * rows * width * dtype.itemsize,  # picked, and the graph's own
        "residual stream": 2 * residual,  # before and after a pass
        "widest intermediate": 2 * MLP_RATIO * residual,  # before and after GELU
        "state": 4 * rows * torch.Size(cfg.sample_shape).numel() * state_item,
    }


def _meta(cfg: DiTConfig) -> fastdit.DiT:
    with torch.device("meta"):
        return fastdit.DiT.from_config(cfg)


def row_of(preset: str, floor: dict[str, Any]) -> dict[str, Any]:
    return {
        "preset": preset,
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument(
        "--preset",
        nargs="+",
        choices=fastdit.PRESETS,
        metavar="NAME",
        default=["DiT-XL/2"] if on_gpu else ["toy"],
    )
    parser.add_argument(
        "--rows", nargs="+", type=int, metavar="R", default=[2, 8, 32, 128] if on_gpu else [1, 16]
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args(argv)
    if min(args.rows) < 1:
        parser.error(f"--rows: expected at least 1, got {min(args.rows)}")
    return args


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    facts = machine(device)
    print_machine(facts)
    floors = []
    cases = [(preset, rows) for preset in args.preset for rows in args.rows]
    for preset, rows in tqdm(cases, leave=False):
        cfg = fastdit.PRESETS[preset]
        floors.append({"preset": preset} | measure(cfg, rows, DTYPES[args.dtype], device))
    rows = [row_of(floor["preset"], floor) for floor in floors]
    print(table(COLUMNS, rows))
    if args.json:
        write_json(args.json, facts, vars(args), rows=rows, floors=floors)


if __name__ == "__main__":
    main()
