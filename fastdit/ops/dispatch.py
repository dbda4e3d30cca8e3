"""Which backend runs an op: a table of when each can run, and when it is the default."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from fastdit.config import DiTConfig
from fastdit.errors import unknown_name, warn
from fastdit.ops import definitions
from fastdit.ops.trajectory import kernel_shape

# Below this size, calling an op costs more than the C++ norms save. At 197,000 elements and more
# LayerNorm is 1.6 to 2.4 times as fast forward, and 0.9 to 1.9 times backward
# (benchmarks/kernels.py on two CPUs); RMSNorm is 1.3 to 1.6 times as fast forward from 384 channels
# on, 0.8 to 1.0 times at 64, and 1.6 to 2.6 times backward (on one CPU).
_CPP_ELEMENTS = 100_000
# Below this number of multiply-adds, or of rows, a C++ linear is no faster than PyTorch's. Above
# it is 1.2 to 2.2 times as fast on an AMD EPYC of family 26 with AVX-512, with a GELU 1.4 to 2.6.
_CPP_PRODUCTS = 1 << 22
_CPP_ROWS = 8
_MAX_HEAD_DIM = 128

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


class Backend(NamedTuple):
    """A way to run an op besides plain PyTorch; both functions take the `given` of `choose`.

    Attributes:
        obstacle: returns None, or why the backend cannot run, as a phrase that follows its name.
        suits: returns whether it is a default, unless there is an obstacle.
    """

    obstacle: Callable[..., str | None]
    suits: Callable[..., bool]


def choose(op: str, backend: str | None, *given: Any) -> str:
    """Return the backend that runs an op.

    Args:
        op: a name in `TABLE`.
        backend: the one that the caller named, or None for the first in the table that suits and
            can run, and "reference" where there is none.
        given: what the op's entries look at: its tensors, the one like the output first; for
            any attention and "qk_norm_rope" qkv or q, the head dim, and then other tensors or
            None; for "trajectory" (config, device, dtype of the weights).

    Raises:
        ValueError: the named backend is unknown, or cannot run; the message says why.
    """
    backends = TABLE[op]
    if backend is None:
        for name, own in backends.items():
            if own.suits(*given) and own.obstacle(*given) is None:
                if name != "cpp" or has_cpp():
                    return name
        return "reference"
    if backend not in ("reference", *backends):
        raise unknown_name("backend", str(backend), ("reference", *backends))
    reason = None if backend == "reference" else backends[backend].obstacle(*given)
    if reason is not None:
        raise ValueError(f"backend: {backend!r} {reason}; use backend='reference'")
    return backend


def obstacle(op: str, backend: str, *given: Any) -> str | None:
    """Return why a backend other than "reference" cannot run an op, or None."""
    return TABLE[op][backend].obstacle(*given)


@functools.cache
def has_cpp() -> bool:
    """Return whether the C++ kernels are here or can be built; warn once where they cannot."""
    try:
        definitions.build_cpp()
    except RuntimeError as error:
        warn(f"fastdit runs without its C++ kernels: {error}")
        return False
    return True


def has_fast_products() -> bool:
    """Return whether the C++ kernels, which must be here, have code for this CPU's vectors."""
    return definitions.cpp_instruction_set() != "plain"


def fuses_gelu(*tensors: Tensor) -> bool:
    """Return whether PyTorch's product takes a tanh GELU in its epilogue: at inference on CUDA."""
    if torch.compiler.is_compiling() or _transforms() is not None:
        return False
    first = tensors[0]
    if first.device.type != "cuda" or torch.is_autocast_enabled("cuda"):
        return False
    if has_torch_function(tensors):  # such as quantised weights, which support plain linears only
        return False
    if _wants_gradients(*tensors):
        return False
    return first.numel() > 0 and all(t.dtype == first.dtype != torch.float64 for t in tensors)


def _always(*given: Any) -> bool:
    return True


def _cpp_is_default() -> bool:
    """Not while torch.compile traces, which fuses plain PyTorch, nor to an interpreted Triton."""
    return not (torch.compiler.is_compiling() or _INTERPRET)


