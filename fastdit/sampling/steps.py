"""How the steps of a sampling loop run: eagerly, compiled, or as a replayed CUDA graph.

All three run the same step; they differ in where it runs, and a graph takes it in place.
"""

from __future__ import annotations

import functools
import threading
import types
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit import functional
from fastdit.sampling.predictors import AnyPredictor, HoistedDiT
from fastdit.solvers import Guidance

MAX_GRAPHS = 16


class State(NamedTuple):
    """What a step hands to the next."""

    x: Tensor  # [B, P, C] tokens or [B, C, H, W] images
    x0: Tensor  # the predicted x0 of the step before, like x
    step: Tensor  # [] int64 on the device: how many steps have been taken


class Inputs(NamedTuple):
    """What a step is given besides; the last two are the same at every step of a loop."""

    conditioning: Tensor  # B rows, or 2B with the null label's last
    noise: Tensor | None  # like x, where it is not made in the step
    seeds: Tensor | None  # [B, 2] int64, where it is
    coefficients: Tensor  # [S, 10]


def advance(
    predictor: HoistedDiT | AnyPredictor, state: State, inputs: Inputs, guidance: Guidance | None
) -> State:
    """One step of the loop: the model, then guidance, the solver and its noise in one op."""
    x, x0 = _update(predictor, state, inputs, guidance, out=None)
    return State(x, x0, state.step + 1)


def advance_in_place(
    predictor: HoistedDiT, state: State, inputs: Inputs, guidance: Guidance | None
) -> None:
    """`advance`, with the next state in the place of the one given, which must be contiguous."""
    _update(predictor, state, inputs, guidance, out=(state.x, state.x0))
    state.step.add_(1)


