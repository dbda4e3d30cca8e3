"""The options of `fastdit sample` that say which solver, and which times guidance has."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Annotated, Any

from fastdit.cli.common import option
from fastdit.errors import unknown_name
from fastdit.flow import Process
from fastdit.solvers import SOLVERS, FlowSolver, Solver, default_solver

Name = Annotated[
    str | None,
    option(f"{', '.join(SOLVERS)}.  [ddpm of a diffusion, dpm++ of a PixArt, euler of a flow]"),
]
Steps = Annotated[
    int | None,
    option(
        "Sampling steps.  [of a PixArt 20, of an MMDiT 28; else every step of the training; of a "
        "flow 250, dpm++ and heun 50]"
    ),
]
Clip = Annotated[
    float | None,
    option("Clip the predicted image to [-clip, clip]; 1 for pixels.  [no clipping]"),
]
Shift = Annotated[
    float | None,
    option(
        "Of a flow: below 1 takes more of the steps near the noise.  [1, no shift; of an MMDiT "
        "that of its pipeline, 1/3 of Stable Diffusion 3]"
    ),
]
SolverOptions = Annotated[
    str | None,
    option(
        "Other options of the solver's class, such as eta=1 for ddim, rtol=1e-5 for dopri5, or "
        "diffusion=linear,last_step=mean for euler-maruyama, which has norm and last_size too."
    ),
]
Interval = Annotated[
    str | None,
    option(
        "LOW,HIGH: guide only these times of a flow, such as 0.125,1, or these timesteps of a "
        "diffusion, of which HIGH is the first that is not guided.  [all]"
    ),
]


def parse_solver(
    name: str | None, process: Process, clip: float | None, shift: float | None, options: str | None
) -> tuple[str, Solver]:
    """Return a solver's name, the process's default where there is none, and the solver."""
    if name is None:
        name = default_solver(process)
    if name not in SOLVERS:
        raise unknown_name("--solver", name, SOLVERS)
    solver = SOLVERS[name]
    if shift is not None:
        if not isinstance(solver, FlowSolver):
            takes = [n for n, s in SOLVERS.items() if isinstance(s, FlowSolver)]
            raise ValueError(f"--shift: expected one of the solvers {', '.join(takes)}; got {name}")
        solver = replace(solver, shift=shift)
    chosen = _parse_options(solver, options) if options is not None else {}
    try:
        solver = replace(solver, **chosen)
    except ValueError as error:
        raise ValueError(f"--solver-options: {error}") from error
    return name, replace(solver, clip=clip)


def _parse_options(solver: Solver, text: str) -> dict[str, Any]:
    known = [f.name for f in fields(solver) if f.name not in ("clip", "shift")]
    parsed: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            raise ValueError(f"--solver-options: expected name=value, got {part!r}")
        if not known:
            kind = type(solver).__name__
            raise ValueError(f"--solver-options: expected none, since {kind} has none, got {text}")
        if name not in known:
            raise unknown_name("--solver-options", name, known)
        parsed[name] = None if value.lower() == "none" else _number_or_text(value)
    return parsed


def _number_or_text(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def parse_interval(text: str | None) -> tuple[float, float] | None:
    """Return the two numbers of a text such as "0.125,1": integers where both are."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    try:
        kind = int if all(part.isdecimal() for part in parts) else float
        low, high = map(kind, parts)
    except ValueError as error:
        raise ValueError(
            f"--guidance-interval: expected LOW,HIGH, such as 0.125,1, got {text!r}"
        ) from error
    return low, high
