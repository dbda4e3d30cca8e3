"""`fastdit train` on pictures: started, shown, sampled and resumed without an autoencoder."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import fastdit
from fastdit.data.pixels import PixelShards
from fastdit.train.run_folder import RunFolder
from fastdit.train.sources import Images, Latents


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    small = replace(fastdit.PRESETS["toy"], hidden=8, n_layers=1, n_heads=1)
    monkeypatch.setitem(fastdit.PRESETS, "toy", small)


@pytest.fixture
def train(run, pictures, tmp_path):
    brief = "--steps 2 --batch-size 4 --diffusion-steps 25 --schedule cosine --save-every 1"

    def call(*arguments, out="run", data=pictures, new=True):
        options = (*brief.split(), "--image-size", 8) if new else ()
        where = () if data is None else ("--data", data)
        return run("train", *where, *options, "--out", tmp_path / out, *arguments)

    return call


def test_a_folder_of_pictures_is_trained_on_shown_and_sampled_by_name(run, train, tmp_path):
    done = train("--sample-every", 1)
    assert done.exit_code == 0, done.output
    assert "data: 6 pictures of 2 classes, mirrored at random" in done.stderr
    info = fastdit.checkpoints.inspect(tmp_path / "run" / "model.safetensors")
    assert info.config.sample_shape == (3, 8, 8) and info.labels == ("cat", "dog")
    with Image.open(tmp_path / "run" / "samples" / "step-00000002.png") as grid:
        assert grid.size == ((4 * 9 - 1) * 6, (2 * 9 - 1) * 6), "four of each class, in rows"
    sampled = run(
        *("sample", tmp_path / "run" / "model.safetensors", "--labels", "dog", "--count", 1),
        *("--out", tmp_path / "s.png"),
    )
    assert sampled.exit_code == 0, sampled.output


def test_a_resumed_run_has_the_same_bits_with_and_without_its_pictures(train, tmp_path):
    done = train("--no-flip", out="a")
    assert done.exit_code == 0 and "2 classes, never mirrored" in done.stderr
    whole = (tmp_path / "a" / "model.safetensors").read_bytes()
    middle = tmp_path / "a" / "checkpoints" / "step-00000001.safetensors"
    for out, again in (("b", {}), ("c", {"data": None})):
        done = train("--resume", middle, out=out, new=False, **again)
        assert done.exit_code == 0 and "resuming at step 1 of 2" in done.stderr, done.output
        assert (tmp_path / out / "model.safetensors").read_bytes() == whole
    done = train(out="flipped")
    assert (tmp_path / "flipped" / "model.safetensors").read_bytes() != whole


def test_a_moved_run_finds_its_pixels(train, tmp_path):
    assert train("--cache", tmp_path / "pixels").exit_code == 0
    assert len(PixelShards(tmp_path / "pixels")) == 6 and not (tmp_path / "run" / "images").exists()
    done = train("--resume", "auto", data=None, new=False)
    assert done.exit_code == 0, done.output
    (tmp_path / "pixels").rename(tmp_path / "run" / "images")
    done = train("--resume", "auto", data=None, new=False)
    assert done.exit_code == 0, done.output
    (tmp_path / "run" / "images").rename(tmp_path / "elsewhere")
    done = train("--resume", "auto", data=None, new=False)
    assert done.exit_code == 1 and "expected pixels that `fastdit train` cached" in done.stderr
    done = train("--resume", "auto", data=tmp_path / "elsewhere", new=False)
    assert done.exit_code == 0, done.output
    done = train("--resume", "auto", new=False)
    assert done.exit_code == 0 and (tmp_path / "run" / "images").is_dir(), "made again"


def test_a_run_goes_on_with_more_pictures_if_that_is_said(train, pictures, draw, tmp_path):
    assert train().exit_code == 0
    draw(pictures / "cat" / "new.png", 20)
    longer = ("--resume", "auto", "--steps", 4)
    refused = train(*longer, new=False)
    assert refused.exit_code == 1 and "(1 added, 0 removed" in refused.stderr
    done = train(*longer, "--new-data", new=False)
    assert done.exit_code == 0 and "data: 7 pictures of 2 classes" in done.stderr, done.output
    (change,) = RunFolder(tmp_path / "run").newest().header["changes"]
    assert change["steps"] == [2, 4] and change["data"][0]["kind"] == "images"
    again = train(*longer, "--new-data", new=False)
    assert again.exit_code == 0 and "resuming at step 4 of 4" in again.stderr


def test_a_run_goes_on_with_its_own_pictures_alone(train, pictures, draw, tmp_path):
    assert train().exit_code == 0
    plan = (tmp_path / "run" / "images" / "plan.json").read_bytes()
    draw(pictures / "cat" / "new.png", 20)
    done = train("--resume", "auto")
    assert done.exit_code == 1 and "pictures have changed (1 added, 0 removed, 0" in done.stderr
    done = train()
    assert done.exit_code == 1 and "already holds a run" in done.stderr
    assert (tmp_path / "run" / "images" / "plan.json").read_bytes() == plan
    done = train("--resume", "auto", data=None, new=False)
    assert done.exit_code == 0, done.output
    done = train("--resume", "auto", data=tmp_path / "run" / "images", new=False)
    assert done.exit_code == 0, done.output
    (pictures / "cat" / "new.png").unlink()
    for changed, message in (
        (("--no-flip",), "data: the run was started on"),
        (("--image-size", 4), "--image-size: the run was started with 8, got 4"),
    ):
        done = train("--resume", "auto", *changed, new=False)
        assert done.exit_code == 1 and message in done.stderr, done.output


def test_broken_pictures_are_named_and_left_out_on_request(train, pictures, tmp_path):
    (pictures / "dog" / "bad.png").write_bytes(b"")
    done = train()
    assert done.exit_code == 1 and "dog/bad.png: expected an image" in done.stderr
    done = train("--skip-bad")
    assert done.exit_code == 0 and "warning: left out 1 picture of" in done.stderr
    assert "data: 6 pictures" in done.stderr


@pytest.mark.parametrize("recipe", ["sharp", "dit"])
def test_an_npz_file_trains_with_any_recipe(train, tmp_path, recipe):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "p.npz", arr_0=pixels, arr_1=np.array([0, 1, 0, 1, 2, 2]))
    changes = ("--diffusion-steps", 100, "--warmup", 1)
    done = train("--recipe", recipe, *changes, data=tmp_path / "p.npz")
    assert done.exit_code == 0, done.output
    source = Images(tmp_path / "run" / "images", flip=True)
    rows = torch.tensor([4, 10])
    batch = source.take(rows)
    assert np.allclose(batch.mean[0].permute(1, 2, 0).numpy(), pixels[4] / 127.5 - 1, atol=1e-6)
    assert torch.equal(batch.mean[1], batch.mean[0].flip(2)) and batch.labels.tolist() == [2, 2]
    assert batch.std is None and batch.mean.is_contiguous()
    header = RunFolder(tmp_path / "run").newest().header
    assert json.loads(json.dumps(source.identity)) == header["data"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--vae", "x"), "--vae: expected none, since the pictures of --data are pixels"),
        (("--per-class", 3), "--per-class: expected none beside --data"),
    ],
)
def test_options_that_pictures_do_not_have_are_refused(train, tmp_path, arguments, message):
    done = train(*arguments)
    assert done.exit_code == 1 and message in done.stderr


def test_pictures_and_latents_are_told_apart(run, train, pictures, latents, tmp_path):
    done = run("train", "--data", pictures, "--out", tmp_path / "run")
    assert done.exit_code == 1 and "--image-size: expected a side to which" in done.stderr
    done = train(data=latents[0])
    assert done.exit_code == 1 and "--image-size: expected none, since" in done.stderr
    done = run("train", "--data", latents[0], "--flip", "--out", tmp_path / "run")
    assert done.exit_code == 1 and "flip: expected none, since latents" in done.stderr
    assert train().exit_code == 0
    done = train("--image-size", 8, data=tmp_path / "run" / "images", out="other", new=False)
    assert done.exit_code == 1 and "--image-size: expected none, since" in done.stderr
    with pytest.raises(ValueError, match="expected the shards of `fastdit encode`, found pixels"):
        Latents(tmp_path / "run" / "images")


def test_pictures_of_another_shape_are_trained_on_and_sampled(run, train, tmp_path):
    done = train("--image-size", "8x16")
    assert done.exit_code == 0, done.output
    loaded = fastdit.load(tmp_path / "run")
    assert loaded.cfg.sample_shape == (3, 8, 16)
    again = train("--image-size", "8x16", "--resume", "auto", "--steps", 3, new=False)
    assert again.exit_code == 0 and "resuming at step 2 of 3" in again.stderr, again.output
    other = train("--image-size", "16x8", "--resume", "auto", "--steps", 4, new=False)
    assert "--image-size: the run was started with (8, 16), got (16, 8)" in other.stderr
    done = train("--image-size", "8x", out="none")
    assert done.exit_code == 1 and "--image-size: expected a size such as 32 or" in done.stderr
