"""Which backend runs an op: what each needs, and what None stands for."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from fastdit.config import DiTConfig
from fastdit.errors import unknown_name
from fastdit.ops import definitions
from fastdit.packed import PackedDiT

BACKENDS = ("reference", "triton")  # those of every op
_BACKENDS_OR_NONE = (None, *BACKENDS)

# Below, the calling of an op outweighs what the C++ LayerNorms save; at 197,000 elements and more
# they are 1.6 to 2.4 times as fast forward, and 0.9 to 1.9 times backward (benchmarks/kernels.py on
# two CPUs).
_CPP_ELEMENTS = 100_000

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def trajectory_obstacle(
    backend: str, cfg: DiTConfig, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why "cpp" or "triton" takes no trajectory of a model, its weights in a dtype, or None."""
    if backend == "cpp" and device.type != "cpu":
        return f"expects tensors on a CPU, got {device}"
    if backend == "cpp" and dtype != torch.float32:
        return f"computes in float32, got {dtype}"
    reason = _transform_obstacle() if backend == "cpp" else _obstacle(device, dtype)
    reason = reason or definitions.trajectory_obstacle(backend, *sizes_of(cfg))
    if reason is None and backend == "triton" and device.type == "cuda":
        reason = _spills(cfg, torch.cuda.get_device_properties(device), dtype)
    return reason


def _spills(cfg: DiTConfig, properties: Any, dtype: torch.dtype) -> str | None:
    """Why the trajectory's kernel would not fit a chip's registers, or None; `kernels/gate.py`
    compiles what is left.
    """
    features = sizes_of(cfg)[0][1]
    if dtype == torch.float32 and cfg.hidden > 64:
        return f"takes a hidden size of 64 in float32, got {cfg.hidden}; use a 16-bit dtype"
    if cfg.n_tokens <= 16 or features <= 16:
        return None
    few = f"takes up to 16 features of a token where there are {cfg.n_tokens} tokens"
    if dtype == torch.float32:
        return f"{few} in float32, got {features}; use a 16-bit dtype"
    if torch.version.hip is not None or properties.major == 9:
        return None
    if properties.major == 10 and cfg.hidden <= 64:
        return None
    return f"{few} on {properties.name}, got {features}; use patches of fewer pixels"


@functools.cache
def has_cpp() -> bool:
    """Whether the C++ kernels are here or can be built; warns once where they cannot."""
    try:
        definitions.build_cpp()
    except RuntimeError as error:
        warnings.warn(f"fastdit runs without its C++ kernels: {error}", stacklevel=2)
        return False
    return True


def of_trajectory(backend: str | None, x: Tensor, packed: PackedDiT) -> str:
    known = (*BACKENDS, "cpp")
    if backend not in (None, *known):
        raise unknown_name("backend", str(backend), known)
    if backend == "reference" or (backend is None and x.dtype == torch.float64):
        return "reference"
    dtype = x.dtype if x.dtype == torch.float64 else packed.weights.dtype
    where = packed.cfg, x.device, dtype
    if backend is not None:
        reason = trajectory_obstacle(backend, *where)
        if reason:
            raise ValueError(f"backend: {backend!r} {reason}; use backend='reference'")
        return backend
    if trajectory_obstacle("triton", *where) is None:
        return "triton"
    return "cpp" if trajectory_obstacle("cpp", *where) is None and has_cpp() else "reference"


def of_layer_norm(backend: str | None, *tensors: Tensor) -> str:
    """The backend of a LayerNorm with its modulation, and of its backward."""
    takes = tensors[0].is_cpu and all(t.dtype == torch.float32 for t in tensors)
    if backend == "cpp" and not takes:
        raise ValueError("backend: 'cpp' expects float32 tensors on a CPU; use backend='reference'")
    prefers = (
        backend is None and takes and tensors[0].numel() >= _CPP_ELEMENTS and _cpp_is_default()
    )
    return _of_fused(backend, prefers, tensors)


def of_update(backend: str | None, *tensors: Tensor) -> str:
    """The backend of an update of a state, the first tensor."""
    if backend == "cpp" and not _takes_update(*tensors):
        raise ValueError("backend: 'cpp' expects a float32 state on a CPU; use backend='reference'")
    return _of_fused(backend, backend is None and updates_in_cpp(*tensors), tensors)


def _of_fused(backend: str | None, prefers_cpp: bool, tensors: Sequence[Tensor]) -> str:
    if backend == "cpp" and (reason := _transform_obstacle()) is not None:
        raise ValueError(f"backend: 'cpp' {reason}; use backend='reference'")
    if backend == "cpp" or prefers_cpp:
        return "cpp"
    if backend not in _BACKENDS_OR_NONE:
        raise unknown_name("backend", str(backend), (*BACKENDS, "cpp"))
    return "triton" if _runs_triton(backend, tensors) else "reference"


