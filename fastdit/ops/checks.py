"""Checks of the public ops' arguments: shapes, dtypes, devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdit.errors import FLOAT_DTYPES, check_range
from fastdit.ops.trajectory import DiTWeights, Modulation
from fastdit.update import COEFFICIENTS, Guidance


def check_tokens(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor [B, N, channels], got {type(x).__name__}")
    if x.dim() != 3:
        raise ValueError(f"{name}: expected 3 dimensions [B, N, channels], got {list(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name}: expected a float dtype, got {x.dtype}")


def check_residual(x: Tensor, y: Tensor) -> None:
    """Check the residual stream x and the output y of a sub-layer."""
    check_tokens("x", x)
    check_tokens("y", y)
    if y.shape != x.shape:
        raise ValueError(f"y: expected x's shape {list(x.shape)}, got {list(y.shape)}")
    check_device(x, y=y)


def head_dim(qkv: Tensor, n_heads: int, name: str = "qkv") -> int:
    """Return the head dim of packed queries, keys and values, after a check of their shape."""
    check_tokens(name, qkv)
    _check_heads(n_heads)
    width = qkv.shape[-1]
    if width % (3 * n_heads):
        raise ValueError(
            f"{name}: expected a last dimension divisible by 3 * n_heads = {3 * n_heads}, "
            f"got {width}"
        )
    return width // (3 * n_heads)


def _check_heads(n_heads: int) -> None:
    # A symbolic integer of torch.compile is none of Python's, and compares as one.
    if isinstance(n_heads, bool | float | str | None) or n_heads < 1:
        raise ValueError(f"n_heads: expected at least 1, got {n_heads!r}")


def check_head_parts(
    qkv: Tensor, n_heads: int, weights: Sequence[Tensor | None], rope: Tensor | None
) -> int:
    """Check (q_weight, q_bias, k_weight, k_bias) and the rotary table; return the head dim."""
    d = head_dim(qkv, n_heads)
    q_weight, q_bias, k_weight, k_bias = weights
    for name, own, other, of in (
        ("k_weight", k_weight, q_weight, "q_weight"),
        ("k_bias", k_bias, q_bias, "q_bias"),
    ):
        if (own is None) != (other is None):
            raise ValueError(f"{name}: expected {_kind(other)}, as {of} is, got {_kind(own)}")
    if q_bias is not None and q_weight is None:
        raise ValueError("q_bias: expected None where q_weight is None, got a tensor")
    if rope is not None and d % 2:
        raise ValueError(f"rope: expected None for an odd head dim, {d}, got a tensor")
    expected = dict.fromkeys(("q_weight", "q_bias", "k_weight", "k_bias"), [d])
    expected["rope"] = [2, qkv.shape[1], d // 2]
    for (name, shape), value in zip(expected.items(), (*weights, rope), strict=True):
        if value is None:
            continue
        if list(value.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")
        if value.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name}: expected a float dtype, got {value.dtype}")
        if value.device != qkv.device:
            raise _other_device(name, qkv, value, of="qkv")
    return d


def check_cross_attention(q: Tensor, kv: Tensor, n_heads: int, lengths: Tensor | None) -> int:
    """Check queries [B, N, D] beside keys and values [B, M, 2D]; return the head dim."""
    check_tokens("q", q)
    check_tokens("kv", kv)
    _check_heads(n_heads)
    D = q.shape[-1]
    if not D or D % n_heads:
        raise ValueError(f"q: expected a last dimension divisible by n_heads = {n_heads}, got {D}")
    if kv.shape[-1] != 2 * D:
        expected = f"a last dimension of 2 * {D}, keys and values as wide as q"
        raise ValueError(f"kv: expected {expected}, got {kv.shape[-1]}")
    _check_beside("kv", kv, "q", q)
    _check_lengths(lengths, "kv", kv)
    return D // n_heads


def check_joint_attention(
    qkv_image: Tensor,
    qkv_text: Tensor,
    n_heads: int,
    norms: Sequence[Tensor | None],
    lengths: Tensor | None,
) -> int:
    """Check two packed tensors [B, N, 3D] and [B, M, 3D], and norms; return the head dim."""
    d = head_dim(qkv_image, n_heads, "qkv_image")
    check_tokens("qkv_text", qkv_text)
    if qkv_text.shape[-1] != qkv_image.shape[-1]:
        expected = f"a last dimension of {qkv_image.shape[-1]}, as qkv_image has"
        raise ValueError(f"qkv_text: expected {expected}, got {qkv_text.shape[-1]}")
    _check_beside("qkv_text", qkv_text, "qkv_image", qkv_image)
    if len(norms) != 4 or len({weight is None for weight in norms}) != 1:
        got = ", ".join(map(_kind, norms)) or "none"
        raise ValueError(f"norms: expected four tensors or four times None, got {got}")
    for i, weight in enumerate(norms):
        if weight is None:
            continue
        if list(weight.shape) != [d]:
            raise ValueError(f"norms[{i}]: expected shape [{d}], got {list(weight.shape)}")
        if weight.dtype not in FLOAT_DTYPES:
            raise ValueError(f"norms[{i}]: expected a float dtype, got {weight.dtype}")
        if weight.device != qkv_image.device:
            raise _other_device(f"norms[{i}]", qkv_image, weight, of="qkv_image")
    _check_lengths(lengths, "qkv_text", qkv_text)
    return d


def _check_beside(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Check that a text's tensor has the image's batch, device and, but for autocast, dtype."""
    if value.shape[0] != other.shape[0]:
        expected = f"{other_name}'s batch of {other.shape[0]}"
        raise ValueError(f"{name}: expected {expected}, got {value.shape[0]}")
    if not value.shape[1] and value.shape[0]:
        raise ValueError(f"{name}: expected at least 1 token, got 0")
    if value.device != other.device:
        raise _other_device(name, other, value, of=other_name)
    kind = value.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)  # "meta" has none
    wide = torch.float64 in (value.dtype, other.dtype)  # which autocast leaves alone
    if value.dtype != other.dtype and (wide or not autocast):
        raise ValueError(f"{name}: expected {other_name}'s dtype {other.dtype}, got {value.dtype}")


