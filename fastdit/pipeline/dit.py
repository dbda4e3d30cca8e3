"""A `fastdit.DiT` as the transformer of diffusers' `DiTPipeline`."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastdit.checkpoints.translation import diffusers_config, to_diffusers
from fastdit.errors import warn
from fastdit.model import DiT


class TransformerOutput(NamedTuple):
    """The output of a transformer, whose member has a name and an index, as in diffusers."""

    sample: Tensor  # [B, C_out, H, W]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._asdict()[key]
        return tuple(self)[key]


class PipelineTransformer(nn.Module):
    """A stand-in for diffusers' `DiTTransformer2DModel` that computes with a `fastdit.DiT`.

        pipe = DiTPipeline.from_pretrained(folder)
        pipe.transformer = PipelineTransformer(fastdit.load(pipe.transformer))

    This is for code that is built around a pipeline. `fastdit.Sampler` is faster than any pipeline,
    since a pipeline runs the whole model, its conditioning included, at every step. `DiTPipeline`
    itself makes square latents only; for other shapes `config.sample_size` is (height, width).

    A pipeline finds a module's class, and whether it can be saved, by the module's base classes and
    by the name of its own. Instances therefore belong to a subclass of this class and of diffusers'
    that has the name of diffusers', and `pipe.save_pretrained` writes a folder of diffusers.

    Attributes:
        config: the config that diffusers' own transformer would have.
    """

    def __new__(cls, *args: Any, **options: Any) -> PipelineTransformer:
        return super().__new__(_named_as_theirs(cast(Any, cls)))

    def __init__(self, model: DiT) -> None:
        """Take a model, whose weights are shared.

        Raises:
            ValueError: diffusers is not installed.
        """
        nn.Module.__init__(self)  # that of diffusers would build a second model
        self.model = model
        cast(Any, self).register_to_config(**diffusers_config(model.cfg))
        self._checked: Tensor | None = None  # the last labels that were found to be in range
        self._warned = False

    @property
    def dtype(self) -> torch.dtype:
        return self.model.pos_embed.dtype

    @property
    def device(self) -> torch.device:
        return self.model.pos_embed.device

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> TransformerOutput | tuple[Tensor]:
        """Predict the noise.

        Args:
            hidden_states: [B, C, H, W] latents.
            timestep: [B] timesteps, or one for all images, of shape [1] or [].
            class_labels: [B] int64; num_classes is the null label, and so is any label past it,
                since diffusers' `DiTPipeline` asks for label 1000 whatever the model's classes are.
            cross_attention_kwargs: None, since a DiT has no cross attention.
            return_dict: True returns a `TransformerOutput`, False a tuple.

        Returns:
            [B, C_out, H, W], as `sample` or as the tuple's only member.

        Raises:
            ValueError: a shape does not fit, a label is negative, a label is past the last class of
                a model without a null class, or cross_attention_kwargs are given.

        Warns:
            UserWarning: a label past the null label was taken for it; once for each transformer.
        """
        if cross_attention_kwargs:
            raise ValueError("cross_attention_kwargs: expected None, a DiT has no cross attention")
        labels = self._in_range(class_labels) if self.model.cfg.use_class_cond else class_labels
        if timestep.numel() == 1 and timestep.dim() <= 1:
            timestep = timestep.expand(len(hidden_states))
        sample = self.model(hidden_states, timestep, labels)
        return TransformerOutput(sample) if return_dict else (sample,)

    def _in_range(self, labels: Tensor) -> Tensor:
        """Return labels that the model has, each one past the null label replaced by it.

        Reading them waits for the device, so labels are read once, though a pipeline passes the
        same tensor at every step; and not where a graph is traced or captured.
        """
        traced = torch.compiler.is_compiling() or (
            labels.is_cuda and torch.cuda.is_current_stream_capturing()
        )
        if not traced and labels is not self._checked and labels.numel():
            self._check(labels)
            self._checked = labels
        cfg = self.model.cfg
        return labels.clamp(max=cfg.num_classes) if cfg.null_class else labels

    def _check(self, labels: Tensor) -> None:
        cfg = self.model.cfg
        low, high = torch.stack(torch.aminmax(labels)).tolist()
        if low < 0 or (high >= cfg.num_classes and not cfg.null_class):
            hint = "" if cfg.null_class else "; guidance_scale=1 needs no null class"
            raise ValueError(
                f"class_labels: expected labels in [0, {cfg.class_rows}), got {low} to {high}{hint}"
            )
        if high > cfg.num_classes and not self._warned:
            warn(
                f"class_labels: label {high} is taken for the null label, {cfg.num_classes}, since "
                f"the model has {cfg.num_classes} classes; diffusers' DiTPipeline always asks for "
                "1000"
            )
            self._warned = True

    def __reduce__(self) -> tuple[Any, ...]:
        """Let copies and pickles name a class that can be imported."""
        return _blank, (type(self).__bases__[0],), self.__dict__


def _blank(cls: type[PipelineTransformer]) -> PipelineTransformer:
    return cls.__new__(cls)


@functools.cache
def _named_as_theirs(cls: type[PipelineTransformer]) -> type[PipelineTransformer]:
    """Return the subclass of `cls` that a pipeline takes for diffusers' transformer."""
    try:
        from diffusers import DiTTransformer2DModel as Theirs
    except ImportError as error:
        message = "PipelineTransformer: needs the package diffusers; pip install diffusers"
        raise ValueError(message) from error
    if issubclass(cls, Theirs):
        return cls

    # A pipeline passes the options that it finds in the signature of this installed version.
    @functools.wraps(Theirs.save_pretrained)
    def save_pretrained(self: PipelineTransformer, *args: Any, **options: Any) -> None:
        config, tensors = to_diffusers(self.model.cfg, self.model.state_dict())
        with torch.device("meta"):  # no memory, and no random numbers, for weights to be replaced
            theirs = Theirs.from_config(config)
        theirs.load_state_dict(tensors, assign=True)
        theirs.save_pretrained(*args, **options)

    own = {"__module__": Theirs.__module__, "save_pretrained": save_pretrained}
    return type(Theirs.__name__, (cls, Theirs), own)