def of_noise(backend: str | None, seeds: Tensor) -> str:
    """The backend of noise by itself."""
    known = ("reference", "cpp")
    if backend not in (None, *known):
        raise unknown_name("backend", str(backend), known)
    on_cpu = seeds.device.type == "cpu"
    if backend == "cpp" and not on_cpu:
        raise ValueError(f"backend: 'cpp' expects tensors on a CPU, got {seeds.device}")
    if backend is not None:
        return backend
    return "cpp" if on_cpu and not torch.compiler.is_compiling() and has_cpp() else "reference"


def sizes_of(cfg: DiTConfig) -> tuple[list[int], list[float]]:
    """A config as the kernels' `Shape` has it."""
    patch = cfg.patch_size**2
    sizes = [cfg.n_tokens, patch * cfg.in_channels, patch * cfg.out_channels, cfg.in_channels]
    sizes += [cfg.hidden, cfg.n_layers, cfg.n_heads, int(cfg.gelu == "tanh")]
    return sizes, [cfg.ln_eps, cfg.mlp_ln_eps or cfg.ln_eps]


def makes_noise(*tensors: Tensor) -> bool:
    """Whether `sampler_update` makes the noise of seeds in its own pass over such tensors."""
    return default_backend(*tensors) == "triton" or updates_in_cpp(*tensors)


def gelu_rides(*tensors: Tensor) -> bool:
    """Whether a tanh GELU can ride in the product of such tensors: at inference on CUDA."""
    if torch.compiler.is_compiling() or _transform_obstacle() is not None:
        return False
    first = tensors[0]
    if first.device.type != "cuda" or torch.is_autocast_enabled("cuda"):
        return False
    if has_torch_function(tensors):  # such as quantised weights, which know a linear alone
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return first.numel() > 0 and all(t.dtype == first.dtype != torch.float64 for t in tensors)


def updates_in_cpp(*tensors: Tensor) -> bool:
    """Whether the C++ update is the default; it has no gradients."""
    if not _takes_update(*tensors):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return _cpp_is_default()


def _takes_update(state: Tensor, *others: Tensor) -> bool:
    if not state.is_cpu or state.dtype != torch.float32:
        return False
    return all(t.dtype != torch.float64 for t in others)


def _cpp_is_default() -> bool:
    """Not where a compiler looks on, which fuses plain PyTorch, nor where Triton's kernels are
    interpreted.
    """
    if torch.compiler.is_compiling() or _INTERPRET or _transform_obstacle() is not None:
        return False
    return has_cpp()


def default_backend(*tensors: Tensor) -> str:
    """The backend that None stands for on these tensors, in most ops."""
    return "triton" if _obstacle_of(tensors) is None else "reference"


def runs_triton(backend: str | None, *tensors: Tensor) -> bool:
    """Whether the Triton op runs; raises where it was named and cannot."""
    if backend not in _BACKENDS_OR_NONE:
        raise unknown_name("backend", str(backend), BACKENDS)
    return _runs_triton(backend, tensors)


def _runs_triton(backend: str | None, tensors: Sequence[Tensor]) -> bool:
    if backend == "reference":
        return False
    obstacle = _obstacle_of(tensors)
    if backend == "triton" and obstacle:
        raise ValueError(f"backend: 'triton' {obstacle}; use backend='reference'")
    return obstacle is None


def _obstacle_of(tensors: Sequence[Tensor]) -> str | None:
    for t in tensors:
        if t.dtype == torch.float64:
            return _obstacle(t.device, t.dtype)
    return _obstacle(tensors[0].device, torch.float32)


def _transform_obstacle() -> str | None:
    """torch.func and forward-mode derivatives know nothing of our ops: a jvp would pass them by
    without a word.
    """
    if torch.compiler.is_compiling():
        return None
    if forward_ad._current_level < 0 and peek_interpreter_stack() is None:
        return None
    return "knows neither torch.func's transforms nor forward-mode derivatives"


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot run there, or None."""
    if (reason := _transform_obstacle()) is not None:
        return reason
    if dtype == torch.float64:
        return "computes in float32, got float64"
    # A tracer warns of a function that remembers: it follows what is inside.
    return _on(device) if torch.compiler.is_compiling() else _remembered_on(device)


def _on(device: torch.device) -> str | None:
    """Why Triton runs nothing on a device, or None."""
    if device.type != "cuda" and not (device.type == "cpu" and _INTERPRET):
        return f"expects tensors on CUDA (or TRITON_INTERPRET=1 for the CPU), got {device}"
    if not _HAS_TRITON:
        return "needs the package triton, which is not installed"
    if device.type == "cuda" and torch.version.hip is None:
        properties = torch.cuda.get_device_properties(device.index or 0)
        if properties.major < 8:
            return f"needs Ampere or later, got {properties.name}"
    return None


_remembered_on = functools.cache(_on)
