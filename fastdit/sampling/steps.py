"""One step of a sampling loop, and the ways to run it: eagerly, or compiled.

Both run `advance`; `graphs` holds the third way, which replays `advance_in_place`.
"""

from __future__ import annotations

import functools
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdit import functional
from fastdit.sampling.predictors import Constants, Predictor, WeightsPredictor
from fastdit.update import Guidance


class State(NamedTuple):
    """What a step hands to the next."""

    x: Tensor  # [B, P, C] tokens or [B, C, H, W] images
    x0: Tensor  # the predicted x0 of the step before, like x
    step: Tensor  # [] int64 on the device: how many steps have been taken


class Inputs(NamedTuple):
    """A step's other inputs; the last three are the same at every step of a loop."""

    conditioning: Tensor  # B rows, or 2B with the null label's last
    noise: Tensor | None  # like x, if it was made before the step
    seeds: Tensor | None  # [B, 2] int64, if the step makes the noise
    coefficients: Tensor  # [S, 10], of which the step takes its row
    constants: Constants = ()  # what else the predictor takes, such as the encoded text


def advance(predictor: Predictor, state: State, inputs: Inputs, guidance: Guidance | None) -> State:
    """Take one step of the loop: the model, then guidance, the solver and its noise in one op."""
    x, x0 = _update(predictor, state, inputs, guidance, out=None)
    return State(x, x0, state.step + 1)


def advance_in_place(
    predictor: Predictor, state: State, inputs: Inputs, guidance: Guidance | None
) -> None:
    """Take the step in place: the next state overwrites the given one, which must be contiguous."""
    _update(predictor, state, inputs, guidance, out=(state.x, state.x0))
    state.step.add_(1)


def _update(
    predictor: Predictor,
    state: State,
    inputs: Inputs,
    guidance: Guidance | None,
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    return functional.sampler_update(
        state.x,
        predictor(state.x, inputs.conditioning, *inputs.constants),
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
        """Return where the next step's conditioning should be written to save a copy, or None."""
        return None


class Eager(Step):
    """`advance` as it is."""

    def __call__(
        self, predictor: Any, state: State, inputs: Inputs, guidance: Guidance | None
    ) -> State:
        return advance(predictor, state, inputs, guidance)


class Compiled(Step):
    """`advance` as one graph of torch.compile.

    Batches of two and more share a graph with a dynamic batch, for any number of steps. A single
    image has a graph of its own, since PyTorch always specialises on a size of one, and so has each
    size of a text model's images and each padded length of its texts. The first guidance scale
    compiles a graph, and the second one a graph that serves all scales.
    """

    def __call__(
        self,
        predictor: WeightsPredictor[Any],
        state: State,
        inputs: Inputs,
        guidance: Guidance | None,
    ) -> State:
        B, S = len(state.x), len(inputs.coefficients)
        if S > 1:
            torch._dynamo.mark_dynamic(inputs.coefficients, 0)
        if B > 1:
            for t in (state.x, state.x0, *inputs[:3], *inputs.constants):
                if t is not None and len(t) > 1:  # positions have one row for all images
                    torch._dynamo.mark_dynamic(t, 0)
        return _compiled_advance(
            state.x.device.type,
            predictor.cfg,
            predictor.dtype,
            (B > 1, S > 1, inputs.noise is None, guidance and (guidance.channels,)),
            # The size of the image, and the padded length of a text.
            (state.x.shape[1:], *(t is not None and t.shape[1:] for t in inputs.constants)),
            # PyTorch guards a graph with these too, and a program may change them between calls.
            (
                torch.get_num_threads(),
                torch.are_deterministic_algorithms_enabled(),
                torch.get_default_dtype(),
            ),
        )(predictor, state, inputs, guidance)


@functools.lru_cache(maxsize=64)
def _compiled_advance(device: str, *kind: Hashable) -> Callable[..., State]:
    """Return the compiled step that all samplers of one kind share.

    PyTorch counts recompilations by code object and stops after eight, so each kind has its own.
    """
    own = types.FunctionType(advance.__code__.replace(), advance.__globals__)
    # By default Python calls a graph's kernels and checks strides that the guards have checked,
    # which takes a fifth of a step for one image of the toy on a CPU.
    options: dict[str, Any] = {"size_asserts": False, "cpp_wrapper": device == "cpu"}
    return torch.compile(own, fullgraph=True, options=options)
