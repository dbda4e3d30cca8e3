"""The solvers of sampling; each is a table of coefficients, written like its paper's algorithm.

`base` makes tables of a solver's rows. `diffusion` has the solvers of a `DiffusionScheduler`,
`flow` those of a `FlowMatching`, and `shared` those of both. To add one, subclass `Solver` or
`FlowSolver` as a frozen dataclass, write its rows, and name it in `SOLVERS`.
"""

from fastdit.solvers.base import (
    SOLVERS,
    FlowSolver,
    Nodes,
    Ode,
    Solver,
    StepTable,
    default_solver,
)
from fastdit.solvers.diffusion import DDIM, DDPM
from fastdit.solvers.flow import DIFFUSIONS, LAST_STEPS, Dopri5, Euler, EulerMaruyama
from fastdit.solvers.shared import DPMSolverPP, Heun
from fastdit.update import Guidance as Guidance  # imported from here in release 0.1.0

SOLVERS.update(
    {
        "ddpm": DDPM(),
        "ddim": DDIM(),
        "dpm++": DPMSolverPP(),
        "heun": Heun(),
        "euler": Euler(),
        "euler-maruyama": EulerMaruyama(),
        "dopri5": Dopri5(),
    }
)

__all__ = [
    "DDIM",
    "DDPM",
    "DIFFUSIONS",
    "LAST_STEPS",
    "SOLVERS",
    "DPMSolverPP",
    "Dopri5",
    "Euler",
    "EulerMaruyama",
    "FlowSolver",
    "Heun",
    "Nodes",
    "Ode",
    "Solver",
    "StepTable",
    "default_solver",
]
