"""What a sampling loop asks of a model: its work for a batch, and its work for a step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from fastdit import functional
from fastdit.config import DiTConfig
from fastdit.errors import check_finite
from fastdit.model import DiT
from fastdit.sampling.modulation import ChunkedTables, LayerProjection, time_tensor


class Predictor(Protocol):
    """A model in a sampling loop."""

    @property
    def layout(self) -> ImageLayout | TokenLayout:
        """How images lie in the loop's state."""
        ...

    def refresh(self) -> None:
        """Take the model's present weights; raise a ValueError where one is not finite."""

    def begin(
        self, timesteps: Sequence[int] | Sequence[float], labels: list[int] | None, table_bytes: int
    ) -> Callable[..., Tensor]:
        """Do for a batch what its steps need not repeat.

        Returns:
            `conditioning(k, rows, out=None)`: what step k needs beside the state, for the batch's
            first `rows` rows, written to `out` if it is given. With guidance the null label's rows
            are the last B of 2B.
        """
        ...

    def __call__(self, x: Tensor, conditioning: Tensor, /) -> Tensor:
        """Return the model's output for a state; with guidance it has 2B rows."""
        ...


class ImageLayout:
    """The state is images: [B, C, H, W]."""

    def __init__(self, sample_shape: tuple[int, int, int]) -> None:
        self.shape = torch.Size(sample_shape)

    def to_state(self, images: Tensor) -> Tensor:
        return images

    def to_images(self, x: Tensor) -> Tensor:
        return x


class TokenLayout:
    """The state is [B, H*W, C], all pixels in the order in which patch tokens hold them."""

    def __init__(self, cfg: DiTConfig) -> None:
        self.shape = torch.Size((cfg.n_tokens * cfg.patch_size**2, cfg.in_channels))
        self._cfg = cfg

    def to_state(self, images: Tensor) -> Tensor:
        tokens = functional.patchify(images, self._cfg.patch_size)
        return tokens.view(len(images), -1, images.shape[1])

    def to_images(self, x: Tensor) -> Tensor:
        tokens = x.view(len(x), self._cfg.n_tokens, -1)
        return functional.unpatchify(tokens, self._cfg.patch_size, self._cfg.grid)


def is_standard_dit(model: nn.Module) -> TypeGuard[DiT]:
    """Return whether a model runs `DiT.forward` unhooked; submodules are not checked."""
    own = ("forward", "modulation", "conditioning")
    return (
        isinstance(model, DiT)
        and all(getattr(type(model), name) is getattr(DiT, name) for name in own)
        and not (model._forward_hooks or model._forward_pre_hooks)
    )


def is_unmodified_dit(model: nn.Module) -> bool:
    """Return whether no module of a DiT was exchanged or hooked.

    A fast path that reads only the weights would miss such changes.
    """
    modules = torch.nn.modules.module
    anywhere = modules._global_forward_hooks or modules._global_forward_pre_hooks
    if type(model) is not DiT or not is_standard_dit(model) or anywhere:
        return False
    return _signature(model) == _fresh_signature(model.cfg)


# Attributes that do not change a forward.
_IGNORED = {"training", "checkpointing", "cfg", "diffusion"}


def _signature(module: nn.Module) -> tuple[Any, ...]:
    """Return what decides a module's computation besides its weights' values.

    This is, for the module and its children, the class, hooks, weights' shapes and kinds (such as
    quantised ones), choices such as a GELU's, and attributes that shadow a method. It recurses by
    itself, since `named_modules` takes longer than a sampling step.
    """
    return (
        type(module),
        bool(module._forward_hooks or module._forward_pre_hooks),
        {name: p is not None and (type(p), p.shape) for name, p in module._parameters.items()},
        {
            name: value
            for name, value in vars(module).items()
            if (name[0] != "_" and name not in _IGNORED) or callable(value)
        },
        {name: child and _signature(child) for name, child in module._modules.items()},
    )


@functools.lru_cache(maxsize=16)
def _fresh_signature(cfg: DiTConfig) -> tuple[Any, ...]:
    """Return the signature of a fresh model, of which only one block is built."""
    # Not on "meta", which would import modules for a second. The caller's random state must stay.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        one = replace(cfg, n_layers=1, context_start=None)
        *own, children = _signature(DiT.from_config(one))
    *of_list, blocks = children["blocks"]
    alike = {str(i): blocks["0"] for i in range(cfg.n_layers)}
    return (*own, children | {"blocks": (*of_list, alike)})