def _check_lengths(lengths: Tensor | None, name: str, text: Tensor) -> None:
    """Check how many of a text's tokens count; the values on a CPU only, where nothing waits."""
    if lengths is None:
        return
    B, M, _ = text.shape
    if not isinstance(lengths, Tensor):
        got = type(lengths).__name__
        raise ValueError(f"lengths: expected int64 of shape [{B}], got {got}")
    if lengths.dtype != torch.int64 or lengths.shape != (B,):
        raise ValueError(
            f"lengths: expected int64 of shape [{B}], got {lengths.dtype} of {list(lengths.shape)}"
        )
    if lengths.device != text.device:
        raise _other_device("lengths", text, lengths, of=name)
    if B and lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = lengths.aminmax()
        if low < 1 or high > M:
            got = f"{int(low)} to {int(high)}"
            raise ValueError(f"lengths: expected 1 to {M}, the tokens of {name}, got {got}")


def check_halves(x: Tensor) -> None:
    """Check that the last dimension can be halved."""
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"x: expected an even last dimension, got shape {list(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"x: expected a float dtype, got {x.dtype}")


def check_modulation(x: Tensor, **modulation: Tensor | None) -> None:
    """Check the shape [B, D], dtype and device of each modulation tensor that is there."""
    B, _, D = x.shape
    for name, value in modulation.items():
        if value is not None:
            _check_vectors(name, value, x, (B, D))


def check_norm_weight(x: Tensor, weight: Tensor) -> None:
    """Check the shape [D], dtype and device of a norm's weight."""
    _check_vectors("weight", weight, x, x.shape[-1:])


def _check_vectors(name: str, value: Tensor, x: Tensor, expected: tuple[int, ...]) -> None:
    if value.shape != expected:
        raise ValueError(f"{name}: expected shape {list(expected)}, got {list(value.shape)}")
    if value.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name}: expected a float dtype, got {value.dtype}")
    if value.device != x.device:
        raise _other_device(name, x, value)


