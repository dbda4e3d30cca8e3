"""`PipelineTransformer`: what the stand-ins for diffusers' transformers share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastdit.checkpoints import text_models, translation
from fastdit.config import DiTConfig
from fastdit.model import DiT
from fastdit.text import MMDiT, PixArt


class TransformerOutput(NamedTuple):
    """The output of a transformer, whose member has a name and an index, as in diffusers."""

    sample: Tensor  # [B, C_out, H, W]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._asdict()[key]
        return tuple(self)[key]


class PipelineTransformer(nn.Module):
    """A stand-in for a transformer of diffusers that computes with a model of fastdit.

        pipe = PixArtSigmaPipeline.from_pretrained(folder)
        pipe.transformer = PipelineTransformer(fastdit.load(pipe.transformer))

    A `fastdit.DiT` stands in for the transformer of `DiTPipeline`, a `fastdit.PixArt` for that of
    `PixArtAlphaPipeline` and `PixArtSigmaPipeline`, a `fastdit.MMDiT` for that of
    `StableDiffusion3Pipeline`. Their forwards take what these pipelines pass.

    This is for code that is built around a pipeline. `fastdit.Sampler` is faster than any pipeline,
    since a pipeline runs the conditioning at every step.

    LoRA weights are loaded into diffusers' own transformer, from which `fastdit.load` merges them.
    A stand-in takes no adapters: the methods for them are ValueErrors.

    A pipeline finds a module's class, and whether it can be saved, by the module's base classes and
    by the name of its own. Instances therefore belong to a subclass of this class and of diffusers'
    that has the name of diffusers', and `pipe.save_pretrained` writes a folder of diffusers.

    Attributes:
        config: the config that diffusers' own transformer would have.
    """

    theirs: ClassVar[str]  # the name of diffusers' class
    _families: ClassVar[dict[type, type[PipelineTransformer]]] = {}

    def __init_subclass__(cls, cfg: type | None = None, **options: Any) -> None:
        """Let models of the config `cfg` be taken by this class."""
        super().__init_subclass__(**options)
        if cfg is not None:
            PipelineTransformer._families[cfg] = cls

    def __new__(cls, model: nn.Module) -> PipelineTransformer:
        family = cls._families.get(type(getattr(model, "cfg", None)))
        if family is None:
            expected = "a fastdit.DiT, fastdit.PixArt or fastdit.MMDiT"
            raise ValueError(f"model: expected {expected}, got {type(model).__name__}")
        # A class of a user's may derive from this one or from a family's.
        own = [cls] if cls is not PipelineTransformer else []
        return _blank(*own, *([] if issubclass(cls, family) else [family]))

    def __init__(self, model: DiT | PixArt | MMDiT) -> None:
        """Take a model, whose weights are shared.

        Raises:
            ValueError: the model is of no family above, or diffusers is not installed.
        """
        nn.Module.__init__(self)  # that of diffusers would build a second model
        self.model: Any = model
        cast(Any, self).register_to_config(**_translation(model.cfg).diffusers_config(model.cfg))

    @property
    def dtype(self) -> torch.dtype:
        return self.model.final_linear.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.final_linear.weight.device

    def __reduce__(self) -> tuple[Any, ...]:
        """Let copies and pickles name classes that can be imported."""
        return _blank, type(self).__bases__[:-1], self.__dict__


def check_tensors(**given: Any) -> None:
    """Raise a ValueError that names the first value which is not a tensor."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            got = None if value is None else type(value).__name__
            raise ValueError(f"{name}: expected a tensor, got {got}")


def per_image(timestep: Tensor, latents: Tensor) -> Tensor:
    """Return a timestep for each of B images [B, ...], of B or of one of shape [1] or []."""
    one = timestep.numel() == 1 and timestep.dim() <= 1
    return timestep.expand(len(latents)) if one else timestep


def is_traced(t: Tensor) -> bool:
    """Return whether the operations on a tensor are recorded, so that its values are not known."""
    return torch.compiler.is_compiling() or (t.is_cuda and torch.cuda.is_current_stream_capturing())


def _translation(cfg: Any) -> Any:
    """Return the module that translates models of a config to diffusers' and back."""
    return translation if isinstance(cfg, DiTConfig) else text_models


def _blank(*bases: Any) -> PipelineTransformer:
    return nn.Module.__new__(_named_as_theirs(*bases))


@functools.cache
def _named_as_theirs(*bases: type[PipelineTransformer]) -> type[PipelineTransformer]:
    """Return the subclass of `bases`, whose last is a family, that a pipeline takes for theirs."""
    try:
        import diffusers
    except ImportError as error:
        message = "PipelineTransformer: needs the package diffusers; pip install diffusers"
        raise ValueError(message) from error
    Theirs = getattr(diffusers, bases[-1].theirs)
    if issubclass(bases[0], Theirs):
        return bases[0]

    # A pipeline passes the options that it finds in the signature of this installed version.
    @functools.wraps(Theirs.save_pretrained)
    def save_pretrained(self: PipelineTransformer, *args: Any, **options: Any) -> None:
        cfg, state = self.model.cfg, self.model.state_dict()
        config, tensors = _translation(cfg).to_diffusers(cfg, state)
        with torch.device("meta"):  # no memory, and no random numbers, for weights to be replaced
            theirs = Theirs.from_config(config)
        theirs.load_state_dict(tensors, assign=True)
        theirs.save_pretrained(*args, **options)

    own = {"__module__": Theirs.__module__, "save_pretrained": save_pretrained}
    return type(Theirs.__name__, (*bases, Theirs), _refusals(Theirs) | own)


def _refusals(Theirs: type) -> dict[str, Callable[..., Any]]:
    """Return the methods of diffusers that would change its modules, each an error here."""
    found: dict[str, Callable[..., Any]] = {}
    for base in reversed(Theirs.__mro__):
        for name, value in vars(base).items():
            loader = base.__module__.startswith("diffusers.loaders") and inspect.isfunction(value)
            if loader and not name.startswith("__"):
                lora = base.__module__ == "diffusers.loaders.peft"
                found[name] = _refusal(name, _LORA if lora else _IP_ADAPTER)
            elif name == "set_attn_processor":
                found[name] = _refusal(name, _PROCESSOR)
    return found


_LORA = (
    "expected no call after the exchange, since fastdit's model has no adapters; load LoRA before "
    "it, and fastdit.load merges it: pipe.load_lora_weights(...), then pipe.transformer = "
    "PipelineTransformer(fastdit.load(pipe.transformer))"
)
_IP_ADAPTER = "expected no call, since fastdit's model takes no IP adapter; keep diffusers' own"
_PROCESSOR = "expected no call, since fastdit's model computes attention itself"


def _refusal(name: str, why: str) -> Callable[..., Any]:
    def refuse(self: PipelineTransformer, *args: Any, **options: Any) -> Any:
        raise ValueError(f"{name}: {why}")

    return refuse
