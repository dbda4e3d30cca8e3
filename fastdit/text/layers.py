"""What PixArt and MMDiT share: linears, embedders, the patch embedding, the base of the models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdit import functional
from fastdit.blocks import MLP, Linear, by_token
from fastdit.diffusion import DiffusionScheduler, timestep_embedding
from fastdit.errors import unknown_name
from fastdit.flow import published_flow
from fastdit.text_config import TEXT_PRESETS, MMDiTConfig, TextConfig

if TYPE_CHECKING:
    from typing_extensions import Self

T_EMBED_WIDTH = 256
FINAL_EPS = 1e-6
_INIT_STD = 0.02
_PIXART_DIFFUSION = DiffusionScheduler(1000).options


class Text(NamedTuple):
    """What a forward needs of the prompts besides modulation; `TextModel.encode_text` makes it."""

    tokens: Tensor  # of R prompts, the first dimension: PixArt [R, L, M, 2D], MMDiT [R, M, D]
    lengths: Tensor | None  # [R] int64, how many of the M tokens are the prompt's; None for all

    def rows(self, count: int) -> Text:
        """Return the text of the first `count` prompts, views."""
        return Text(self.tokens[:count], None if self.lengths is None else self.lengths[:count])


class PatchEmbed(nn.Module):
    """A linear embedding of patches, with the weight of a convolution, as it is published."""

    def __init__(self, cfg: TextConfig) -> None:
        super().__init__()
        p = cfg.patch_size
        self.proj = nn.Conv2d(cfg.in_channels, cfg.hidden, kernel_size=p, stride=p)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, p*p*C], as `functional.patchify` lays them out -> [B, N, D]."""
        return functional.linear(tokens, by_token(self.proj.weight), self.proj.bias)


def embedder(width: int, out: int, activation: nn.Module | None = None) -> nn.Sequential:
    """Return the MLP that embeds a timestep, a size or a text; by default with a SiLU."""
    return nn.Sequential(Linear(width, out), activation or nn.SiLU(), Linear(out, out))


def make_mlp(cfg: TextConfig, gelu: str = "tanh") -> MLP:
    """Return a block's MLP."""
    act = nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
    return MLP(Linear(cfg.hidden, cfg.mlp_hidden), act, Linear(cfg.mlp_hidden, cfg.hidden))


def published_diffusion(cfg: TextConfig) -> dict[str, Any]:
    """Return the options of the diffusion or the flow that a published model was trained on.

    Source: Chen et al. 2023, section 3.1 and the schedulers' configs of the published pipelines;
    Esser et al. 2024, equations 1 and 13.
    """
    flow = published_flow("SD3", cfg.sample_shape[1])
    if isinstance(cfg, MMDiTConfig) and flow is not None:
        return flow.options
    return dict(_PIXART_DIFFUSION)


