"""What one call of an op costs in Python: from the call to the driver's launch, and back.

Small inputs, so that the device is never what is waited for; on a GPU the calls are not
synchronised. The columns are the public op without gradients, the registered op below it, the
kernels' launcher below that, the public op with gradients, and the backward. Rounds are
interleaved; a figure is the median over rounds of the mean of a round's calls, in time of this
process on its CPU, so that what else the machine does counts less. These are figures of the CPU
that Python runs on, and of nothing else.

    python benchmarks/host_time.py --json benchmarks/results/host.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _harness import machine, print_machine, table, write_json
from _ops import ATTENTION, GATED_LN, PLAIN_LN, UPDATE, Case, inputs, outputs

from fastdit import functional, ops

# The toy's, then DiT-XL/2's, each for four images.
CASES = (
    *(Case(op, shape) for op in (PLAIN_LN, GATED_LN) for shape in ((4, 16, 64), (4, 256, 1152))),
    *(Case(ATTENTION, shape) for shape in ((4, 16, 4, 16), (4, 256, 16, 72))),
    *(Case(UPDATE, shape, "mixed") for shape in ((4, 4, 16, 16), (4, 4, 32, 32))),
)
COLUMNS = {"call": "", **dict.fromkeys(("public", "op", "launcher", "grad", "backward"), ".1f")}

WITH_GRADIENTS = ("grad", "backward")
REPEATS = 100

Call = Callable[[], Any]
Calls = dict[tuple[str, str], Call]  # by row and column


def calls(case: Case, device: torch.device) -> dict[str, Call]:
    """A case's ways down to the launch, by column."""
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

    op = getattr(ops, case.op)
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
    gated = (rest[0], rest[1]) if case.op == GATED_LN else ()
    return {
        "op": lambda: op(*tensors, eps),
        "launcher": lambda: adaln.layer_norm_modulate_fwd(x, *rest[-2:], eps, *gated),
    }


def floor(device: torch.device) -> Calls:
    """What no op of ours can be below: one of PyTorch's, and an allocation."""
    x = torch.zeros(4, 16, 64, device=device)
    return {
        ("floor add", "public"): lambda: torch.add(x, x),
        ("floor empty_like", "public"): lambda: torch.empty_like(x),
    }


def _mean_us(call: Call, with_gradients: bool, device: torch.device) -> float:
    _synchronize(device)
    with torch.set_grad_enabled(with_gradients):
        start = time.process_time()
        for _ in range(REPEATS):
            call()
        us = (time.process_time() - start) / REPEATS * 1e6
    _synchronize(device)
    return us


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(everything: Calls, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows of median microseconds a call, all calls taking turns in each round."""
    taken: dict[tuple[str, str], list[float]] = {at: [] for at in everything}
    for number in range(rounds + 1):
        for at, call in everything.items():
            us = _mean_us(call, at[1] in WITH_GRADIENTS, device)
            if number:  # the first round compiles
                taken[at].append(us)
    rows: dict[str, dict[str, Any]] = {}
    for (name, column), values in taken.items():
        rows.setdefault(name, {"call": name})[column] = statistics.median(values)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    facts = machine(device)
    print_machine(facts)
    print("microseconds of Python a call, on this CPU; nothing here is a device's speed")
    everything = floor(device)
    for case in CASES:
        everything |= {(str(case), column): call for column, call in calls(case, device).items()}
    rows = measure(everything, arguments.rounds, device)
    print(table(COLUMNS, rows))
    if arguments.json:
        write_json(arguments.json, facts, vars(arguments), rows=rows)


if __name__ == "__main__":
    main()