def _wants_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _transforms() -> str | None:
    """Why no custom op may run here, or None: these would silently ignore its derivative."""
    if torch.compiler.is_compiling():
        return None
    if forward_ad._current_level < 0 and torch._C._functorch.peek_interpreter_stack() is None:
        return None
    return "supports neither torch.func's transforms nor forward-mode derivatives"


def _triton(first: Tensor, *others: Tensor | None) -> str | None:
    """Why Triton's kernels cannot run on these tensors, or None."""
    for t in (first, *others):
        if t is not None and t.dtype == torch.float64:
            return _triton_on(t.device, t.dtype)
    return _triton_on(first.device, torch.float32)


def _triton_on(device: torch.device, dtype: torch.dtype) -> str | None:
    if (reason := _transforms()) is not None:
        return reason
    if dtype == torch.float64:
        return "computes in float32, got float64"
    # Dynamo warns of cached functions, since it traces what is inside.
    return _unsupported(device) if torch.compiler.is_compiling() else _cached_unsupported(device)


def _unsupported(device: torch.device) -> str | None:
    """Why Triton's kernels run on no tensor of a device, or None."""
    if device.type != "cuda" and not (device.type == "cpu" and _INTERPRET):
        return f"expects tensors on CUDA (or TRITON_INTERPRET=1 for the CPU), got {device}"
    if not _HAS_TRITON:
        return "needs the package triton, which is not installed"
    if device.type == "cuda" and torch.version.hip is None:
        properties = torch.cuda.get_device_properties(device.index or 0)
        if properties.major < 8:
            return f"needs Ampere or later, got {properties.name}"
    return None


_cached_unsupported = functools.cache(_unsupported)


def _triton_attention(qkv: Tensor, head_dim: int) -> str | None:
    if head_dim > _MAX_HEAD_DIM:
        return f"takes head dims up to {_MAX_HEAD_DIM}, got {head_dim}"
    return _triton(qkv)


def _triton_text_attention(
    image: Tensor, head_dim: int, text: Tensor, *norms: Tensor | None
) -> str | None:
    return _triton_attention(image, head_dim) or _triton(text, *norms)


def _triton_qk_norm_rope(
    qkv: Tensor, head_dim: int, *weights_and_rope: Tensor | None
) -> str | None:
    rope = weights_and_rope[-1]
    if rope is not None and rope.requires_grad:
        return "has no gradient of the rotary table"
    if head_dim > _MAX_HEAD_DIM:
        return f"takes head dims up to {_MAX_HEAD_DIM}, got {head_dim}"
    return _triton(qkv, *weights_and_rope)


def _cpp_norm(*tensors: Tensor | None) -> str | None:
    for t in tensors:
        if t is not None and not (t.is_cpu and t.dtype == torch.float32):
            return f"expects float32 tensors on a CPU, got {t.dtype} on {t.device}"
    return _transforms()


def _cpp_norm_suits(x: Tensor, *others: Tensor | None) -> bool:
    # Sizes last: a tracer would guard its graph with what it compares.
    return _cpp_is_default() and x.numel() >= _CPP_ELEMENTS


def _cpp_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    tensors = [t for t in (x, weight, bias) if t is not None]
    for t in tensors:
        if not (t.is_cpu and t.dtype == torch.float32):
            return f"expects float32 tensors on a CPU, got {t.dtype} on {t.device}"
    if torch.is_autocast_enabled("cpu"):
        return "computes in float32, not in autocast's dtype"
    if _wants_gradients(*tensors):
        return "has no gradients; use it under torch.no_grad()"
    if has_torch_function(tensors):
        return "takes plain tensors, got a subclass"
    if x.shape[-1:] != weight.shape[1:]:
        return f"expects a weight [M, D] for x [..., D], got {[*weight.shape]} and {[*x.shape]}"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"expects a bias [M] beside a weight [M, D], got {[*bias.shape]}"
    return _transforms()


