"""The step of a sampling loop as a replayed CUDA graph."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdit.errors import warn
from fastdit.sampling.predictors import Constants, Predictor
from fastdit.sampling.steps import Inputs, State, Step, advance, advance_in_place
from fastdit.update import Guidance

MAX_GRAPHS = 16


class Graphed(Step):
    """`advance_in_place` captured in CUDA graphs: one launch a step, and the host never waits.

    There is a graph for each batch size, with and without null rows, for each padded length of a
    text, for each way of making noise and each float32 precision of matrix products. When there are
    more than MAX_GRAPHS, the one that was used longest ago is dropped. All graphs take their memory
    from one pool, since only one runs at a time and what a step hands on lies outside the pool.
    Calls from several threads must take turns.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __call__(
        self, predictor: Predictor, state: State, inputs: Inputs, guidance: Guidance | None
    ) -> State:
        """Run the step and return the graph's own tensors, which the next step overwrites."""
        given = (*state, *inputs[:-1], *inputs.constants)
        shapes = (None if t is None else (t.shape, t.dtype) for t in given)
        key = (guidance, torch.backends.cuda.matmul.fp32_precision, *shapes)
        with torch.cuda.device_of(state.x):
            if key not in self._graphs:
                self._make_room()
                self._graphs[key] = self._capture(predictor, state, inputs, guidance)
            self._graphs.move_to_end(key)
            return self._graphs[key].replay(state, inputs)

    def conditioning_buffer(self, rows: int) -> Tensor | None:
        """Return the buffer of the graph that ran last, which will probably run next."""
        if not self._graphs:
            return None
        own = self._graphs[next(reversed(self._graphs))].conditioning
        return own if len(own) == rows else None

    def _make_room(self) -> None:
        if len(self._graphs) == MAX_GRAPHS:
            warn(
                f"execution='graph': more than {MAX_GRAPHS} kinds of batches; the graph used "
                "longest ago is dropped, and captured again if its kind comes back. Sample in "
                "fewer batch sizes"
            )
            self._graphs.popitem(last=False)

    def _capture(
        self, predictor: Predictor, state: State, inputs: Inputs, guidance: Guidance | None
    ) -> _Captured:
        state, inputs = own_tensors(state, inputs)
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        if not self._graphs:  # a pool does not outlive its last graph
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with _CAPTURING, torch.cuda.stream(self._stream):
            advance(predictor, state, inputs, guidance)  # compiles kernels, which a capture cannot
            # cuBLAS keeps workspaces between calls, and frees them with any graph of their stream:
            # a graph's workspace must lie in the pool and nowhere else.
            torch._C._cuda_clearCublasWorkspaces()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                advance_in_place(predictor, state, inputs, guidance)
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.current_stream().wait_stream(self._stream)
        return _Captured(graph, state, inputs)


def own_tensors(state: State, inputs: Inputs) -> tuple[State, Inputs]:
    """Return copies of a step's tensors for a graph to read and write."""

    def clone(t: Any) -> Any:
        return None if t is None else t.clone()

    constants = tuple(map(clone, inputs.constants))
    own = Inputs(*map(clone, inputs[:-1]))._replace(constants=constants)
    return State(*map(clone, state)), own


# Captures in two threads are legal, but what one of them frees can invalidate the other.
_CAPTURING = threading.Lock()


class _Captured:
    """A graph and the tensors that it reads and writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, state: State, inputs: Inputs) -> None:
        self._graph, self._state, self._inputs = graph, state, inputs
        # What the constants were loaded from. A text is large, and is not kept for this.
        self._loaded: list[weakref.ref[Tensor] | None] = []

    @property
    def conditioning(self) -> Tensor:
        return self._inputs.conditioning

    def replay(self, state: State, inputs: Inputs) -> State:
        _load(self._state, state)
        _load(self._inputs[:2], inputs[:2])
        constants = _constants(inputs)
        loaded = [None if old is None else old() for old in self._loaded]
        if not loaded or any(new is not old for new, old in zip(constants, loaded, strict=True)):
            _load(_constants(self._inputs), constants)
            self._loaded = [None if new is None else weakref.ref(new) for new in constants]
        self._graph.replay()
        return self._state


def _constants(inputs: Inputs) -> Constants:
    """Return what stays the same over a loop."""
    return (inputs.seeds, inputs.coefficients, *inputs.constants)


def _load(own: Sequence[Tensor | None], new: Sequence[Tensor | None]) -> None:
    for to, source in zip(own, new, strict=True):
        if to is not None and source is not None and to is not source:
            to.copy_(source)