def check_update_tensors(
    x: Tensor,
    model_out: Tensor,
    guidance: Guidance | None,
    x0_prev: Tensor | None,
    noise: Tensor | None,
) -> None:
    """Check the shapes, dtypes and devices of one update's tensors."""
    shape = x.shape
    if len(shape) not in (3, 4):
        raise ValueError(f"x: expected [B, P, C] or [B, C, H, W], got {list(shape)}")
    for name, value in (("x", x), ("model_out", model_out), ("x0_prev", x0_prev), ("noise", noise)):
        if value is not None and value.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name}: expected a float dtype, got {value.dtype}")
        if value is not None and name != "model_out" and value.shape != shape:
            raise ValueError(f"{name}: expected x's shape {list(shape)}, got {list(value.shape)}")
    dim = 1 if len(shape) == 4 else 2
    eps, learned = list(shape), list(shape)
    learned[dim] *= 2
    if guidance is not None:
        eps[0] = learned[0] = 2 * shape[0]
        if guidance.channels is not None and not 0 < guidance.channels <= shape[dim]:
            raise ValueError(
                f"guidance: expected 1 to {shape[dim]} channels, got {guidance.channels}"
            )
    if list(model_out.shape) not in (eps, learned):
        raise ValueError(
            f"model_out: expected shape {eps}, or {learned} with a learned range"
            f"{'' if guidance is None else ' (2B rows for guidance)'}, got {list(model_out.shape)}"
        )
    for name, value in (("model_out", model_out), ("x0_prev", x0_prev), ("noise", noise)):
        if value is not None and value.device != x.device:
            raise _other_device(name, x, value)


def check_out(out: tuple[Tensor, Tensor] | None, like: Tensor, given: Sequence[Tensor]) -> None:
    if out is None:
        return
    if out[0] is out[1]:
        raise ValueError("out: expected two tensors, got one twice")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*given, *out)):
        raise ValueError("out: expected tensors of which none asks for a gradient; use out=None")
    for t in out:
        if t.shape != like.shape or t.dtype != like.dtype or not t.is_contiguous():
            raise ValueError(
                f"out: expected two contiguous tensors of shape {list(like.shape)} and "
                f"{like.dtype}, got {list(t.shape)}, strides {list(t.stride())}, {t.dtype}"
            )
        check_device(like, out=t)