class DiTPredictor:
    """A `fastdit.DiT`, whose conditioning is rows of modulation, computed ahead of the steps.

    It uses the model's own weights, or with `copies` a copy in the dtype of the forward. `refresh`
    fills the copy anew in the same buffers, as a captured graph needs it, and later changes of the
    model's parameters do not reach it. Hooks and exchanged modules are copied once, when the copy
    is made.
    """

    def __init__(self, model: DiT, dtype: torch.dtype, copies: bool) -> None:
        self.cfg, self.dtype, self.layout = model.cfg, dtype, TokenLayout(model.cfg)
        floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
        self.model = _copied(model, dtype) if copies or floats != {dtype} else model
        self.source = model
        self._found_finite: list[tuple[int, int]] | None = None

    def refresh(self) -> None:
        """Check that the weights are finite, and fill the copy where there is one.

        Raises:
            ValueError: a weight is not finite, or the model's parameters have other names or
                shapes than when it was copied.
        """
        self._check_finite()
        if self.model is self.source:
            return
        own, new = _tensors(self.model), _tensors(self.source)
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in new.items()}:
            raise ValueError(
                "model: its parameters have other names or shapes than when this Sampler copied "
                "them; make a new Sampler"
            )
        # One call for all pairs of equal strides; one other pair would slow all of them down.
        alike = [name for name in own if own[name].stride() == new[name].stride()]
        torch._foreach_copy_([own[name] for name in alike], [new[name] for name in alike])
        for name in own.keys() - alike:
            own[name].copy_(new[name])

    def _check_finite(self) -> None:
        """Read the weights once, and again where PyTorch's counters show a change.

        A write through `p.data` does not change them; a NaN that came so is found in the images.
        """
        parameters = dict(self.source.named_parameters())
        # Tensors of inference mode have no counters, and those of other classes may have no data.
        if any(type(p) is not nn.Parameter or p.is_inference() for p in parameters.values()):
            check_finite("model", parameters)
            return
        marks = [(p.data_ptr(), p._version) for p in parameters.values()]
        if marks != self._found_finite:
            check_finite("model", parameters)
            self._found_finite = marks

    def begin(
        self, timesteps: Sequence[int] | Sequence[float], labels: list[int] | None, table_bytes: int
    ) -> Callable[..., Tensor]:
        return ChunkedTables(LayerProjection(self.model), timesteps, labels, table_bytes).rows

    def __call__(self, x: Tensor, modulation: Tensor) -> Tensor:
        B, P, _ = x.shape
        tokens = x.view(B, self.cfg.n_tokens, -1)
        if len(modulation) != B:  # one copy makes the tokens twice, in the model's dtype
            tokens = tokens.expand(2, *tokens.shape)
            kept = torch.contiguous_format
            tokens = tokens.to(self.dtype, copy=True, memory_format=kept).flatten(0, 1)
        else:
            tokens = tokens.to(self.dtype)
        return self.model.denoise(tokens, modulation).view(len(tokens), P, -1)


class ModelPredictor:
    """Any model, called as `model(x, t, y)`; the conditioning is [rows, 2] of t and y.

    Without labels it is [rows, 1]. It is int64, or float64 where t is fractional, which holds both
    exactly.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        layout: ImageLayout | TokenLayout,
    ) -> None:
        self.model, self.device, self.dtype, self.layout = model, device, dtype, layout

    def refresh(self) -> None:
        """Check that the weights, which are the model's own, are finite."""
        check_finite("model", dict(self.model.named_parameters()))

    def begin(
        self, timesteps: Sequence[int] | Sequence[float], labels: list[int] | None, table_bytes: int
    ) -> Callable[..., Tensor]:
        t = time_tensor(timesteps, self.device, torch.float64)
        y = [] if labels is None else [torch.tensor(labels, dtype=t.dtype, device=self.device)]

        def conditioning(k: int, rows: int, out: Tensor | None = None) -> Tensor:
            return torch.stack([t[k].expand(rows), *(of[:rows] for of in y)], dim=1, out=out)

        return conditioning

    def __call__(self, x: Tensor, conditioning: Tensor) -> Tensor:
        t, y = conditioning[:, 0], conditioning[:, 1].long() if conditioning.shape[1] == 2 else None
        if t.is_floating_point():
            t = t.to(torch.promote_types(self.dtype, torch.float32))
        images = self.layout.to_images(x).to(self.dtype)
        if len(t) != len(x):
            images = torch.cat([images, images])
        out = self.model(images, t, y)
        B, C, H, W = images.shape
        if not isinstance(out, Tensor) or out.shape not in ((B, C, H, W), (B, 2 * C, H, W)):
            raise ValueError(
                f"model: expected an output of shape {[B, C, H, W]} or {[B, 2 * C, H, W]}, got "
                f"{list(out.shape) if isinstance(out, Tensor) else type(out).__name__}"
            )
        return self.layout.to_state(out)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name."""
    return {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}


def _copied(model: DiT, dtype: torch.dtype) -> DiT:
    """Return a copy of the model whose weights are not filled yet."""

    def storage(t: Tensor) -> Tensor:
        # With its channels fastest, a convolution's weight is the matrix of the patch embedding.
        layout = torch.channels_last if t.dim() == 4 else torch.contiguous_format
        kind = dtype if t.is_floating_point() and t is not model.rope else t.dtype
        empty = torch.empty_like(t, dtype=kind, memory_format=layout)
        return nn.Parameter(empty, requires_grad=False) if isinstance(t, nn.Parameter) else empty

    # deepcopy takes what its memo holds for the copy, so that no weight is copied twice.
    memo = {id(t): storage(t) for t in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, memo).eval()
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"model: this execution or dtype needs a copy of it, which failed ({error}); use "
            "execution='eager' and the model's own dtype"
        ) from error
