"""What diffusers writes to a folder is read: shards, variants, and a pipeline's scheduler."""

import json

import pytest
import torch
from typer.testing import CliRunner

import fastdit
from fastdit.checkpoints import inspect
from fastdit.checkpoints.folders import read_folder, weight_files
from fastdit.cli.app import app

SMALL = 40_000  # bytes; the tests' weights take some ten times as much


@pytest.fixture
def same(transformer):
    """A check that a folder's model has every bit of the transformer."""
    live = fastdit.load(transformer)

    def check(folder):
        read = fastdit.load(folder)
        assert read.cfg == live.cfg
        for name, t in live.state_dict().items():
            assert torch.equal(read.state_dict()[name], t), name

    return check


@pytest.mark.parametrize("variant", [None, "fp16"], ids=["plain", "variant"])
@pytest.mark.parametrize("size", ["1GB", SMALL], ids=["whole", "shards"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_shards_and_variants_are_read(transformer, same, tmp_path, safe, size, variant):
    folder = tmp_path / "transformer"
    transformer.save_pretrained(
        folder, max_shard_size=size, variant=variant, safe_serialization=safe
    )
    same(tmp_path)
    config, *weights = weight_files(tmp_path)
    assert config.name == "config.json" and (len(weights) > 2) == (size == SMALL)
    assert all(file.suffix == (".safetensors" if safe else ".bin") for file in weights)


def test_an_index_may_have_the_shorter_name(transformer, same, tmp_path):
    transformer.save_pretrained(tmp_path, max_shard_size=SMALL)
    for file in tmp_path.glob("diffusion_pytorch_model*"):
        text = "diffusion_pytorch_"
        if file.suffix == ".json":
            file.write_text(file.read_text().replace(text, ""))
        file.rename(file.with_name(file.name.removeprefix(text)))
    assert (tmp_path / "model.safetensors.index.json").is_file()
    same(tmp_path)


def test_weights_without_a_variant_are_preferred(transformer, same, tmp_path):
    transformer.save_pretrained(tmp_path)
    other = fastdit.load(transformer)
    with torch.no_grad():
        other.final_linear.bias.add_(1)
    fastdit.save(other, tmp_path / "other", layout="diffusers")
    name = "diffusion_pytorch_model{}.safetensors"
    for variant in (".fp16", ".non_ema"):
        changed = (tmp_path / "other" / name.format("")).read_bytes()
        (tmp_path / name.format(variant)).write_bytes(changed)
    same(tmp_path)
    (tmp_path / name.format("")).unlink()
    with pytest.raises(ValueError, match="expected weights of one variant, got fp16, non_ema; lea"):
        fastdit.load(tmp_path)
    (tmp_path / name.format(".non_ema")).unlink()
    assert torch.equal(fastdit.load(tmp_path).final_linear.bias, other.final_linear.bias)


def test_a_damaged_index_is_an_error(transformer, tmp_path):
    transformer.save_pretrained(tmp_path, max_shard_size=SMALL)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    whole = json.loads(index.read_text())
    name, file = next(iter(whole["weight_map"].items()))
    for by_name, message in (
        ({}, "expected a weight_map of tensors to files"),
        ([], "expected a weight_map"),
        ({name: f"../{file}"}, r"expected names of files beside it, got '\.\./diffusion"),
        ({name: str(tmp_path / file)}, "expected names of files beside it"),
        ({name: ".."}, "expected names of files beside it"),
        ({name: 3}, "expected names of files beside it, got 3"),
        ({name: file}, "says 2 blocks and .* but the tensors have 1 blocks"),
        (whole["weight_map"] | {"a": "b.safetensors"}, "1 of its .* files are missing: b.safete"),
    ):
        index.write_text(json.dumps({"weight_map": by_name}))
        with pytest.raises(ValueError, match=message):
            fastdit.load(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match="index.json: expected JSON"):
        fastdit.load(tmp_path)
    index.write_text(json.dumps(whole))
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=f"files are missing: {file}"):
        fastdit.load(tmp_path)


def test_a_tensor_in_two_shards_is_an_error(transformer, tmp_path):
    transformer.save_pretrained(tmp_path, max_shard_size=SMALL)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    whole = json.loads(index.read_text())["weight_map"]
    first = next(iter(whole.values()))
    (tmp_path / "again.safetensors").write_bytes((tmp_path / first).read_bytes())
    index.write_text(json.dumps({"weight_map": whole | {"a": "again.safetensors"}}))
    with pytest.raises(ValueError, match="expected other tensors than before it, got .* again"):
        fastdit.load(tmp_path)


def test_saving_over_shards_leaves_one_model(transformer, same, tmp_path):
    """Both projects would otherwise read old shards with the new config."""
    from diffusers import DiTTransformer2DModel

    transformer.save_pretrained(tmp_path, max_shard_size=SMALL)
    other = fastdit.load(transformer)
    with torch.no_grad():
        other.final_linear.bias.add_(1)
    fastdit.save(other, tmp_path, layout="diffusers")
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path).proj_out_2.bias
    assert torch.equal(theirs, other.final_linear.bias)
    assert read_folder(tmp_path)[1] == [tmp_path / "diffusion_pytorch_model.safetensors"]


