"""How an op is registered with PyTorch, called, and given its kernels."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function
from torch.torch_version import TorchVersion

_INDUCTOR_FORMATS_UNKNOWN_OPS = TorchVersion(torch.__version__) < "2.13"


# Cached, since an import statement would take time at every launch.
@functools.cache
def kernels(of: str, backend: str) -> Any:
    """Import the module that has an op's launcher; `kernels.cpu` has all but norms in C++."""
    if backend == "cpp":
        of = "cpu.adaln" if of == "adaln" else "cpu"
    return importlib.import_module(f"fastdit.kernels.{of}")


def fresh(like: Tensor) -> Tensor:
    """Return what a launcher allocates: a contiguous tensor of like's shape and dtype."""
    return like.new_empty(like.shape)


def call(op: Any, *args: Any) -> Any:
    """Run an op; where no gradient is needed skip autograd, whose Python code costs time."""
    if torch.compiler.is_compiling() or has_torch_function(args):
        return op(*args)
    if torch.is_grad_enabled() and any([isinstance(a, Tensor) and a.requires_grad for a in args]):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def op(
    shapes: Callable[..., Any],
    *,
    saves: Callable[..., None] | None = None,
    gradients: Callable[..., Any] | None = None,
    mutates: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that registers a launcher as the op `fastdit::<name>` for every device.

    Args:
        shapes: called like the op; returns empty tensors like the op's results, for compilers.
        saves: `setup_context` of `torch.library.register_autograd`.
        gradients: `backward` of the same; None leaves an op without autograd.
        mutates: the arguments that the op writes to.

    Returns:
        The decorator, which returns the op. The op's schema is the launcher's signature.
    """

    def register(launch: Callable[..., Any]) -> Any:
        name = f"fastdit::{launch.__name__}"
        torch.library.define(name, torch.library.infer_schema(launch, mutates_args=mutates))
        torch.library.impl(name, "default", on_its_device(launch))
        made = getattr(torch.ops.fastdit, launch.__name__).default

        def introduced(*args: Any) -> Any:
            _introduce(made)
            return shapes(*args)

        torch.library.register_fake(name, introduced)
        if gradients is not None:
            torch.library.register_autograd(name, gradients, setup_context=saves)
        return made

    return register


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the device of the first argument, or of the second if the first is None."""

    @functools.wraps(launch)
    def launched(*args: Any) -> Any:
        first = args[1] if args[0] is None else args[0]
        # Triton launches on the current device.
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device_of(first):
            return launch(*args)

    return launched


def _introduce(op: Any) -> None:
    """Add an op to Inductor's fallbacks before Inductor meets it in a graph.

    Before PyTorch 2.13 Inductor writes out the arguments of an op that it does not know, for a log
    message. In a deep graph this text doubles with every layer: a sampling step of ten layers
    compiled for two minutes, and one of twelve did not end.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if not _INDUCTOR_FORMATS_UNKNOWN_OPS or lowering is None:
        return
    if op not in lowering.lowerings:  # as Inductor itself would add it
        exact = lowering.tag_to_layout_constraint(torch._C.Tag.needs_exact_strides)
        lowering.make_fallback(op, exact)


def no_derivative(ctx: Any, *gradients: Any) -> Any:
    """The `gradients` of an op that has none."""
    raise NotImplementedError(
        "fastdit's kernels have no second derivative, and sampler_update and trajectory no first; "
        "use backend='reference' for it"
    )
