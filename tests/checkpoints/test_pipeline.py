"""A PipelineTransformer is at home in a pipeline of diffusers."""

import copy
import inspect
import io
import json
import pickle
import warnings

import pytest
import torch

import fastdit
from fastdit.pipeline import DiTTransformer, PipelineTransformer
from fastdit.testing import randomize, relative_error

FEW = 10  # classes


def make_pipeline(transformer, vae):
    from diffusers import DDIMScheduler, DiTPipeline

    pipe = DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, labels=(1, 2), guidance_scale=4.0):
    return pipe(
        class_labels=list(labels),
        guidance_scale=guidance_scale,
        generator=torch.manual_seed(5),
        num_inference_steps=2,
        output_type="pt",
    ).images


@pytest.fixture
def exchanged(transformer, vae):
    """A pipeline whose transformer was exchanged."""
    pipe = make_pipeline(transformer, vae)
    pipe.transformer = PipelineTransformer(fastdit.load(pipe.transformer))
    return pipe


def small_model(null_class=True):
    model = fastdit.DiT(
        img_size=8,
        in_channels=4,
        hidden=16,
        n_layers=1,
        n_heads=2,
        num_classes=FEW,
        null_class=null_class,
    )
    randomize(model)
    return model


@pytest.mark.parametrize(
    "options",
    [{}, dict(variant="fp16"), dict(max_shard_size=40_000), dict(safe_serialization=False)],
    ids=["plain", "variant", "shards", "bin"],
)
def test_a_pipeline_is_saved_in_diffusers_own_layout(transformer, exchanged, tmp_path, options):
    from diffusers import DiTPipeline

    exchanged.save_pretrained(tmp_path / "ours", **options)
    make_pipeline(transformer, exchanged.vae).save_pretrained(tmp_path / "theirs", **options)
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    assert index == json.loads((tmp_path / "theirs" / "model_index.json").read_text())
    config, theirs = (
        json.loads((tmp_path / name / "transformer" / "config.json").read_text())
        for name in ("ours", "theirs")
    )
    assert {k: v for k, v in config.items() if k[0] != "_"} == {
        k: v for k, v in theirs.items() if k[0] != "_"
    }
    folders = [sorted((tmp_path / name / "transformer").iterdir()) for name in ("ours", "theirs")]
    assert [f.name for f in folders[0]] == [f.name for f in folders[1]]

    again = DiTPipeline.from_pretrained(
        tmp_path / "ours", variant=options.get("variant"), low_cpu_mem_usage=False
    )
    assert type(again.transformer) is type(transformer)
    for name, t in transformer.state_dict().items():
        assert torch.equal(again.transformer.state_dict()[name], t), name


def test_a_pipeline_can_be_built_with_it(transformer, exchanged, tmp_path, caplog):
    from diffusers import DDPMScheduler, DiTPipeline

    own = exchanged.transformer
    make_pipeline(transformer, exchanged.vae).save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path, transformer=own, low_cpu_mem_usage=False)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.transformer is own and isinstance(own, PipelineTransformer)
    assert torch.equal(images(loaded), images(exchanged))
    assert exchanged.components.keys() == {"transformer", "vae", "scheduler"}
    assert exchanged.components["transformer"] is own
    other = DiTPipeline(**exchanged.components | {"scheduler": DDPMScheduler()})
    assert other.transformer is own
    assert not [record for record in caplog.records if record.levelname != "INFO"]


def test_a_model_that_diffusers_cannot_express_samples_but_is_not_saved(vae, tmp_path):
    pipe = make_pipeline(PipelineTransformer(small_model()), vae)
    assert pipe.transformer.config.num_embeds_ada_norm == FEW
    with pytest.raises(ValueError, match="diffusers can store such a DiT only as"):
        pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "transformer").exists()


def test_a_pipeline_moves_it(exchanged):
    before = images(exchanged)
    exchanged.to(torch.float64)
    assert exchanged.transformer.dtype == torch.float64
    assert exchanged.transformer.model.final_linear.weight.dtype == torch.float64
    wide = images(exchanged)
    assert wide.dtype == torch.float64 and wide.shape == before.shape
    exchanged.to("cpu", torch.float32)
    assert torch.equal(images(exchanged), before)
    assert exchanged.transformer.to("meta").device.type == "meta"


def test_copies_and_pickles_work(exchanged):
    own = exchanged.transformer
    for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert type(other) is type(own) and dict(other.config) == dict(own.config)
        exchanged.transformer = own
        expected = images(exchanged)
        exchanged.transformer = other
        assert torch.equal(images(exchanged), expected)
        assert other.model.final_linear.weight is not own.model.final_linear.weight
    file = io.BytesIO()
    torch.save(own.state_dict(), file)
    assert not own.load_state_dict(other.state_dict()).missing_keys


def test_a_pipelines_null_label_is_the_models(vae):
    model = small_model()
    pipe = make_pipeline(PipelineTransformer(model), vae)
    message = "label 1000 is taken for the null label, 10, since the model has 10 classes"
    with pytest.warns(UserWarning, match=message) as seen:
        guided = images(pipe)
    assert len(seen) == 1 and seen[0].filename != inspect.getfile(DiTTransformer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(images(pipe), guided)  # warned once
        x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 3])
        own = pipe.transformer(x, t, torch.tensor([1, 1000])).sample
        assert torch.equal(own, model(x, t, torch.tensor([1, FEW])))
        assert relative_error(own[1:], model(x[1:], t[1:], None)) < 1e-5
        plain = images(pipe, guidance_scale=1.0)
    assert relative_error(plain, guided) > 1e-3


def test_labels_that_a_model_does_not_have_are_an_error(vae):
    pipe = make_pipeline(PipelineTransformer(small_model(null_class=False)), vae)
    with pytest.raises(ValueError, match=r"class_labels: expected labels in \[0, 10\), got 1 to"):
        images(pipe)
    assert images(pipe, guidance_scale=1.0).isfinite().all()
    guided = make_pipeline(PipelineTransformer(small_model()), vae)
    with pytest.raises(ValueError, match=r"expected labels in \[0, 11\), got -1 to 1000$"):
        images(guided, labels=[-1])


@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one"])
def test_one_timestep_serves_the_batch_and_the_output_is_read_as_in_diffusers(shape):
    own = PipelineTransformer(small_model())
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    out = own(x, torch.full(shape, 7), y)
    assert torch.equal(out.sample, own.model(x, torch.tensor([7, 7]), y))
    assert out["sample"] is out[0] is out.sample and out[-1] is out.sample
    with pytest.raises(KeyError):
        out["logvar"]
    assert own.config.get("num_layers") == own.config["num_layers"] == 1


def test_a_compiled_transformer_needs_no_labels_on_the_host(vae):
    torch._dynamo.reset()
    own = PipelineTransformer(small_model())
    compiled = torch.compile(own, backend="eager", fullgraph=True)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 3]), torch.tensor([1, 1000])
    assert torch.equal(compiled(x, t, y).sample, own.model(x, t, y.clamp(max=FEW)))


def test_without_diffusers_it_says_what_it_needs(monkeypatch):
    import sys

    from fastdit.pipeline import base

    base._named_as_theirs.cache_clear()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="PipelineTransformer: needs the package diffusers; pip"):
        PipelineTransformer(small_model())
