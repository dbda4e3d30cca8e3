"""How an op is registered with PyTorch, and called."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function
from torch.torch_version import TorchVersion

_INDUCTOR_FORMATS_UNKNOWN_OPS = TorchVersion(torch.__version__) < "2.13"


def call(op: Any, *args: Any) -> Any:
    """Run an op, without PyTorch's autograd, which is Python code here, where no gradient is."""
    if torch.compiler.is_compiling() or has_torch_function(args):
        return op(*args)
    if torch.is_grad_enabled() and any([isinstance(a, Tensor) and a.requires_grad for a in args]):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def implements(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that launches an op's kernel, for every device."""

    def register(launch: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.impl(name, "default", on_its_device(launch))
        return launch

    return register


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the device of the first argument that is not None, one of the first two."""

    @functools.wraps(launch)
    def launched(*args: Any) -> Any:
        first = args[1] if args[0] is None else args[0]
        # Triton launches on the current device.
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device_of(first):
            return launch(*args)

    return launched


def shapes(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the function by which compilers learn the shapes of an op's results."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fake)
        def introduced(*args: Any) -> Any:
            _introduce(name)
            return fake(*args)

        torch.library.register_fake(name, introduced)
        return fake

    return register


def _introduce(name: str) -> None:
    """Add an op to Inductor's fallbacks before Inductor meets it in a graph.

    Before PyTorch 2.13 Inductor writes out the arguments of an op that it does not know, for a log
    message. In a deep graph this text doubles with every layer: a sampling step of ten layers
    compiled for two minutes, and one of twelve did not end.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if not _INDUCTOR_FORMATS_UNKNOWN_OPS or lowering is None:
        return
    namespace, _, op_name = name.partition("::")
    op = getattr(getattr(torch.ops, namespace), op_name).default
    if op not in lowering.lowerings:  # as Inductor itself would add it
        exact = lowering.tag_to_layout_constraint(torch._C.Tag.needs_exact_strides)
        lowering.make_fallback(op, exact)


def no_derivative(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError(
        "fastdit's kernels have no second derivative, and sampler_update and trajectory no first; "
        "use backend='reference' for it"
    )
