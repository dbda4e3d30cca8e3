"""What a sampling loop asks of a model: its work for a batch, and its work for a step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from fastdit import functional
from fastdit.config import DiTConfig
from fastdit.errors import check_finite
from fastdit.model import DiT
from fastdit.sampling.modulation import ChunkedTables, LayerProjection, time_tensor

Constants: TypeAlias = tuple[Tensor | None, ...]


class Conditions(Protocol):
    """What the images of a batch are of: B rows, or 2B with null labels or negative prompts last.

    It has the form that `Predictor.begin` takes.
    """

    def __len__(self) -> int: ...

    def pick(self, rows: Sequence[int]) -> Any:
        """Return these rows alone."""
        ...


class ClassLabels(list[int]):
    """Labels of classes."""

    def pick(self, rows: Sequence[int]) -> ClassLabels:
        return ClassLabels(self[i] for i in rows)


def _no_constants(rows: int) -> Constants:
    return ()


class Prepared(NamedTuple):
    """What the steps of a loop need beside the state.

    Attributes:
        rows: `rows(k, count, out=None)` is what step k needs for the first `count` rows, written to
            `out` if it is given.
        constants: `constants(count)` is what all steps need for these rows: the same tensors at
            every call.
    """

    rows: Callable[..., Tensor]
    constants: Callable[[int], Constants] = _no_constants


class Predictor(Protocol):
    """A model in a sampling loop."""

    @property
    def layout(self) -> ImageLayout | TokenLayout:
        """How images lie in the loop's state."""
        ...

    def refresh(self) -> None:
        """Take the model's present weights; raise a ValueError where one is not finite."""

    def encode(self, conditions: Any) -> Any:
        """Return the conditions in the form that `begin` takes them: encoded, if they are text."""
        ...

    def begin(
        self, timesteps: Sequence[int] | Sequence[float], conditions: Any, table_bytes: int
    ) -> Prepared:
        """Do for a batch what its steps need not repeat.

        Args:
            timesteps: one for each step.
            conditions: as `encode` returns them, or some of their rows.
            table_bytes: bound of the modulation tables.
        """
        ...

    def __call__(self, x: Tensor, rows: Tensor, /, *constants: Tensor | None) -> Tensor:
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

    def __init__(self, sample_shape: tuple[int, int, int], patch_size: int) -> None:
        C, H, W = sample_shape
        self.shape = torch.Size((H * W, C))
        self.grid = H // patch_size, W // patch_size
        self.n_tokens = self.grid[0] * self.grid[1]
        self._patch_size = patch_size

    def to_state(self, images: Tensor) -> Tensor:
        tokens = functional.patchify(images, self._patch_size)
        return tokens.view(len(images), -1, images.shape[1])

    def to_images(self, x: Tensor) -> Tensor:
        tokens = x.view(len(x), self.n_tokens, -1)
        return functional.unpatchify(tokens, self._patch_size, self.grid)

    def to_tokens(self, x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        """Return a state as `rows` rows of tokens, [rows, N, p*p*C] in the model's dtype.

        Twice as many rows as images are all images, and all of them again.
        """
        tokens = x.view(len(x), self.n_tokens, -1)
        if rows == len(x):
            return tokens.to(dtype)
        tokens = tokens.expand(2, *tokens.shape)
        return tokens.to(dtype, copy=True, memory_format=torch.contiguous_format).flatten(0, 1)


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


M = TypeVar("M", bound=nn.Module)


class WeightsPredictor(Generic[M]):
    """A model with a config, whose `denoise` takes what was computed ahead of the steps.

    It uses the model's own weights, or with `copies` a copy in the dtype of the forward. `refresh`
    fills the copy anew in the same buffers, as a captured graph needs it, and later changes of the
    model's parameters do not reach it. Hooks and exchanged modules are copied once, when the copy
    is made.
    """

    cfg: Any

    def __init__(self, model: M, dtype: torch.dtype, copies: bool, layout: TokenLayout) -> None:
        self.dtype, self.layout = dtype, layout
        floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
        self.model: M = _copied(model, dtype) if copies or floats != {dtype} else model
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


class DiTPredictor(WeightsPredictor[DiT]):
    """A `fastdit.DiT`, whose conditioning is rows of modulation, computed ahead of the steps."""

    def __init__(self, model: DiT, dtype: torch.dtype, copies: bool) -> None:
        self.cfg = model.cfg
        layout = TokenLayout(model.cfg.sample_shape, model.cfg.patch_size)
        super().__init__(model, dtype, copies, layout)

    def encode(self, conditions: ClassLabels | None) -> ClassLabels | None:
        return conditions

    def begin(
        self,
        timesteps: Sequence[int] | Sequence[float],
        conditions: ClassLabels | None,
        table_bytes: int,
    ) -> Prepared:
        projection = LayerProjection(self.model)
        return Prepared(ChunkedTables(projection, timesteps, conditions, table_bytes).rows)

    def __call__(self, x: Tensor, rows: Tensor, /, *constants: Tensor | None) -> Tensor:
        tokens = self.layout.to_tokens(x, len(rows), self.dtype)
        return self.model.denoise(tokens, rows).view(len(rows), x.shape[1], -1)


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

    def encode(self, conditions: ClassLabels | None) -> ClassLabels | None:
        return conditions

    def begin(
        self,
        timesteps: Sequence[int] | Sequence[float],
        conditions: ClassLabels | None,
        table_bytes: int,
    ) -> Prepared:
        t, y = time_tensor(timesteps, self.device, torch.float64), []
        if conditions is not None:
            y.append(torch.tensor(conditions, dtype=t.dtype, device=self.device))

        def rows(k: int, count: int, out: Tensor | None = None) -> Tensor:
            return torch.stack([t[k].expand(count), *(of[:count] for of in y)], dim=1, out=out)

        return Prepared(rows)

    def __call__(self, x: Tensor, rows: Tensor, /, *constants: Tensor | None) -> Tensor:
        t, y = rows[:, 0], rows[:, 1].long() if rows.shape[1] == 2 else None
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


def _copied(model: M, dtype: torch.dtype) -> M:
    """Return a copy of the model whose weights are not filled yet."""
    rope = model.rope if isinstance(model, DiT) else None  # which stays in float32

    def storage(t: Tensor) -> Tensor:
        # With its channels fastest, a convolution's weight is the matrix of the patch embedding.
        layout = torch.channels_last if t.dim() == 4 else torch.contiguous_format
        kind = dtype if t.is_floating_point() and t is not rope else t.dtype
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