def check_weights(weights: DiTWeights) -> None:
    """Check that the tensors are those of the config, in one float dtype and on one device."""
    if weights.cfg.context_tokens or weights.cfg.patch_bottleneck:
        expected = "those of a model without context tokens and without a bottleneck of patches"
        raise ValueError(f"weights: expected {expected}; call the model itself")
    shapes, tensors = weights.shapes(), weights.tensors
    if len(tensors) != len(shapes):
        raise ValueError(f"weights: expected {len(shapes)} tensors, got {len(tensors)}")
    first = tensors[0]
    for i, (t, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if t.shape != shape:
            raise ValueError(f"weights: expected shape {list(shape)} at {i}, got {list(t.shape)}")
        if t.dtype not in FLOAT_DTYPES:
            raise ValueError(f"weights: expected a float dtype, got {t.dtype}")
        is_rope = weights.cfg.rope and i == len(shapes) - 1  # which may be float32 beside any
        if t.device != first.device or (t.dtype != first.dtype and not is_rope):
            raise ValueError(
                f"weights: expected one dtype and device, got {first.dtype} on {first.device} and "
                f"{t.dtype} on {t.device}"
            )


def check_trajectory(
    x: Tensor,
    x0: Tensor,
    weights: DiTWeights,
    modulation: Modulation,
    coefficients: Tensor,
    seeds: Tensor | None,
    noise: Tensor | None,
    guidance: Guidance | None,
) -> None:
    check_weights(weights)
    cfg, K, B = weights.cfg, len(coefficients), x.shape[0]
    state = [B, cfg.n_tokens * cfg.patch_size**2, cfg.in_channels]
    rows, width = (2 * B if guidance else B), cfg.modulation_width
    by_step, by_label, row = modulation
    labels = by_step.shape[1] if by_label is None and by_step.dim() == 3 else 1
    expected: dict[str, tuple[Tensor | None, list[int]]] = {
        "x": (x, state),
        "x0": (x0, state),
        "coefficients": (coefficients, [K, len(COEFFICIENTS)]),
        "modulation.by_step": (by_step, [K, labels, width]),
        "modulation.by_label": (by_label, [0 if by_label is None else len(by_label), width]),
        "modulation.rows": (row, [rows]),
        "noise": (noise, [K, *state]),
    }
    for name, (value, shape) in expected.items():
        if value is not None and list(value.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")
        if value is not None and name != "modulation.rows" and value.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name}: expected a float dtype, got {value.dtype}")
    if row.dtype != torch.int64:
        raise ValueError(f"modulation.rows: expected int64, got {row.dtype}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x: expected float32 or float64, got {x.dtype}")
    if x0.dtype != x.dtype:
        raise ValueError(f"x0: expected x's dtype {x.dtype}, got {x0.dtype}")
    if row.device.type == "cpu":  # reading values elsewhere would wait for the device
        check_range("modulation.rows", row, labels if by_label is None else len(by_label))
    if guidance is not None and not 0 < (guidance.channels or 1) <= cfg.in_channels:
        raise ValueError(
            f"guidance: expected 1 to {cfg.in_channels} channels, got {guidance.channels}"
        )
    check_seeds(x, seeds, noise)
    del expected["x"]
    given = {name: value for name, (value, _) in expected.items() if value is not None}
    check_device(x, weights=weights.tensors[0], **given)


def check_noise(seeds: Tensor, steps: Tensor, elements: int) -> None:
    if elements < 1:
        raise ValueError(f"elements: expected at least 1, got {elements}")
    if seeds.dtype != torch.int64 or seeds.dim() != 2 or seeds.shape[1] != 2:
        raise ValueError(
            f"seeds: expected int64 of shape [B, 2], got {seeds.dtype} of {list(seeds.shape)}"
        )
    if steps.dtype != torch.int64 or steps.dim() != 1:
        raise ValueError(
            f"steps: expected int64 of shape [S], got {steps.dtype} of {list(steps.shape)}"
        )
    if steps.device != seeds.device:
        raise ValueError(f"steps: expected seeds' device {seeds.device}, got {steps.device}")


def check_update_tables(x: Tensor, coefficients: Tensor, step: Tensor | int) -> Tensor:
    """Check the table and return step as a tensor."""
    columns = len(COEFFICIENTS)
    S = coefficients.shape[0] if coefficients.dim() else 0
    if coefficients.shape != (S, columns) or coefficients.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"coefficients: expected floats of shape [S, {columns}], got {coefficients.dtype} of "
            f"{list(coefficients.shape)}"
        )
    if not isinstance(step, Tensor):
        if not 0 <= step < S:
            raise ValueError(f"step: expected a row of the {S} coefficients, got {step}")
        step = torch.tensor(step, device=x.device)
    if step.dtype != torch.int64 or step.dim():
        raise ValueError(
            f"step: expected an int64 scalar, got {step.dtype} of shape {list(step.shape)}"
        )
    check_device(x, coefficients=coefficients, step=step)
    return step


def check_seeds(x: Tensor, seeds: Tensor | None, noise: Tensor | None) -> None:
    if seeds is None:
        return
    if noise is not None:
        raise ValueError("noise: expected None where seeds are given, got both")
    if seeds.dtype != torch.int64 or seeds.shape != (x.shape[0], 2):
        raise ValueError(
            f"seeds: expected int64 of shape [{x.shape[0]}, 2], got {seeds.dtype} of "
            f"{list(seeds.shape)}"
        )
    check_device(x, seeds=seeds)


def check_device(x: Tensor, **others: Tensor) -> None:
    for name, value in others.items():
        if value.device != x.device:
            raise _other_device(name, x, value)


def _other_device(name: str, x: Tensor, value: Tensor, of: str = "x") -> ValueError:
    return ValueError(f"{name}: expected {of}'s device {x.device}, got {value.device}")


def _kind(value: Tensor | None) -> str:
    return "None" if value is None else "a tensor"
