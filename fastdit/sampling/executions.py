"""The ways to run a sampling loop: what each needs, when "auto" picks it, and how it is built.

To add one, write its loop or its step, and give it an entry in `EXECUTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from fastdit.config import DiTConfig
from fastdit.model import config_of, unwrap
from fastdit.ops import dispatch
from fastdit.sampling.adaptive import AdaptiveLoop
from fastdit.sampling.graphs import Graphed
from fastdit.sampling.loop import Loop, Plan, StepLoop
from fastdit.sampling.predictors import (
    DiTPredictor,
    ImageLayout,
    ModelPredictor,
    Predictor,
    TokenLayout,
    is_standard_dit,
    is_unmodified_dit,
)
from fastdit.sampling.steps import Compiled, Eager, Step
from fastdit.sampling.text import TextPredictor, is_text_model
from fastdit.sampling.trajectory import TrajectoryLoop
from fastdit.text_config import TextConfig


class Subject(NamedTuple):
    """A model to sample."""

    model: nn.Module
    device: torch.device  # the model's
    dtype: torch.dtype  # of its forward
    adaptive: bool = False  # whether the solver chooses its own steps


class Execution(NamedTuple):
    """A way to run a sampling loop.

    Attributes:
        obstacle: returns None, or why a subject cannot be sampled so, as a phrase that follows the
            execution's name.
        suits: returns whether "auto" picks it for a subject, unless there is an obstacle.
        build: makes the loop.
    """

    obstacle: Callable[[Subject], str | None]
    suits: Callable[[Subject], bool]
    build: Callable[[Subject, Plan], Loop]


def obstacle(name: str, subject: Subject) -> str | None:
    """Return why an execution cannot sample a subject, worded to follow its name, or None."""
    return EXECUTIONS[name].obstacle(subject)


def automatic(subject: Subject) -> str:
    """Return what "auto" stands for: the first entry of `EXECUTIONS` that suits and can run."""
    for name, execution in EXECUTIONS.items():
        if execution.suits(subject) and execution.obstacle(subject) is None:
            return name
    raise AssertionError("eager execution runs any model")


def describe_automatic(cfg: DiTConfig | TextConfig) -> str:
    """Say in words what "auto" is for a model of a config."""
    if not isinstance(cfg, DiTConfig):
        return "'graph' on CUDA, 'eager' on a CPU"
    on_cpu = (
        "on a CPU 'trajectory' in float32, and in bfloat16 with AVX512-BF16 but without AMX, "
        "'eager' in other dtypes"
    )
    if cfg.hidden > _PLAIN_HIDDEN:
        on_cpu += " or without AVX2"
    if dispatch.obstacle("trajectory", "cpp", cfg, torch.device("cpu"), torch.float32):
        on_cpu = "'eager' on a CPU"
    on_cuda = "'graph' on CUDA"
    if chips := sorted({win.arch for win in WINS if _covers(win, cfg)}):
        on_cuda += f", but 'trajectory' in 16 bits on {' and '.join(chips)}"
    return f"{on_cuda}, {on_cpu}"


# On CPUs other than x86, and on those without AVX2, the C++ has only the compiler's vectors of four
# floats. There wider models, whose time is that of their products, are left to PyTorch.
_PLAIN_HIDDEN = 512


# The kernel in Triton takes the block of the published DiT alone, which has these as the toy does.
_TOY = DiTConfig()
_BLOCK_OPTIONS = "norm modulation_shift qk_norm rope mlp patch_bottleneck context_tokens".split()


class Win(NamedTuple):
    """Models whose trajectory in Triton was measured to be faster than their graph."""

    arch: str  # of the GPU, such as "sm_90"
    tokens: int
    hidden: int
    layers: int  # at most


# For bfloat16 and float16 only. An entry comes with the JSON of `benchmarks/sample_throughput.py
# --dtype bfloat16 --way "fastdit graph" "fastdit trajectory"`, and the trajectory must have won at
# every batch from one image to several a multiprocessor: "auto" does not look at the batch, so that
# an image's bits do not depend on it. Empty, since nothing has been measured on a GPU.
WINS: tuple[Win, ...] = ()


def _covers(win: Win, cfg: DiTConfig) -> bool:
    same = (win.tokens, win.hidden) == (cfg.n_tokens, cfg.hidden)
    published = all(getattr(cfg, name) == getattr(_TOY, name) for name in _BLOCK_OPTIONS)
    return same and published and cfg.n_layers <= win.layers


def _arch(device: torch.device) -> str:
    """The name that `fastdit.kernels.common.arch` gives a GPU, without importing Triton."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _needs_plan(subject: Subject) -> str | None:
    if subject.adaptive:
        return "takes steps that are planned ahead, which 'dopri5' does not"
    return None


