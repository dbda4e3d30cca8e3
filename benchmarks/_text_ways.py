"""The ways to sample a text-to-image model that `text_throughput.py` times."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

BASELINE, COMPILED = "diffusers eager", "diffusers compiled"
EAGER, COMPILE = "fastdit eager", "fastdit compile"
WAYS = (BASELINE, COMPILED, EAGER, COMPILE)
ORACLE = "diffusers in float64"
HEAD_DIM, TEXT_WIDTH, POOLED_WIDTH, PATCH = 64, 4096, 2048, 2


class Preset(NamedTuple):
    """A kind of model, of which the benchmark chooses the width and depth."""

    channels: int
    text_tokens: int
    guidance: float  # the default of diffusers' pipeline


PRESETS = {"PixArt": Preset(4, 120, 4.5), "SD3": Preset(16, 154, 7.0)}


@dataclass(frozen=True)
class Case:
    """A model of a preset's kind, in a folder, and how it is sampled."""

    preset: str
    folder: str
    hidden: int
    layers: int
    size: int  # of the latents, a side
    steps: int
    threads: int

    def make_model(self) -> Any:
        """Return diffusers' model with random weights, none of them zero."""
        import diffusers

        from fastdit.testing import randomize

        own = PRESETS[self.preset]
        options: dict[str, Any] = dict(
            num_attention_heads=self.hidden // HEAD_DIM,
            attention_head_dim=HEAD_DIM,
            in_channels=own.channels,
            num_layers=self.layers,
            sample_size=self.size,
            patch_size=PATCH,
        )
        if self.preset == "PixArt":
            options |= dict(out_channels=2 * own.channels, cross_attention_dim=self.hidden)
            options |= dict(caption_channels=TEXT_WIDTH, use_additional_conditions=False)
            model = diffusers.PixArtTransformer2DModel(**options)
        else:
            options |= dict(out_channels=own.channels, joint_attention_dim=TEXT_WIDTH)
            options |= dict(caption_projection_dim=self.hidden)
            options |= dict(pooled_projection_dim=POOLED_WIDTH, pos_embed_max_size=self.size)
            model = diffusers.SD3Transformer2DModel(**options)
        with torch.no_grad():
            randomize(model)
        return model

    def given(self, labels: Tensor) -> Given:
        """Return what every way samples from; an image's own depends on its label alone."""
        own = PRESETS[self.preset]

        def draw(seed: int, *shape: int) -> Tensor:
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

        def of_images(place: int, *shape: int) -> Tensor:
            return torch.stack([draw(4 * label + place, *shape) for label in labels.tolist()])

        return Given(
            of_images(1, own.channels, self.size, self.size),
            draw(0, 1, own.text_tokens, TEXT_WIDTH),
            of_images(2, own.text_tokens, TEXT_WIDTH),
            draw(4, 1, POOLED_WIDTH),
            of_images(3, POOLED_WIDTH),
        )


class Given(NamedTuple):
    """The first state, and embeddings of the images' prompts and of the negative one of them all.

    Prompts are as long as the model takes them, so that no way has less text than another.
    """

    x: Tensor  # [B, C, H, W]
    negative: Tensor  # [1, M, C]
    text: Tensor  # [B, M, C]
    negative_pooled: Tensor  # [1, P]
    pooled: Tensor  # [B, P]


Way = Callable[[Tensor, Any], Tensor]  # as `_rivals.Rival` calls it, with an image's label each


def make_way(name: str, case: Case) -> Way:
    """Import what a way needs, and return it; its first call loads the model."""
    torch.set_num_threads(case.threads)
    importlib.import_module("fastdit" if name in (EAGER, COMPILE) else "diffusers")
    make = functools.cache(functools.partial(_sampling, name, case))

    @torch.no_grad()
    def way(labels: Tensor, _: Any) -> Tensor:
        return make()(case.given(labels))

    return way


def _sampling(name: str, case: Case) -> Callable[[Given], Tensor]:
    if name in (EAGER, COMPILE):
        return _fastdit(case, name.removeprefix("fastdit "))
    return _diffusers(case, compiled=name == COMPILED, exact=name == ORACLE)


def _fastdit(case: Case, execution: str) -> Callable[[Given], Tensor]:
    """A sampler of the loaded file, which encodes the text once a call."""
    import fastdit
    from fastdit.flow import published_flow

    own = PRESETS[case.preset]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the most tokens of text, which no file tells
        model = fastdit.load(case.folder)
    if case.preset == "PixArt":
        process: Any = fastdit.DiffusionScheduler(1000, schedule="linear")
        solver: Any = fastdit.solvers.DPMSolverPP(last_timestep="stride")
    else:
        process = published_flow("SD3", 8 * case.size)
        solver = fastdit.solvers.Euler.from_diffusers(shift=3.0)
    guidance = fastdit.Guidance(own.guidance)
    sampler = fastdit.Sampler(
        model, process, solver, case.steps, guidance=guidance, execution=execution
    )

    def sample(given: Given) -> Tensor:
        prompts, negative = (
            fastdit.Prompts(embeds, pooled if case.preset == "SD3" else None)
            for embeds, pooled in (
                (given.text, given.pooled),
                (given.negative, given.negative_pooled),
            )
        )
        return sampler(prompt_embeds=prompts, negative_prompt_embeds=negative, x_T=given.x)

    return sample


def _diffusers(case: Case, compiled: bool, exact: bool) -> Callable[[Given], Tensor]:
    """The transformer and the scheduler of diffusers in the loop of its pipeline."""
    import diffusers

    own, dtype = PRESETS[case.preset], torch.float64 if exact else torch.float32
    pixart = case.preset == "PixArt"
    kind = diffusers.PixArtTransformer2DModel if pixart else diffusers.SD3Transformer2DModel
    model = kind.from_pretrained(case.folder, torch_dtype=dtype).eval()
    call: Any = torch.compile(model, dynamic=False) if compiled else model

    def sample(given: Given) -> Tensor:
        if pixart:  # as PixArt is published
            options = dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
            scheduler: Any = diffusers.DPMSolverMultistepScheduler(**options)
        else:
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(case.steps)
        x, batch = given.x.to(dtype), len(given.x)
        text = torch.cat([given.negative.expand(batch, -1, -1), given.text]).to(dtype)
        pooled = torch.cat([given.negative_pooled.expand(batch, -1), given.pooled]).to(dtype)
        conditions: dict[str, Any] = dict(encoder_hidden_states=text, return_dict=False)
        if pixart:  # its pipeline always hands over a mask
            conditions["encoder_attention_mask"] = torch.ones(text.shape[:2], dtype=torch.int64)
            conditions["added_cond_kwargs"] = dict(resolution=None, aspect_ratio=None)
        else:
            conditions["pooled_projections"] = pooled
        for t in scheduler.timesteps:
            both = torch.cat([x, x])
            out = call(both, timestep=t.expand(len(both)), **conditions)[0]
            negative, positive = out[:, : own.channels].chunk(2)
            out = negative + own.guidance * (positive - negative)
            x = scheduler.step(out, t, x, return_dict=False)[0]
        return x

    return sample