def pipeline_folder(transformer, scheduler, tmp_path):
    transformer.save_pretrained(tmp_path / "transformer")
    scheduler.save_pretrained(tmp_path / "scheduler")
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_a_solver_of_diffusers_does_not_change_the_diffusion(transformer, tmp_path, name):
    import diffusers

    scheduler = getattr(diffusers, name)(beta_start=0.0001, beta_end=0.02)
    found = inspect(pipeline_folder(transformer, scheduler, tmp_path)).diffusion
    assert found == {"T": 1000, "schedule": "linear", "prediction": "epsilon"}


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(num_train_timesteps=200), dict(T=200)),
        (dict(prediction_type="v_prediction"), dict(prediction="v_prediction")),
        (dict(prediction_type="sample"), dict(prediction="sample")),
        (dict(beta_schedule="squaredcos_cap_v2"), dict(schedule="cosine")),
        (
            dict(num_train_timesteps=100, beta_start=0.001, beta_end=0.2),
            dict(T=100, schedule="linear-scaled"),
        ),
        (dict(num_train_timesteps=10), dict(T=10)),
    ],
    ids=["T", "v", "x0", "cosine", "scaled", "few"],
)
@pytest.mark.parametrize("trained", [False, True], ids=["named", "betas"])
def test_the_schedulers_diffusion_is_read(transformer, tmp_path, options, expected, trained):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**options)
    if trained:
        scheduler = DDIMScheduler(**options, trained_betas=scheduler.betas.tolist())
    found = inspect(pipeline_folder(transformer, scheduler, tmp_path)).diffusion
    assert found == {"T": 1000, "schedule": "linear", "prediction": "epsilon"} | expected
    ours = fastdit.DiffusionScheduler(**found).alpha_bars
    torch.testing.assert_close(ours, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
            r"expected linear betas 0\.0001 to 0\.02 .*got scaled_linear 0\.00085 to 0\.012",
        ),
        (dict(beta_end=0.03), r"got linear 0\.0001 to 0\.03"),
        (dict(beta_end="high"), r"got linear 0\.0001 to high"),
        (dict(beta_schedule="sigmoid"), "got sigmoid"),
        (dict(beta_schedule=None), "got DDIMScheduler without betas"),
        (dict(trained_betas=[0.5] * 1000), r"got trained_betas \[0\.5, 0\.5"),
        (dict(trained_betas=[0.5]), r"got trained_betas \[0\.5\]"),
        (dict(rescale_betas_zero_snr=True), "got linear .*, rescale_betas_zero_snr"),
        (dict(prediction_type="flow_prediction"), "expected prediction_type of epsilon, sample"),
        (dict(num_train_timesteps="many"), "expected num_train_timesteps from 1 to 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_diffusion_that_fastdit_does_not_have_is_an_error(
    transformer, tmp_path, changes, message
):
    from diffusers import DDIMScheduler

    folder = pipeline_folder(transformer, DDIMScheduler(), tmp_path)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=f"scheduler_config.json: .*{message}") as error:
        inspect(folder)
    if "betas" in message:
        assert "diffusion= (--diffusion) replaces it" in str(error.value)
    assert inspect(folder, diffusion={"T": 50}).diffusion["T"] == 50
    with pytest.warns(UserWarning, match=f"{message}.*the weights are loaded without it"):
        assert fastdit.load(folder).diffusion is None


def test_flow_matching_is_an_error(transformer, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = pipeline_folder(transformer, FlowMatchEulerDiscreteScheduler(), tmp_path)
    with pytest.raises(ValueError, match="got FlowMatchEulerDiscreteScheduler without betas"):
        inspect(folder)


def test_converting_a_pipeline_keeps_its_diffusion(transformer, tmp_path):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=200, prediction_type="v_prediction")
    folder, out = pipeline_folder(transformer, scheduler, tmp_path), tmp_path / "m.safetensors"
    done = CliRunner().invoke(app, ["convert", str(folder), str(out)])
    assert done.exit_code == 0, done.stderr
    expected = {"T": 200, "schedule": "linear", "prediction": "v_prediction"}
    assert inspect(out).diffusion == expected
