"""`fastdit.DiT`: the model, with a forward made of the fused ops of `fastdit.functional`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit import functional, reference
from fastdit.blocks import Block, Conditioned, Norm, PatchEmbed
from fastdit.config import PRESETS, DiTConfig
from fastdit.diffusion import timestep_embedding
from fastdit.errors import check_range, height_and_width, unknown_name
from fastdit.flow import published_flow
from fastdit.functional import sincos_pos_embed as sincos_pos_embed

if TYPE_CHECKING:
    from typing_extensions import Self

_INIT_STD = 0.02  # of embeddings and learned positions
# Pixels along a side of one cell of a published model's latents.
_LATENT_SCALES = {"DiT": 8, "SiT": 8, "LightningDiT": 16}


class DiT(Conditioned):
    """Diffusion Transformer with adaLN-Zero conditioning (Peebles & Xie 2023).

    A forward is `denoise(patchify(x), modulation(t, y))`. What depends on (t, y) alone stands
    apart, so that a sampler can compute it before its loop.

        model = DiT(img_size=16, patch_size=4, hidden=64, n_layers=4, n_heads=4)
        eps = model(x, t, y)  # x [B, C, H, W], t [B], y [B] or None
    """

    blocks: list[Block]  # an nn.ModuleList
    # Options of the `DiffusionScheduler` or, with a "path", of the `FlowMatching` that the model
    # was trained with; `fastdit.load` sets them where they are known.
    diffusion: dict[str, Any] | None = None
    rope: Tensor | None

    def __init__(
        self,
        img_size: int | tuple[int, int] = 16,
        patch_size: int = 4,
        in_channels: int = 3,
        hidden: int = 64,
        n_layers: int = 4,
        n_heads: int = 4,
        num_classes: int = 16,
        use_class_cond: bool = True,
        **options: Any,
    ) -> None:
        """Build a model with fresh weights; it returns zeros until it is trained.

        Args and `options` are the fields of `DiTConfig`, which documents them.

        Raises:
            ValueError: an option is unknown, out of range, or contradicts another.
        """
        super().__init__()
        self.cfg = cfg = DiTConfig.from_dict(
            dict(
                img_size=img_size,
                patch_size=patch_size,
                in_channels=in_channels,
                hidden=hidden,
                n_layers=n_layers,
                n_heads=n_heads,
                num_classes=num_classes,
                use_class_cond=use_class_cond,
                **options,
            )
        )
        D = cfg.hidden
        self.patch_embed = PatchEmbed(cfg)
        self.pos_embed = nn.Parameter(
            torch.empty(1, cfg.n_tokens, D), requires_grad=cfg.pos_embed == "learned"
        )
        if cfg.embedders == "shared":
            self.add_embedders(cfg)
        if cfg.context_tokens:
            self.context_pos = nn.Parameter(torch.empty(1, cfg.context_tokens, D))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))  # type: ignore[assignment]
        self.final_norm = Norm(cfg, cfg.ln_eps)
        self.final_mod = nn.Linear(D, 2 * D)
        self.final_linear = nn.Linear(D, cfg.patch_size**2 * cfg.out_channels)
        self.register_buffer("rope", None, persistent=False)
        self.make_rope()
        self._init_weights()

    def make_rope(self) -> None:
        """Make the rotary table, [2, N, d/2] in float32, where the weights are."""
        if (cfg := self.cfg).rope:
            table = functional.rope_table(cfg.head_dim, cfg.grid, cfg.context_tokens or 0)
            self.rope = table.to(self.pos_embed.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the model, of which the rotary table stays in float32."""
        super()._apply(fn, recurse)
        self.make_rope()
        return self

    def _load_from_state_dict(self, *given: Any) -> None:
        super()._load_from_state_dict(*given)
        if self.rope is not None and self.rope.device != self.pos_embed.device:
            self.make_rope()  # with assign=True the weights may have come from another device

    @classmethod
    def from_config(cls, cfg: DiTConfig) -> Self:
        """Build a model of a config with fresh weights."""
        return cls(**cfg.to_dict())

    @classmethod
    def from_preset(cls, name: str, image_size: int | tuple[int, int] | None = None) -> Self:
        """Build a model of a published size with fresh weights.

        Args:
            name: a key of `fastdit.PRESETS`, such as "DiT-XL/2".
            image_size: side of the images in pixels, or (height, width); None is the preset's: 256,
                512 of JiT-*/32, or the toy's 16. A DiT or a SiT works on their latents, an eighth
                of that size, and a LightningDiT on a sixteenth.

        Returns:
            The model; its `diffusion` is the flow that the published one was trained on, or None.

        Raises:
            ValueError: the name is unknown, or the size is not a multiple of what it must be.
        """
        if name not in PRESETS:
            raise unknown_name("name", name, PRESETS)
        cfg = PRESETS[name]
        if image_size is not None:
            scale = _LATENT_SCALES.get(name.partition("-")[0], 1)
            height, width = height_and_width("image_size", image_size, scale * cfg.patch_size)
            cfg = replace(cfg, img_size=(height // scale, width // scale))
        model, flow = cls.from_config(cfg), published_flow(name, cfg.sample_shape[1])
        model.diffusion = None if flow is None else flow.options
        return model

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Draw weights as `cfg.init` says, set the positions, and zero adaLN's layers."""
        cfg = self.cfg
        if cfg.init == "xavier":
            for module in self.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    nn.init.xavier_uniform_(module.weight.flatten(1))
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
            for owner in self.embedders():
                for layer in owner.t_embed:
                    if isinstance(layer, nn.Linear):
                        nn.init.normal_(layer.weight, std=_INIT_STD)
                if cfg.use_class_cond:
                    nn.init.normal_(owner.y_embed.weight, std=_INIT_STD)
        if cfg.pos_embed == "sincos":
            self.pos_embed.copy_(sincos_pos_embed(cfg.hidden, cfg.grid))
        else:
            nn.init.normal_(self.pos_embed, std=_INIT_STD)
        if cfg.context_tokens:
            nn.init.normal_(self.context_pos, std=_INIT_STD)
        for layer in (*self.modulation_layers(), self.final_linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def modulation_layers(self) -> list[nn.Linear]:
        """Return the linears that make modulation: one a block, and the final one."""
        return [*(block.adaLN_modulation for block in self.blocks), self.final_mod]

    def embedders(self) -> Sequence[Conditioned]:
        """Return the modules that have embedders: the model, or with embedders="block" its blocks.

        Those of the first block serve the final layer too.
        """
        return self.blocks if self.cfg.embedders == "block" else [self]

    def by_embedders(self, embed: Callable[[Conditioned], Tensor]) -> Tensor:
        """Return what `embed` makes of each module with embedders.

        Returns:
            Its result; with embedders="block" the blocks' results, stacked in a new first dim.
        """
        parts = [embed(owner) for owner in self.embedders()]
        return torch.stack(parts) if self.cfg.embedders == "block" else parts[0]

    def time_embedding(self, t: Tensor) -> Tensor:
        """Return what the timestep's MLPs `t_embed` are applied to: t [B] -> [B, width]."""
        first = self.embedders()[0].t_embed[0]
        assert isinstance(first, nn.Linear)
        embedding = timestep_embedding(t, first.in_features, freq_shift=self.cfg.t_freq_shift)
        return embedding.to(first.weight.dtype)

    def time_conditioning(self, t: Tensor) -> Tensor:
        """Return the timestep's part of the conditioning: t [B] -> [B, D].

        With embedders="block" it is [n_layers, B, D].
        """
        embedding = self.time_embedding(t)
        return self.by_embedders(lambda owner: owner.t_embed(embedding))

    def label_conditioning(self, y: Tensor | None) -> Tensor | None:
        """Return the label's part of the conditioning.

        Args:
            y: [B] int64 labels, or None.

        Returns:
            [B, D]; without labels the null class's row [D], or None where there is no such row, or
            no class conditioning. With embedders="block" [n_layers, B, D], or the null rows
            [n_layers, 1, D].

        Raises:
            ValueError: a label on the CPU is out of range. On an accelerator nothing checks it
                but the kernel, which leaves the device unusable: reading labels would stall the
                stream at every forward. `Sampler`, the command line and the data check labels on
                the host.
        """
        cfg = self.cfg
        if y is None or not cfg.use_class_cond:
            if not cfg.null_class:
                return None
            if cfg.embedders == "shared":
                return self.y_embed.weight[cfg.num_classes]
            y = torch.full((1,), cfg.num_classes, device=self.pos_embed.device)
        labels = y
        try:
            return self.by_embedders(lambda owner: owner.y_embed(labels))
        except IndexError:  # a CPU finds it without a cost, and it may not be the label's
            check_range("y", y, cfg.class_rows)
            raise

    def conditioning(self, t: Tensor, y: Tensor | None) -> Tensor:
        """Return the vector that every modulation is made from: t [B], y [B] or None -> [B, D].

        With embedders="block" it is [n_layers, B, D], one vector for each block.
        """
        c, of_label = self.time_conditioning(t), self.label_conditioning(y)
        if of_label is not None:
            c = c + of_label
        return F.silu(c) if self.cfg.modulation_act == "silu" else c

    def conditioning_by_layer(self, c: Tensor) -> list[Tensor]:
        """Return the conditioning [R, D] of each of `modulation_layers`, views of c.

        Args:
            c: as `conditioning` returns it.
        """
        return [c] * (self.cfg.n_layers + 1) if self.cfg.embedders == "shared" else [*c, c[0]]

    def modulation_parts(self, c: Tensor) -> Iterator[Tensor]:
        """Yield the modulation of conditioning c [R, D]: for each block, then for the final layer.

        That of a block is [R, 6D], without shifts [R, 4D], and the last [R, 2D]. With
        embedders="block" c is [n_layers, R, D]. A layer runs when its part is asked for.
        """
        for layer, own in zip(self.modulation_layers(), self.conditioning_by_layer(c), strict=True):
            yield layer(own)

    def modulation(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Return all that the conditioning contributes to a forward.

        Args:
            t: [B] timesteps.
            y: [B] int64 labels; None for no label.

        Returns:
            [B, modulation_width], side by side: scale1, shift1, gate1, scale2, shift2, gate2 of
            each block, or without shifts scale1, gate1, scale2, gate2; then scale and shift of the
            final layer; then, for a model with context tokens, the class embedding.
        """
        parts = list(self.modulation_parts(self.conditioning(t, y)))
        if self.cfg.context_tokens:
            of_label, like = self.label_conditioning(y), parts[0][:, : self.cfg.hidden]
            parts.append(like * 0 if of_label is None else of_label.expand_as(like))
        return torch.cat(parts, dim=-1)

    def denoise(self, tokens: Tensor, modulation: Tensor) -> Tensor:
        """Predict the noise of patch tokens, or what else the model was trained to return.

        Args:
            tokens: [B, N, p*p*C], as `functional.patchify` lays them out.
            modulation: [B, modulation_width], as `modulation` returns it.

        Returns:
            [B, N, p*p*C_out].
        """
        return self._denoise(tokens, modulation)[0]

    def _denoise(
        self, tokens: Tensor, modulation: Tensor, hidden_after: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the prediction, and the patches' stream after some blocks, if it is asked for."""
        cfg, (by_block, of_label) = self.cfg, self._modulation_by_block(modulation)
        n, start = cfg.context_tokens or 0, cfg.context_start or 0
        norms = [*(block.norm1 for block in self.blocks), self.final_norm]
        hidden, residual = None, self.patch_embed(tokens) + self.pos_embed  # [B, N, D]
        rope = None if self.rope is None else self.rope[:, n:]
        residual, h = norms[0](residual, *by_block[0][:2])
        for i, block in enumerate(self.blocks):
            if of_label is not None and i == start:
                context, normed = norms[i](self.context_pos + of_label[:, None], *by_block[i][:2])
                residual, h = torch.cat([context, residual], dim=1), torch.cat([normed, h], dim=1)
                rope = self.rope
            parts = [*by_block[i][2:], *by_block[i + 1][:2]]
            residual, h = block(residual, h, parts, norms[i + 1], rope)
            if i + 1 == hidden_after:
                hidden = residual[:, -cfg.n_tokens :]
        return self.final_linear(h[:, n:] if n else h), hidden

    def _modulation_by_block(
        self, modulation: Tensor
    ) -> tuple[list[list[Tensor | None]], Tensor | None]:
        """Return views [B, D] of modulation, and the class embedding if there are context tokens.

        There are six for each block, with None for shifts that it lacks, and two for the final
        layer.
        """
        n, parts = self.cfg.block_parts, modulation.split(self.cfg.hidden, dim=-1)
        end = n * self.cfg.n_layers
        blocks: list[list[Tensor | None]] = [list(parts[i : i + n]) for i in range(0, end, n)]
        if not self.cfg.modulation_shift:
            blocks = [[*own[:1], None, *own[1:3], None, *own[3:]] for own in blocks]
        of_label = parts[-1] if self.cfg.context_tokens else None
        return [*blocks, list(parts[end : end + 2])], of_label

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, *, hidden_after: int | None = None
    ) -> Any:
        """Predict the noise in x, or what else the model was trained to return.

        Args:
            x: [B, C, H, W] noisy images in the model's dtype, or any under autocast.
            t: [B] timesteps, as integers or float32, since bfloat16 rounds 999 to 1000.
            y: [B] int64 class labels; None for no label (the null row where the model has one). A
                model without class conditioning ignores them, as the published toy does.
            hidden_after: a number of blocks, from 1 to n_layers, after which the hidden state is
                returned too.

        Returns:
            [B, C, H, W]; [B, 2C, H, W] with learn_sigma. With `hidden_after` a tuple of that and
            the hidden state of the patches, [B, N, D].

        Raises:
            ValueError: a shape or a dtype is wrong, or a label is out of range on a CPU. On an
                accelerator check labels before they go there, since a wrong one leaves the device
                unusable (see `label_conditioning`).
        """
        self._check_inputs(x, t, y)
        if hidden_after is not None and hidden_after not in range(1, self.cfg.n_layers + 1):
            expected = f"from 1 to n_layers={self.cfg.n_layers}"
            raise ValueError(f"hidden_after: expected {expected}, got {hidden_after!r}")
        p, grid = self.cfg.patch_size, self.cfg.grid
        tokens, modulation = functional.patchify(x, p), self.modulation(t, y)
        out, hidden = self._denoise(tokens, modulation, hidden_after)
        image = functional.unpatchify(out, p, grid)
        return image if hidden_after is None else (image, hidden)

    def _check_inputs(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        """Check shapes and dtypes: reading values would cost a device sync, and would not trace."""
        B = x.shape[0] if x.dim() else 0
        C, H, W = self.cfg.sample_shape
        if x.shape != (B, C, H, W):
            raise ValueError(f"x: expected shape [B, {C}, {H}, {W}], got {list(x.shape)}")
        if list(t.shape) != [B]:
            raise ValueError(f"t: expected shape [{B}], one timestep an image, got {list(t.shape)}")
        if y is not None and list(y.shape) != [B]:
            raise ValueError(f"y: expected shape [{B}], one label an image, got {list(y.shape)}")
        if t.dtype == torch.bfloat16:
            raise ValueError(
                "t: expected integers or float32, got torch.bfloat16, which rounds 999 to 1000"
            )
        own = self.patch_embed.proj.weight.dtype
        if x.dtype != own and not _is_autocast(x.device.type):
            raise ValueError(
                f"x: expected {own}, as the model's weights are, got {x.dtype}; pass x.to({own}), "
                "convert the model, or run it under torch.autocast"
            )


def config_of(model: nn.Module) -> DiTConfig | None:
    """Return the config of a DiT, fastdit's or the reference's; None for other models."""
    return model.cfg if isinstance(model, DiT | reference.DiT) else None


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile's or a data-parallel wrapper."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrap(model.module)
    # By name: importing the class would import torch._dynamo, a second of start-up.
    if type(model).__name__ == "OptimizedModule":
        return unwrap(model.get_submodule("_orig_mod"))
    return model


def _is_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