def _needs_dit(subject: Subject) -> str | None:
    reason = _needs_plan(subject)
    if reason is not None or is_standard_dit(subject.model):
        return reason
    name = type(unwrap(subject.model)).__name__
    return f"needs a fastdit.DiT whose forward is its own, without hooks, got {name}"


def _needs_own_model(subject: Subject) -> str | None:
    return _needs_plan(subject) if is_text_model(subject.model) else _needs_dit(subject)


def _needs_cuda(subject: Subject) -> str | None:
    reason = _needs_own_model(subject)
    if reason is None and subject.device.type != "cuda":
        reason = f"needs a model on CUDA, got one on {subject.device}"
    return reason


def _needs_plain_weights(subject: Subject) -> str | None:
    reason = _needs_dit(subject)
    model, device, dtype, _ = subject
    if reason is not None or not is_standard_dit(model):
        return reason
    backend = "cpp" if device.type == "cpu" else "triton"
    reason = dispatch.obstacle("trajectory", backend, model.cfg, device, dtype)
    if reason is None and not is_unmodified_dit(model):
        reason = "reads a fastdit.DiT's weights only, got one with hooks or exchanged modules"
    return reason


def _trajectory_suits(subject: Subject) -> bool:
    """On a CPU wherever its products are fast; on CUDA where it was measured to win.

    On a CPU it is faster than compiled steps for every model, at every batch
    (benchmarks/crossover.py and sample_throughput.py on two cores with AVX-512).
    """
    model, device, dtype, _ = subject
    if not is_standard_dit(model):
        return False
    if device.type == "cpu":
        if dtype == torch.bfloat16 and torch.cpu.get_capabilities().get("amx_tile"):
            return False  # PyTorch's products use AMX's tiles, ours do not
        if not dispatch.has_cpp():
            return False
        return model.cfg.hidden <= _PLAIN_HIDDEN or dispatch.has_fast_products()
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    arch = _arch(device)
    return any(win.arch == arch and _covers(win, model.cfg) for win in WINS)


def _stepwise(step: Callable[[], Step], copies: bool) -> Callable[[Subject, Plan], Loop]:
    """Return a `build` for loops of single steps; with `copies` the model is copied first."""

    def build(subject: Subject, plan: Plan) -> Loop:
        predictor = _predictor(subject, plan, copies)
        return StepLoop(predictor, subject.device, subject.dtype, plan, step())

    return build


def _predictor(subject: Subject, plan: Plan, copies: bool) -> Predictor:
    model, device, dtype, _ = subject
    if is_standard_dit(model):
        return DiTPredictor(model, dtype, copies)
    if is_text_model(model):
        return TextPredictor(model, dtype, copies, plan.sample_shape)
    cfg = config_of(unwrap(model))
    layout = (
        TokenLayout(plan.sample_shape, cfg.patch_size) if cfg else ImageLayout(plan.sample_shape)
    )
    return ModelPredictor(model, device, dtype, layout)


def _eager(subject: Subject, plan: Plan) -> Loop:
    if not subject.adaptive:
        return _stepwise(Eager, copies=False)(subject, plan)
    predictor = _predictor(subject, plan, copies=False)
    return AdaptiveLoop(predictor, subject.device, subject.dtype, plan)


def _whole_loop(subject: Subject, plan: Plan) -> Loop:
    model, device, dtype, _ = subject
    assert is_standard_dit(model)
    return TrajectoryLoop(DiTPredictor(model, dtype, copies=False), device, dtype, plan)


# "auto" asks them in this order, and never picks "compile", which takes longer than many runs.
EXECUTIONS: dict[str, Execution] = {
    "trajectory": Execution(_needs_plain_weights, _trajectory_suits, _whole_loop),
    "graph": Execution(
        _needs_cuda, lambda subject: subject.device.type == "cuda", _stepwise(Graphed, copies=True)
    ),
    "compile": Execution(_needs_own_model, lambda subject: False, _stepwise(Compiled, copies=True)),
    "eager": Execution(lambda subject: None, lambda subject: True, _eager),
}