class TextModel(nn.Module, ABC):
    """A transformer whose conditioning is text.

    A forward is `denoise(patchify(x), modulation_of(c), encode_text(text), positions(grid))`, with
    the conditioning c of the timestep and, by model, of the image's size or the pooled text.
    What does not depend on the state stands apart, so that a sampler can compute it before its
    loop.
    """

    cfg: Any
    t_embed: nn.Sequential
    # Options of the `DiffusionScheduler` or, with a "path", of the `FlowMatching` that the model
    # was trained with; `fastdit.load` sets them where they are known.
    diffusion: dict[str, Any] | None = None

    @classmethod
    def from_config(cls, cfg: TextConfig) -> Self:
        """Build a model of a config with fresh weights."""
        return cls(**cfg.to_dict())

    @classmethod
    def from_preset(cls, name: str) -> Self:
        """Build a model of a published size with fresh weights.

        Args:
            name: a key of `fastdit.TEXT_PRESETS` that is of this class, such as "SD3-medium".

        Returns:
            The model; its `diffusion` is what the published one was trained on.

        Raises:
            ValueError: the name is unknown, or is that of another class.
        """
        known = {n: cfg for n, cfg in TEXT_PRESETS.items() if cls._takes(cfg)}
        if not isinstance(name, str) or name not in known:
            raise unknown_name("name", name, known)
        model = cls.from_config(known[name])
        model.diffusion = published_diffusion(model.cfg)
        return model

    @staticmethod
    @abstractmethod
    def _takes(cfg: TextConfig) -> bool:
        """Return whether a config is of this class's models."""

    def time_embedding(self, t: Tensor) -> Tensor:
        """Return what the timestep's MLP is applied to: t [S] -> [S, 256]."""
        first = self.t_embed[0]
        assert isinstance(first, nn.Linear)
        return timestep_embedding(t, first.in_features).to(first.weight.dtype)

    def time_conditioning(self, t: Tensor) -> Tensor:
        """Return the timestep's part of the conditioning: t [S] -> [S, D]."""
        return self.t_embed(self.time_embedding(t))

    @abstractmethod
    def modulation_of(self, c: Tensor) -> Tensor:
        """Return the modulation of conditioning c [R, D]: [R, modulation_width]."""

    @abstractmethod
    def encode_text(self, text: Tensor, lengths: Tensor | None = None) -> Text:
        """Return what the blocks take of prompts' embeddings.

        It does not change over the steps of a loop.

        Args:
            text: [R, M, text_width], a text encoder's embeddings.
            lengths: [R] int64, how many of the M tokens are the prompt's; None for all of them.
        """

    @abstractmethod
    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the positions of (rows, columns) of patches: [1, N, D], float32 or the model's."""

    @abstractmethod
    def denoise(self, tokens: Tensor, modulation: Tensor, text: Text, positions: Tensor) -> Tensor:
        """Predict what the model was trained to return.

        Args:
            tokens: [B, N, p*p*C], as `functional.patchify` lays them out.
            modulation: [B, modulation_width], as `modulation_of` returns it.
            text: as `encode_text` returns it, of B prompts.
            positions: [1, N, D], as `positions` returns them.

        Returns:
            [B, N, p*p*C_out].
        """

    def check_text(
        self, text: Tensor, B: int, lengths: Tensor | None = None, name: str = "text"
    ) -> None:
        """Check the shapes and the dtype of the embeddings of B prompts, called `name`.

        Raises:
            ValueError: one does not fit; the message names the argument.
        """
        cfg = self.cfg
        _check_tensors(**{name: text})
        if text.dim() != 3 or text.shape[0] != B or text.shape[2] != cfg.text_width:
            expected = f"shape [{B}, tokens, {cfg.text_width}], a prompt an image"
            raise ValueError(f"{name}: expected {expected}, got {list(text.shape)}")
        if text.shape[1] > cfg.text_tokens or not text.shape[1]:
            expected = f"1 to {cfg.text_tokens} tokens, the most that the model takes"
            raise ValueError(f"{name}: expected {expected}, got {text.shape[1]}")
        if lengths is not None:
            _check_tensors(lengths=lengths)
        if lengths is not None and (lengths.shape != (B,) or lengths.dtype != torch.int64):
            expected = f"int64 of shape [{B}], the tokens of each prompt"
            raise ValueError(
                f"lengths: expected {expected}, got {lengths.dtype} of shape {list(lengths.shape)}"
            )
        self._check_dtype(name, text)

    def _check_dtype(self, name: str, value: Tensor) -> None:
        own, kind = self.t_embed[0].weight.dtype, value.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if value.dtype != own and not autocast:
            raise ValueError(
                f"{name}: expected {own}, as the model's weights are, got {value.dtype}; pass "
                f"{name}.to({own}), convert the model, or run it under torch.autocast"
            )

    def _check_inputs(self, x: Tensor, t: Tensor) -> None:
        """Check shapes and dtypes: reading values would cost a device sync, and would not trace."""
        cfg = self.cfg
        _check_tensors(x=x, t=t)
        B = x.shape[0] if x.dim() else 0
        if x.dim() != 4 or x.shape[1] != cfg.in_channels:
            got = list(x.shape)
            raise ValueError(f"x: expected shape [B, {cfg.in_channels}, H, W], got {got}")
        if t.shape != (B,):
            raise ValueError(f"t: expected shape [{B}], one timestep an image, got {list(t.shape)}")
        if t.dtype == torch.bfloat16:
            raise ValueError(
                "t: expected integers or float32, got torch.bfloat16, which rounds 999 to 1000"
            )
        self._check_dtype("x", x)

    def _init_linears(self) -> None:
        """Draw linears Xavier-uniform with zero biases, and the embedders' normal(0.02)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in self.t_embed:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=_INIT_STD)


def _check_tensors(**given: object) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