def _cpp_linear_suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not (_cpp_is_default() and x.is_cpu and weight.is_cpu) or _wants_gradients(x, weight):
        return False
    # Sizes after what a tracer must not see: it would guard its graph with what it compares.
    products = x.numel() * len(weight)
    if products < _CPP_PRODUCTS or x.numel() < _CPP_ROWS * x.shape[-1]:
        return False
    return has_cpp() and has_fast_products()


def _cpp_update(state: Tensor, *others: Tensor) -> str | None:
    if not state.is_cpu or state.dtype != torch.float32:
        return f"expects a float32 state on a CPU, got {state.dtype} on {state.device}"
    if any(t.dtype == torch.float64 for t in others):
        return "computes in float32, got float64"
    return _transforms()


def _cpp_update_suits(*tensors: Tensor) -> bool:
    return _cpp_is_default() and not _wants_gradients(*tensors)


def _cpp_noise(seeds: Tensor) -> str | None:
    return None if seeds.is_cpu else f"expects tensors on a CPU, got {seeds.device}"


def _cpp_noise_suits(seeds: Tensor) -> bool:
    return not torch.compiler.is_compiling()


def _other_tokens(cfg: DiTConfig) -> str | None:
    """Why no trajectory takes a model whose tokens are more than embedded patches, or None."""
    if cfg.context_tokens:
        return "takes no context tokens"
    return "takes no bottleneck of patches" if cfg.patch_bottleneck else None


def _cpp_trajectory(cfg: DiTConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    if (reason := _other_tokens(cfg)) is not None:
        return reason
    if device.type != "cpu":
        return f"expects tensors on a CPU, got {device}"
    if dtype == torch.bfloat16:
        if not torch.cpu.get_capabilities().get("avx512_bf16"):
            return "computes in bfloat16 on CPUs with AVX512-BF16 only; use float32"
        if cfg.head_dim % 2 or cfg.patch_size**2 * cfg.in_channels % 2:
            return "takes an even head dim and even features of a token in bfloat16"
    elif dtype != torch.float32:
        return f"computes in float32 and bfloat16, got {dtype}"
    return _transforms()


def _triton_trajectory(cfg: DiTConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    reason = _triton_on(device, dtype) or _other_tokens(cfg)
    reason = reason or definitions.trajectory_obstacle(*kernel_shape(cfg))
    if reason is None and device.type == "cuda":
        reason = _spills(cfg, torch.cuda.get_device_properties(device), dtype)
    return reason


def _spills(cfg: DiTConfig, properties: Any, dtype: torch.dtype) -> str | None:
    """Why the trajectory's kernel would not fit into a chip's registers, or None.

    `kernels/gate_cases.py` lists everything that is left.
    """
    features = cfg.patch_size**2 * cfg.in_channels
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


_NORM = {
    "cpp": Backend(_cpp_norm, _cpp_norm_suits),
    "triton": Backend(_triton, _always),
}
TABLE: dict[str, dict[str, Backend]] = {
    "layer_norm_modulate": _NORM,
    "gated_residual_layer_norm_modulate": _NORM,
    "rms_norm_modulate": _NORM,
    "gated_residual_rms_norm_modulate": _NORM,
    "attention": {"triton": Backend(_triton_attention, _always)},
    "cross_attention": {"triton": Backend(_triton_text_attention, _always)},
    "joint_attention": {"triton": Backend(_triton_text_attention, _always)},
    "qk_norm_rope": {"triton": Backend(_triton_qk_norm_rope, _always)},
    "linear": {"cpp": Backend(_cpp_linear, _cpp_linear_suits)},
    "swiglu": {"triton": Backend(_triton, _always)},
    "sampler_update": {
        "cpp": Backend(_cpp_update, _cpp_update_suits),
        "triton": Backend(_triton, _always),
    },
    "normal": {"cpp": Backend(_cpp_noise, _cpp_noise_suits)},
    "trajectory": {
        "triton": Backend(_triton_trajectory, _always),
        "cpp": Backend(_cpp_trajectory, _always),
    },
}