def _update(
    predictor: HoistedDiT | AnyPredictor,
    state: State,
    inputs: Inputs,
    guidance: Guidance | None,
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    return functional.sampler_update(
        state.x,
        predictor(state.x, inputs.conditioning),
        inputs.coefficients,
        state.step,
        x0_prev=state.x0,
        seeds=inputs.seeds,
        noise=inputs.noise,
        guidance=guidance,
        out=out,
    )


class Step(ABC):
    """A way to run a step."""

    @abstractmethod
    def __call__(
        self, predictor: Any, state: State, inputs: Inputs, guidance: Guidance | None
    ) -> State:
        """Called as `advance`."""

    def conditioning_buffer(self, rows: int) -> Tensor | None:
        """Where to put the next step's conditioning of so many rows, to save a copy; or None."""
        return None


class Eager(Step):
    """`advance` as it is."""

    def __call__(
        self, predictor: Any, state: State, inputs: Inputs, guidance: Guidance | None
    ) -> State:
        return advance(predictor, state, inputs, guidance)


class Compiled(Step):
    """`advance` as one graph of torch.compile.

    Batches of two and more share a dynamic graph, whatever the number of steps; a single image
    has one of its own, since PyTorch always specialises on a size of one. The first guidance scale
    compiles a graph and the second one for all scales.
    """

    def __call__(
        self, predictor: HoistedDiT, state: State, inputs: Inputs, guidance: Guidance | None
    ) -> State:
        B, S = len(state.x), len(inputs.coefficients)
        if S > 1:
            torch._dynamo.mark_dynamic(inputs.coefficients, 0)
        if B > 1:
            for t in (state.x, state.x0, inputs.conditioning, inputs.noise, inputs.seeds):
                if t is not None:
                    torch._dynamo.mark_dynamic(t, 0)
        return _compiled_advance(
            state.x.device.type,
            predictor.cfg,
            predictor.dtype,
            (B > 1, S > 1, inputs.noise is None, guidance and (guidance.channels,)),
            # What else PyTorch guards a graph with, and a program may change between two calls.
            (
                torch.get_num_threads(),
                torch.are_deterministic_algorithms_enabled(),
                torch.get_default_dtype(),
            ),
        )(predictor, state, inputs, guidance)


@functools.lru_cache(maxsize=64)
def _compiled_advance(device: str, *kind: Hashable) -> Callable[..., State]:
    """The compiled step that all samplers of one kind share.

    PyTorch counts recompilations by code object, and gives up at eight: each kind has its own.
    """
    own = types.FunctionType(advance.__code__.replace(), advance.__globals__)
    # By default Python calls a graph's kernels, and checks strides that the guards have checked:
    # for one image of the toy on a CPU, a fifth of a step.
    options: dict[str, Any] = {"size_asserts": False, "cpp_wrapper": device == "cpu"}
    return torch.compile(own, fullgraph=True, options=options)


class Graphed(Step):
    """`advance` captured in CUDA graphs: one launch a step, and no wait of host for device.

    There is a graph for each batch size, set of active rows (with or without null rows), way of
    making noise and float32 precision of matrix products; of more than `max_graphs` the one that
    was used longest ago is dropped. All take their memory from one pool: one runs at a time, and
    what a step leaves behind lies outside of it. Calls from several threads must take turns.
    """

    def __init__(self, max_graphs: int = MAX_GRAPHS) -> None:
        self._max_graphs = max_graphs
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __call__(
        self, predictor: HoistedDiT, state: State, inputs: Inputs, guidance: Guidance | None
    ) -> State:
        """Returns the graph's own tensors, which the next step overwrites."""
        given = (*state, *inputs)
        shapes = (None if t is None else (t.shape, t.dtype) for t in given)
        key = (guidance, torch.backends.cuda.matmul.fp32_precision, *shapes)
        with torch.cuda.device_of(state.x):
            if key not in self._graphs:
                self._make_room()
                self._graphs[key] = self._capture(predictor, state, inputs, guidance)
            self._graphs.move_to_end(key)
            return self._graphs[key].replay(state, inputs)

    def conditioning_buffer(self, rows: int) -> Tensor | None:
        """That of the graph which ran last, and probably runs next."""
        if not self._graphs:
            return None
        own = self._graphs[next(reversed(self._graphs))].conditioning
        return own if len(own) == rows else None

    def _make_room(self) -> None:
        if len(self._graphs) == self._max_graphs:
            warnings.warn(
                f"execution='graph': more than {self._max_graphs} kinds of batches; the graph used "
                "longest ago is dropped, and captured again if its kind comes back. Sample in "
                "fewer batch sizes",
                stacklevel=7,  # the caller of the sampler
            )
            self._graphs.popitem(last=False)

    def _capture(
        self, predictor: HoistedDiT, state: State, inputs: Inputs, guidance: Guidance | None
    ) -> _Captured:
        state, inputs = State(*map(_clone, state)), Inputs(*map(_clone, inputs))
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        if not self._graphs:  # a pool does not outlive its last graph
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with _CAPTURING, torch.cuda.stream(self._stream):
            advance(predictor, state, inputs, guidance)  # compiles kernels, which a capture may not
            # What cuBLAS keeps between calls is freed with any graph of its stream: a graph's
            # must lie in the pool, and nowhere else.
            torch._C._cuda_clearCublasWorkspaces()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                advance_in_place(predictor, state, inputs, guidance)
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.current_stream().wait_stream(self._stream)
        return _Captured(graph, state, inputs)


def _clone(t: Any) -> Any:
    return None if t is None else t.clone()


# Captures in two threads are legal, but what one of them frees can invalidate the other.
_CAPTURING = threading.Lock()


class _Captured:
    """A graph, and the tensors that it reads and writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, state: State, inputs: Inputs) -> None:
        self._graph, self._state, self._inputs = graph, state, inputs
        self._constant: tuple[Tensor | None, ...] = (None, None)

    @property
    def conditioning(self) -> Tensor:
        return self._inputs.conditioning

    def replay(self, state: State, inputs: Inputs) -> State:
        _load(self._state, state)
        _load(self._inputs[:2], inputs[:2])
        constant = (inputs.seeds, inputs.coefficients)
        if any(new is not old for new, old in zip(constant, self._constant, strict=True)):
            _load((self._inputs.seeds, self._inputs.coefficients), constant)
            self._constant = constant  # held, so that no later tensor can be taken for one of them
        self._graph.replay()
        return self._state


def _load(own: Sequence[Tensor | None], new: Sequence[Tensor | None]) -> None:
    for to, source in zip(own, new, strict=True):
        if to is not None and source is not None and to is not source:
            to.copy_(source)
