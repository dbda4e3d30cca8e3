"""Kernel launches that are prepared once per shape and called often.

`kernel[grid](...)` binds and specialises some twenty arguments at every call, which takes longer
than everything else between an op and the driver. A `PreparedLaunch` does this once for each kind
of arguments. From then on it calls the compiled kernel itself, as the launchers that PyTorch's
Inductor generates do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver, jit
from triton.runtime.jit import JITFunction

# How many prepared launches, one per shape, a launcher keeps.
PREPARED = 1024

# How many kinds of arguments one launch keeps. The number is bounded because a caller may pass new
# strides at every call.
_KINDS = 64


class _Compiled(NamedTuple):
    run: Any
    function: Any
    metadata: Any
    device: int


class PreparedLaunch:
    """A kernel on a grid, with its constants and the compiler's options.

    The kernel's arguments are tensors, then numbers, then the constants. Two calls are of one kind
    if Triton must specialise them alike: they have the same integers, and each tensor has the same
    dtype, the same device, and an address that is a multiple of 16 in both calls or in neither.
    (On AMD Triton also asks whether a tensor's storage is below 2 GB, but the integers and the grid
    already determine that for what a launch reads.)
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], **constants: Any) -> None:
        """Constants are the kernel's constexprs by name, and options such as num_warps."""
        self._kernel, self._grid, self._constants = kernel, grid, constants
        self._dimensions = (*grid, 1, 1)[:3]
        names = [name for name in kernel.arg_names if name in constants]
        assert kernel.arg_names[len(kernel.arg_names) - len(names) :] == names, "constants are last"
        self._in_order = tuple(constants[name] for name in names)
        self._compiled: dict[tuple[Any, ...], _Compiled] = {}

    def __call__(self, tensors: Sequence[Tensor | None], *numbers: int | float | None) -> None:
        """Launch on the current device and stream; a number must have the same type every time.

        A number may be None where the constants say that the kernel does not read it.
        """
        pointers: list[int | None] = []
        kind: list[Any] = [n for n in numbers if type(n) is int]
        for t in tensors:
            if t is None:
                pointers.append(None)
                kind.append(None)
            else:
                pointer = t.data_ptr()
                pointers.append(pointer)
                kind += t.dtype, t.get_device(), not pointer & 15
        key = tuple(kind)
        compiled = self._compiled.get(key)
        if (
            compiled is None
            or self._is_watched()
            or driver.active.get_current_device() != compiled.device
        ):
            self._through_triton(key, tensors, numbers)
            return
        run, function, metadata, device = compiled
        stream = driver.active.get_current_stream(device)
        grid, constants = self._dimensions, self._in_order
        # The arguments that are None are for the tools that `_is_watched` looks for.
        run(*grid, stream, function, metadata, None, None, None, *pointers, *numbers, *constants)

    def _through_triton(
        self,
        key: tuple[Any, ...],
        tensors: Sequence[Tensor | None],
        numbers: Sequence[int | float | None],
    ) -> None:
        kernel = self._kernel[self._grid](*tensors, *numbers, **self._constants)
        # Nothing is compiled where kernels are interpreted, or launches recorded.
        if not isinstance(kernel, CompiledKernel) or self._is_watched():
            return
        if len(self._compiled) >= _KINDS:
            self._compiled.clear()
        device = driver.active.get_current_device()
        self._compiled[key] = _Compiled(kernel.run, kernel.function, kernel.packed_metadata, device)

    def _is_watched(self) -> bool:
        """Return whether a tool must see the launch, or has the kernel compiled in another way."""
        runtime = triton.knobs.runtime
        return bool(
            # A tool may have replaced Triton's function by its own, which must get the launch.
            getattr(JITFunction.run, "__globals__", None) is not vars(jit)
            or self._kernel.pre_run_hooks
            or runtime.debug
            or runtime.add_stages_inspection_hook
            or _calls(runtime.launch_enter_hook)
            or _calls(runtime.launch_exit_hook)
            or triton.knobs.compilation.instrumentation_mode
        )


def _calls(hook: Any) -> Any:
    """Return what a hook of Triton calls: the list of a chain, or the hook if it is a function."""
    return getattr(hook, "calls", hook)
