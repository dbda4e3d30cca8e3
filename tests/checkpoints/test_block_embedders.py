"""A DiT trained from scratch in diffusers, each of whose blocks has embedders of its own."""

import copy

import pytest
import torch
from typer.testing import CliRunner

import fastdit
from fastdit.cli.app import app
from fastdit.pipeline import PipelineTransformer
from fastdit.testing import relative_error

# tests/sampling holds "compile", which takes long, to the oracle.
EXECUTIONS = ["eager", "trajectory", pytest.param("graph", marks=pytest.mark.gpu)]


@torch.no_grad()
def test_the_network_of_diffusers_is_reproduced(from_scratch):
    model = fastdit.load(from_scratch)
    assert model.cfg.embedders == "block"
    x, t, y = torch.randn(5, 4, 8, 8), torch.randint(1000, (5,)), torch.randint(1001, (5,))
    expected = from_scratch(x, timestep=t, class_labels=y).sample
    assert relative_error(model(x, t, y), expected) < 1e-5
    null = from_scratch(x, timestep=t, class_labels=torch.full_like(y, 1000)).sample
    assert relative_error(model(x, t, None), null) < 1e-5
    shared = copy.deepcopy(from_scratch)
    for block in shared.transformer_blocks:
        block.norm1.emb = shared.transformer_blocks[0].norm1.emb
    assert relative_error(fastdit.load(shared)(x, t, y), expected) > 1e-3


def test_a_round_trip_keeps_every_bit(from_scratch, tmp_path):
    from diffusers import DiTTransformer2DModel

    model = fastdit.load(from_scratch)
    fastdit.save(model, tmp_path / "model.safetensors")
    fastdit.save(
        fastdit.load(tmp_path / "model.safetensors"), tmp_path / "folder", layout="diffusers"
    )
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "folder").state_dict()
    assert theirs.keys() == from_scratch.state_dict().keys()
    assert all(torch.equal(theirs[name], t) for name, t in from_scratch.state_dict().items())
    again = fastdit.load(tmp_path / "folder")
    assert again.cfg == model.cfg
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_one_block_that_differs_is_enough(transformer):
    """Embedders are shared only if every tensor of theirs is."""
    assert fastdit.load(transformer).cfg.embedders == "shared"
    for part in ("timestep_embedder.linear_2.bias", "class_embedder.embedding_table.weight"):
        changed = copy.deepcopy(transformer)
        with torch.no_grad():
            changed.get_parameter(f"transformer_blocks.1.norm1.emb.{part}")[-1].add_(1)
        model = fastdit.load(changed)
        assert model.cfg.embedders == "block"
        first, second = (block.t_embed[0].weight for block in model.blocks)
        assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


def test_a_block_without_an_embedder_is_an_error(from_scratch):
    tensors = from_scratch.state_dict()
    del tensors["transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"]

    class Broken(torch.nn.Module):
        config = from_scratch.config

        def state_dict(self):
            return tensors

    with pytest.raises(ValueError, match=r"missing blocks\.2\.t_embed\.0\.bias"):
        fastdit.load(Broken())


def test_facebooks_layout_cannot_hold_it(from_scratch, tmp_path):
    with pytest.raises(ValueError, match="layout: that of facebookresearch/DiT has no embedders="):
        fastdit.save(fastdit.load(from_scratch), tmp_path / "m.pt", layout="facebookresearch/DiT")


def test_info_counts_every_embedder(from_scratch, tmp_path):
    from_scratch.save_pretrained(tmp_path)
    said = CliRunner().invoke(app, ["info", str(tmp_path)]).stdout
    parameters = fastdit.load(from_scratch).state_dict().values()
    assert "embedders        block" in said
    assert f"parameters       {sum(p.numel() for p in parameters):,}" in said


def make_pipeline(transformer, vae, scheduler):
    from diffusers import DiTPipeline

    pipe = DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def decoded(vae, latents):
    return (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def test_a_pipeline_of_diffusers_gives_the_same_images(from_scratch, vae):
    from diffusers import DDIMScheduler

    pipe = make_pipeline(from_scratch, vae, DDIMScheduler())

    def images():
        return pipe(
            [7, 207], generator=torch.manual_seed(5), num_inference_steps=3, output_type="pt"
        ).images

    expected = images()
    pipe.transformer = PipelineTransformer(fastdit.load(from_scratch))
    assert relative_error(images(), expected) < 1e-5


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0], ids=["plain", "guided"])
@torch.no_grad()
def test_a_sampler_gives_the_images_of_diffusers_ddim(from_scratch, vae, guidance_scale, execution):
    from diffusers import DDIMScheduler

    device = "cuda" if execution == "graph" else "cpu"
    pipe = make_pipeline(from_scratch, vae, DDIMScheduler(clip_sample=False))
    expected = pipe(
        [7, 207],
        guidance_scale=guidance_scale,
        generator=torch.manual_seed(5),
        num_inference_steps=10,
        output_type="pt",
    ).images
    sampler = fastdit.Sampler(
        fastdit.load(from_scratch).to(device),
        fastdit.DiffusionScheduler(1000),
        "ddim",
        steps=10,
        guidance=fastdit.Guidance(guidance_scale) if guidance_scale > 1 else None,
        execution=execution,
    )
    x_T = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(5))
    assert relative_error(decoded(vae, sampler([7, 207], x_T=x_T).cpu()), expected) < 1e-5


@pytest.mark.parametrize("execution", EXECUTIONS)
@torch.no_grad()
def test_a_sampler_gives_the_images_of_diffusers_ddpm(
    from_scratch_without_variance, vae, execution
):
    """diffusers draws noise for the null rows too, from PyTorch's own generator."""
    from diffusers import DDPMScheduler

    model, steps = from_scratch_without_variance, 25
    scheduler = DDPMScheduler(steps, beta_start=0.004, beta_end=0.8, clip_sample=False)
    pipe = make_pipeline(model, vae, scheduler)
    torch.manual_seed(9)
    expected = pipe(
        [7, 207],
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=steps,
        output_type="pt",
    ).images
    torch.manual_seed(9)
    drawn = [torch.randn(4, 4, 8, 8)[:2] for _ in range(steps - 1)]
    noise = torch.stack([*drawn, torch.zeros(2, 4, 8, 8)])
    device = "cuda" if execution == "graph" else "cpu"
    sampler = fastdit.Sampler(
        fastdit.load(model).to(device),
        fastdit.DiffusionScheduler(steps, schedule="linear-scaled"),
        guidance=fastdit.Guidance(3.0),
        execution=execution,
    )
    x_T = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(5))
    images = decoded(vae, sampler([7, 207], x_T=x_T, noise=noise).cpu())
    assert relative_error(images, expected) < 1e-5
