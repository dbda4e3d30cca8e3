"""A launch with all that can be known of it before its arguments: made once, called often.

`kernel[grid](...)` binds and specialises some twenty arguments at every call, which takes longer
than all else between an op and the driver. A `PreparedLaunch` goes that way once for each kind of
arguments, and from then on hands the compiled kernel its arguments itself, as the launchers that
PyTorch's Inductor generates do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver, jit
from triton.runtime.jit import JITFunction

# Launches that a launcher keeps: so many shapes in turn are prepared once each.
PREPARED = 1024

# Kinds of arguments that one launch keeps: a caller may give it new strides at every call.
_KINDS = 64


class _Compiled(NamedTuple):
    run: Any
    function: Any
    metadata: Any
    device: int


class PreparedLaunch:
    """A kernel on a grid, with its constants and the compiler's options.

    Its arguments are the kernel's tensors, then its numbers, then the constants. Two calls are of
    one kind where Triton is bound to specialise them alike: the same integers, and for each tensor
    the same dtype, the same device and an address that is a multiple of 16 or is none. (On AMD it
    also asks whether a tensor's storage is below 2 GB: of what a launch reads, integers and grid
    say that already.)
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], **constants: Any) -> None:
        """constants holds the kernel's constexprs by name, and options such as num_warps."""
        self._kernel, self._grid, self._constants = kernel, grid, constants
        self._dimensions = (*grid, 1, 1)[:3]
        names = [name for name in kernel.arg_names if name in constants]
        assert kernel.arg_names[len(kernel.arg_names) - len(names) :] == names, "constants are last"
        self._in_order = tuple(constants[name] for name in names)
        self._compiled: dict[tuple[Any, ...], _Compiled] = {}

    def __call__(self, tensors: Sequence[Tensor | None], *numbers: int | float) -> None:
        """Launch on the current device and its current stream; a number's type never changes."""
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
        if compiled is None or self._is_watched():
            self._through_triton(key, tensors, numbers)
            return
        run, function, metadata, device = compiled
        if driver.active.get_current_device() != device:
            self._through_triton(key, tensors, numbers)
            return
        stream = driver.active.get_current_stream(device)
        # The three that are None are for the tools that `_is_watched` asks after.
        run(
            *self._dimensions,
            *(stream, function, metadata, None, None, None),
            *pointers,
            *numbers,
            *self._in_order,
        )

    def _through_triton(
        self, key: tuple[Any, ...], tensors: Sequence[Tensor | None], numbers: Sequence[int | float]
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
        """Whether a tool must see the launch itself, or has the kernel compiled in another way."""
        runtime = triton.knobs.runtime
        return bool(
            # Where a tool has put its own function in Triton's place, launches go to the tool.
            getattr(JITFunction.run, "__globals__", None) is not vars(jit)
            or self._kernel.pre_run_hooks
            or runtime.debug
            or runtime.add_stages_inspection_hook
            or _calls(runtime.launch_enter_hook)
            or _calls(runtime.launch_exit_hook)
            or triton.knobs.compilation.instrumentation_mode
        )


def _calls(hook: Any) -> Any:
    """What a hook of Triton's calls: a chain's list, or where it is a function itself."""
    return getattr(hook, "calls", hook)
