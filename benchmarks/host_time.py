"""The Python time of one call of an op: from the call to the driver's launch, and back.

The inputs are small and the calls are not synchronised, so that no call waits for the device.
The columns are the public op without gradients, the registered op below it, the kernel's launcher
below that, the public op with gradients, and the backward. Rounds are interleaved. A figure is the
median over the rounds of the mean of a round's calls, in CPU time of this process, so that other
load on the machine counts less. These are figures of the CPU that runs Python, not of the device.

    python benchmarks/host_time.py --json benchmarks/results/host.json
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import _harness as harness
import torch
from _harness import Results, Row, positive, synchronize
from _ops import ATTENTION, GATED_LN, GATED_RMS, PLAIN_LN, UPDATE, Case, inputs, outputs

from fastdit import functional
from fastdit.ops import definitions, norms

# Shapes of the toy, then of DiT-XL/2, each for four images.
CASES = (
    *(Case(op, shape) for op in (PLAIN_LN, GATED_LN) for shape in ((4, 16, 64), (4, 256, 1152))),
    *(Case(ATTENTION, shape) for shape in ((4, 16, 4, 16), (4, 256, 16, 72))),
    *(Case(UPDATE, shape, "mixed") for shape in ((4, 4, 16, 16), (4, 4, 32, 32))),
)
COLUMNS = harness.columns("call; public, op, launcher, grad, backward: .1f")
WITH_GRADIENTS = ("grad", "backward")
REPEATS = 100

Call = Callable[[], Any]
Calls = dict[tuple[str, str], Call]  # by row and column


def calls(case: Case, device: torch.device) -> dict[str, Call]:
    """Return the calls of a case by column, from the public op down to the launch."""
    tensors, options = inputs(case, device, seed=0)
    public = getattr(functional, case.op)
    found = {"public": lambda: public(*tensors, **options), **_lower(case, tensors, options)}
    if case.op == UPDATE:
        return found
    leaves = [t.detach().requires_grad_() for t in tensors]
    found["grad"] = lambda: public(*leaves, **options)
    out = outputs(public(*leaves, **options))
    gradients = [torch.ones_like(t) for t in out]
    found["backward"] = lambda: torch.autograd.grad(out, leaves, gradients, retain_graph=True)
    return found


def _lower(case: Case, tensors: list[torch.Tensor], options: dict[str, Any]) -> dict[str, Call]:
    from fastdit.kernels import adaln, attention, sampling

    op = getattr(norms if "norm" in case.op else definitions, case.op)
    if case.op == ATTENTION:
        heads = options["n_heads"]
        return {
            "op": lambda: op(*tensors, heads),
            "launcher": lambda: attention.attention_fwd(*tensors, heads),
        }
    if case.op == UPDATE:
        seeds, guidance = options["seeds"], options["guidance"]
        given = guidance.scale, guidance.channels
        return {
            "op": lambda: op(*tensors, None, seeds, None, *given),
            "launcher": lambda: sampling.sampler_update(*tensors, None, seeds, None, given),
        }
    eps = options["eps"]
    x, *rest = tensors
    gated = (rest.pop(0), rest.pop(0)) if case.op in (GATED_LN, GATED_RMS) else None
    scale, shift, *weight = rest
    return {
        "op": lambda: op(*tensors, eps),
        "launcher": lambda: adaln.norm_modulate_fwd(
            x, scale, shift, eps, weight[0] if weight else None, gated
        ),
    }


def floor(device: torch.device) -> Calls:
    """Return the calls that bound every op from below: one of PyTorch's ops, and an allocation."""
    x = torch.zeros(4, 16, 64, device=device)
    return {
        ("floor add", "public"): lambda: torch.add(x, x),
        ("floor empty_like", "public"): lambda: torch.empty_like(x),
    }


def _mean_us(call: Call, with_gradients: bool, device: torch.device) -> float:
    synchronize(device)
    with torch.set_grad_enabled(with_gradients):
        start = time.process_time()
        for _ in range(REPEATS):
            call()
        us = (time.process_time() - start) / REPEATS * 1e6
    synchronize(device)
    return us


def measure(everything: Calls, rounds: int, device: torch.device) -> list[Row]:
    """Return rows of median microseconds of a call; all calls take turns in each round."""
    taken: dict[tuple[str, str], list[float]] = {at: [] for at in everything}
    for number in range(rounds + 1):
        for at, call in everything.items():
            us = _mean_us(call, at[1] in WITH_GRADIENTS, device)
            if number:  # the first round compiles
                taken[at].append(us)
    rows: dict[str, Row] = {}
    for (name, column), values in taken.items():
        rows.setdefault(name, {"call": name})[column] = statistics.median(values)
    return list(rows.values())


def main() -> None:
    parser = harness.parser(__doc__, device=True)
    parser.add_argument("--rounds", type=positive, default=20)
    args = parser.parse_args()
    if args.device.type != "cuda":
        sys.exit("host_time.py: needs a GPU, since the kernels are launched")
    results = Results.of(args, args.device)
    print("microseconds of Python for each call, on this CPU; nothing here is a device's speed")
    everything = floor(args.device)
    for case in CASES:
        found = calls(case, args.device)
        everything |= {(str(case), column): call for column, call in found.items()}
    results.add(*measure(everything, args.rounds, args.device))
    print(harness.table(COLUMNS, results["rows"]))


if __name__ == "__main__":
    main()
