"""What the newer options of a block cost in sampling, at the same FLOP.

    python benchmarks/block_options.py --json results.json

Each model is sampled beside a plain DiT of the same sizes, in turns in one process. SiT-S/4, which
is a DiT-S/4 under a flow, stands beside the DiT. S/1 models, on 8 x 8 latents of 16 channels, have
the options of LightningDiT, or all of them, and stand beside one without any. A SwiGLU has the FLOP
of the MLP that it replaces. Both models of a pair take the same number of steps.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import _harness as harness
import torch
from _harness import FIGURE, Results, Row, positive
from tqdm import tqdm

import fastdit
from fastdit import DiffusionScheduler, DiTConfig, FlowMatching, Sampler, flops, testing

_PLAIN = replace(
    fastdit.PRESETS["DiT-S/4"], img_size=8, patch_size=1, in_channels=16, learn_sigma=False
)
_LIGHTNING = replace(_PLAIN, norm="rms", mlp="swiglu", rope=True)
_DDPM, _FLOW = DiffusionScheduler(1000), FlowMatching()
# The model and its process, and the plain one beside it.
PAIRS: dict[str, tuple[DiTConfig, FlowMatching, DiTConfig, DiffusionScheduler | FlowMatching]] = {
    "SiT-S/4": (fastdit.PRESETS["SiT-S/4"], _FLOW, fastdit.PRESETS["DiT-S/4"], _DDPM),
    "LightningDiT-S/1": (_LIGHTNING, _FLOW, _PLAIN, _FLOW),
    "all options, S/1": (replace(_LIGHTNING, qk_norm="rms"), _FLOW, _PLAIN, _FLOW),
}
STEPS = {1: 16, 4: 8, 16: 4}
COLUMNS = harness.columns(f"model; batch, steps: d; {FIGURE}, of the plain one: .2f; time: .3f")


def sampler(cfg: DiTConfig, process: DiffusionScheduler | FlowMatching, steps: int) -> Sampler:
    torch.manual_seed(0)
    model = fastdit.DiT.from_config(cfg).requires_grad_(False)
    testing.randomize(model)
    solver = "euler" if isinstance(process, FlowMatching) else "ddim"
    return Sampler(model, process, solver, steps)


def measure(name: str, batch: int, rounds: int) -> Row:
    cfg, flow, plain, process = PAIRS[name]
    assert flops.flop(cfg, 1) == flops.flop(plain, 1)
    steps = STEPS[batch]
    both = sampler(cfg, flow, steps), sampler(plain, process, steps)
    seconds: list[list[float]] = [[], []]
    labels = list(range(batch))
    for number in range(rounds + 1):  # the first one warms up
        for i in (0, 1) if number % 2 else (1, 0):
            start = time.perf_counter()
            both[i](labels)
            seconds[i].append(time.perf_counter() - start)
    ours, theirs = (statistics.median(own[1:]) for own in seconds)
    ratios = [a / b for a, b in zip(seconds[0][1:], seconds[1][1:], strict=True)]
    return {
        "model": name,
        "batch": batch,
        "steps": steps,
        "execution": both[0].execution_for(),
        FIGURE: batch / ours,
        "of the plain one": batch / theirs,
        "time": statistics.median(ratios),
    }


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--batch", nargs="+", type=int, choices=STEPS, default=list(STEPS))
    parser.add_argument("--rounds", type=positive, default=11, help="turns of each model")
    args = parser.parse_args()
    results = Results.of(args, torch.device("cpu"))
    for name in args.model:
        for batch in tqdm(args.batch, desc=name, leave=None):
            results.add(measure(name, batch, args.rounds))
    print("time: that of the model over that of the plain one, the median of the rounds")
    print(harness.table(COLUMNS, results["rows"]))


if __name__ == "__main__":
    main()
