"""Latents: decoding samples, encoding folders of images, and reading the shards."""

import json
import os
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fastdit
from fastdit import DiffusionScheduler
from fastdit.checkpoints.latent_stats import read_latent_stats
from fastdit.cli.app import app
from fastdit.data.images import to_pixels
from fastdit.data.latents import (
    LatentShards,
    LatentStats,
    centre_crop,
    decode,
    encode,
    encode_folder,
    load_vae,
)
from fastdit.testing import randomize


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    AutoencoderKL = pytest.importorskip("diffusers").AutoencoderKL
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.25,
    )
    folder = tmp_path_factory.mktemp("pipeline")
    vae.save_pretrained(folder / "vae")
    return folder


@torch.no_grad()
def test_decoding_in_slices_gives_the_autoencoders_images(vae_folder):
    vae, latents = load_vae(vae_folder / "vae"), torch.randn(5, 4, 8, 8)
    expected = vae.decode(latents / 0.25).sample
    seen = []
    decoder = vae.decode
    vae.decode = lambda z: seen.append(len(z)) or decoder(z)
    assert torch.allclose(decode(vae, latents, at_once=2), expected, atol=1e-5)
    assert seen == [2, 2, 1]


def test_a_shift_is_added_where_it_is_allowed_and_else_refused(vae_folder, tmp_path):
    """Stable Diffusion 3's latents are shifted; those of the published DiTs are not."""
    folder = tmp_path / "shifted"
    shutil.copytree(vae_folder / "vae", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"shift_factor": 0.5}))
    with pytest.raises(ValueError, match="its config has a shift_factor"):
        load_vae(folder)
    latents = torch.randn(2, 4, 8, 8)
    vae, plain = load_vae(folder, shifted=True), load_vae(vae_folder, shifted=True)
    moved = latents + 0.5 * plain.config.scaling_factor
    torch.testing.assert_close(decode(vae, latents), decode(plain, moved), rtol=0, atol=1e-5)
    assert (decode(vae, latents) - decode(plain, latents)).abs().max() > 1e-3
    assert torch.equal(decode(vae, latents, scale=1.0), decode(plain, latents, scale=1.0))


def test_what_cannot_be_decoded_is_named(vae_folder, tmp_path, monkeypatch):
    vae = load_vae(vae_folder)  # from a pipeline's folder
    with pytest.raises(ValueError, match=r"latents: expected shape \[B, 4, h, w\].*got \[1, 3, 8"):
        decode(vae, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="at_once: expected at least 1, got 0"):
        decode(vae, torch.zeros(1, 4, 8, 8), at_once=0)
    with pytest.raises(ValueError, match="vae: expected an AutoencoderKL in"):
        load_vae(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"vae: needs the package diffusers; pip install 'fastdit"):
        load_vae(vae_folder)


STATS = {"mean": torch.tensor([1.0, -2, 0.5, 0]), "std": torch.tensor([2.0, 1, 0.5, 3])}


def as_lightning(path):
    torch.save({name: t.view(1, 4, 1, 1) for name, t in STATS.items()}, path)


def as_safetensors(path):
    save_file(STATS, path)


@pytest.mark.parametrize("write", [as_lightning, as_safetensors])
def test_statistics_of_latents_are_read_and_undone(tmp_path, write):
    write(tmp_path / "latents_stats.pt")
    stats = read_latent_stats(tmp_path / "latents_stats.pt")
    assert stats == LatentStats((1.0, -2.0, 0.5, 0.0), (2.0, 1.0, 0.5, 3.0))
    own = torch.randn(2, 4, 3, 5)
    mean, std = (t.view(1, 4, 1, 1) for t in STATS.values())
    scaled = replace(stats, multiplier=0.5)
    assert torch.allclose(stats.undo((own - mean) / std), own, atol=1e-6)
    assert torch.allclose(scaled.undo((own - mean) / std * 0.5), own, atol=1e-6)
    with pytest.raises(ValueError, match=r"latents: expected shape \[B, 4, h, w\] .* got \[2, 3"):
        stats.undo(own[:, :3])


def test_a_multiplier_beside_the_statistics_is_read(tmp_path):
    torch.save(STATS | {"multiplier": 0.25}, tmp_path / "stats.pt")
    assert read_latent_stats(tmp_path / "stats.pt").multiplier == 0.25


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"mean": torch.zeros(4)},
            r"expected mean and std, as of latents_stats.pt, got \['mean'\]",
        ),
        (STATS["mean"], "expected mean and std, as of latents_stats.pt, got Tensor"),
        (
            STATS | {"std": torch.ones(3)},
            "std: expected as many numbers as of the mean, got 4 and 3",
        ),
        (STATS | {"std": torch.zeros(4)}, "std: expected positive numbers and multiplier, got 0"),
        (STATS | {"std": torch.ones(4, 4)}, r"std: expected one a channel, got \[4, 4\]"),
        (STATS | {"mean": torch.full((4,), torch.nan)}, "mean: expected finite numbers"),
        (STATS | {"mean": [0.0] * 4}, "mean: expected float values, got list"),
        (STATS | {"multiplier": torch.ones(2)}, "multiplier: expected one number, got 2"),
    ],
)
def test_other_files_than_statistics_are_one_clear_error(tmp_path, content, message):
    torch.save(content, tmp_path / "stats.pt")
    with pytest.raises(ValueError, match=f"stats.pt: {message}"):
        read_latent_stats(tmp_path / "stats.pt")


def test_the_command_line_undoes_the_statistics(vae_folder, tmp_path):
    """The autoencoder's own latents are written, or decoded without its scaling factor."""
    cfg = replace(fastdit.PRESETS["SiT-S/8"], img_size=8, hidden=16, n_layers=1, n_heads=2)
    model = fastdit.DiT.from_config(replace(cfg, num_classes=3))
    randomize(model)
    fastdit.save(model, tmp_path / "m", fastdit.FlowMatching())
    as_lightning(tmp_path / "stats.pt")
    out = tmp_path / "s.npz"
    command = ["sample", tmp_path / "m", "--labels", "1", "--steps", "2", "--out", out]
    command = [*map(str, command), "--latent-stats", str(tmp_path / "stats.pt")]
    latents = fastdit.Sampler(model, fastdit.FlowMatching(), steps=2)([1] * 4)
    expected = LatentStats((1.0, -2.0, 0.5, 0.0), (2.0, 1.0, 0.5, 3.0)).undo(latents)
    for many in ([], ["--num-images", "4"]):
        done = CliRunner().invoke(app, [*command, *many])
        assert done.exit_code == 0, done.output
        with np.load(out) as file:
            assert np.array_equal(file["latents"], expected.numpy())
    done = CliRunner().invoke(app, [*command, "--vae", str(vae_folder / "vae")])
    assert done.exit_code == 0, done.output
    images = decode(load_vae(vae_folder / "vae"), expected, scale=1.0)
    with np.load(out) as file:
        assert np.array_equal(file["arr_0"], to_pixels(images))
    torch.save({name: t[:3] for name, t in STATS.items()}, tmp_path / "stats.pt")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert "--latent-stats: they are of 3 channels, but the model makes 4" in done.stderr
    done = CliRunner().invoke(app, [*command[:-1], str(tmp_path / "none.pt")])
    assert done.exit_code == 1 and "none.pt: no such file" in done.stderr


@pytest.mark.parametrize("suffix", [".png", ".npz"])
def test_the_command_line_decodes(vae_folder, tmp_path, suffix):
    cfg = replace(
        fastdit.PRESETS["DiT-S/8"], img_size=16, hidden=32, n_layers=1, n_heads=2, num_classes=5
    )
    model = fastdit.DiT.from_config(cfg)
    randomize(model)
    scheduler = DiffusionScheduler(5, schedule="cosine")
    path, out = tmp_path / "m.safetensors", tmp_path / f"s{suffix}"
    fastdit.save(model, path, scheduler)
    chosen = ["--labels", "3,4", "--count", "1", "--seed", "2", "--out", str(out)]
    done = CliRunner().invoke(app, ["sample", str(path), *chosen, "--vae", str(vae_folder)])
    assert done.exit_code == 0, done.output
    latents = fastdit.Sampler(model, scheduler)([3, 4], seed=2)
    expected = to_pixels(decode(load_vae(vae_folder), latents))
    if suffix == ".npz":
        with np.load(out) as file:
            assert np.array_equal(file["arr_0"], expected)
    else:
        with Image.open(out) as grid:
            assert grid.size == (64, 130)  # two images of 32 pixels, twice their size, in a column
    done = CliRunner().invoke(app, ["sample", str(path), *chosen])
    assert done.exit_code == (1 if suffix == ".png" else 0)
    assert suffix == ".npz" or "expected --vae to decode them" in done.stderr


@pytest.fixture
def images(tmp_path):
    """Return a folder of seven images of several sizes and kinds, in three classes."""
    torch.manual_seed(0)
    for i, (name, size, mode) in enumerate(
        [
            ("cat/b.png", (40, 60), "RGB"),
            ("cat/a.jpg", (33, 16), "RGB"),
            ("dog/x.png", (16, 16), "L"),
            ("dog/deep/y.PNG", (130, 17), "RGB"),
            ("eel/1.png", (64, 64), "RGBA"),
            ("eel/2.png", (64, 65), "RGB"),
            ("eel/3.png", (20, 20), "P"),
        ]
    ):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).convert(mode).save(path)
    (tmp_path / "images" / "cat" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_a_centre_crop_is_the_published_one():
    """It halves by box averaging, resizes by the shorter side, and cuts out the middle."""
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None], (200, 100, 3))
    crop = centre_crop(Image.fromarray(ramp), 25)
    assert crop.shape == (25, 25, 3)
    # 200 x 100 becomes 50 x 25 by two halvings; each of the middle 25 rows averages 4 of the ramp.
    assert np.abs(crop[:, 0, 0].astype(float) - (4 * np.arange(12, 37) + 1.5)).max() <= 1
    same = np.random.default_rng(0).integers(0, 256, (25, 25, 3), dtype=np.uint8)
    assert np.array_equal(centre_crop(Image.fromarray(same), 25), same)


@pytest.mark.parametrize("size", [(30, 20), (10, 70)], ids=str)
def test_a_centre_crop_of_another_shape_is_the_largest_one(size):
    """On ramps along both sides its middle is the image's, and it spans one side whole."""
    rows, columns = np.mgrid[:120, :140].astype(np.uint8)
    image = Image.fromarray(np.stack([rows, columns, rows], axis=2))
    crop = centre_crop(image, size).astype(float)
    assert crop.shape == (*size, 3)
    scale = min(120 / size[0], 140 / size[1])
    for channel, axis, length in ((0, 0, 120), (1, 1, 140)):
        ramp = crop[:, :, channel].mean(1 - axis)
        step = (ramp[-1] - ramp[0]) / (size[axis] - 1)
        assert abs(step - scale) < 0.02 * scale and abs(ramp.mean() - (length - 1) / 2) < scale


def test_images_are_encoded_in_another_shape(vae_folder, images, tmp_path):
    vae = load_vae(vae_folder)
    for _ in range(2):  # the second call finds all of it done
        encode_folder(vae, images, tmp_path / "out", image_size=(16, 8), shard=3)
    shards = LatentShards(tmp_path / "out")
    assert shards[0][0].shape == (4, 8, 4) and shards.plan["image_size"] == [16, 8]
    with pytest.raises(ValueError, match=r"image_size: expected .*multiple of 2, got \(16, 7\)"):
        encode_folder(vae, images, tmp_path / "other", image_size=(16, 7))


@torch.no_grad()
def test_shards_hold_each_images_distribution(vae_folder, images, tmp_path):
    vae = load_vae(vae_folder)
    assert encode_folder(vae, images, tmp_path / "out", image_size=16, shard=3) == 7
    shards = LatentShards(tmp_path / "out")
    assert len(shards) == 7 and shards.classes == ["cat", "dog", "eel"]
    assert [label for _, _, label in shards] == [0, 0, 1, 1, 2, 2, 2]
    files = ["cat/a.jpg", "cat/b.png", "dog/deep/y.PNG", "dog/x.png"]
    for (mean, std, _), name in zip(shards, files, strict=False):
        with Image.open(images / name) as image:
            pixels = torch.from_numpy(centre_crop(image, 16).copy()).permute(2, 0, 1)[None]
        latent = vae.encode(pixels / 127.5 - 1).latent_dist
        assert torch.allclose(mean, latent.mean[0] * 0.25, atol=1e-5)
        assert torch.allclose(std, latent.std[0] * 0.25, atol=1e-5) and (std > 0).all()
    # The stored latents decode to images.
    back = decode(vae, shards[0][0][None])
    assert back.shape == (1, 3, 16, 16)
    with pytest.raises(IndexError, match=r"expected an index in \[0, 7\), got 7"):
        shards[7]


def test_flipped_images_are_encoded_beside_the_plain_ones(vae_folder, images, tmp_path):
    """The latent of a mirror image is not the mirror image of the latent."""
    vae = load_vae(vae_folder)
    encode_folder(vae, images, tmp_path / "plain", 16, shard=3)
    arguments = ["encode", str(images), "--vae", str(vae_folder), "--out", str(tmp_path / "both")]
    arguments += ["--image-size", "16", "--batch-size", "3", "--flip"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "7 images to" in done.stdout and "with flips" in done.stdout
    plain, both = LatentShards(tmp_path / "plain"), LatentShards(tmp_path / "both")
    assert (plain.variants, both.variants, len(both)) == (1, 2, 7)
    for i, name in enumerate(both.plan["files"]):
        with Image.open(images / name) as image:
            mirrored = torch.from_numpy(centre_crop(image, 16)[:, ::-1].copy()).permute(2, 0, 1)
        expected = encode(vae, mirrored[None] / 127.5 - 1)[0].numpy()
        assert np.allclose(both.row(7 + i), expected, atol=1e-5)
        assert np.array_equal(both.row(i), plain.row(i))
        assert not np.allclose(both.row(7 + i), plain.row(i)[:, :, ::-1], atol=1e-2)
        assert torch.equal(both[i][0], plain[i][0]) and both[i][2] == plain[i][2]
    with pytest.raises(IndexError, match=r"expected an index in \[0, 14\), got 14"):
        both.row(14)
    with pytest.raises(IndexError, match=r"expected an index in \[0, 7\), got 7"):
        both[7]


def test_encoding_resumes_and_refuses_other_images(vae_folder, images, tmp_path):
    out = tmp_path / "out"
    arguments = ["encode", str(images), "--vae", str(vae_folder), "--out", str(out)]
    arguments += ["--image-size", "16", "--batch-size", "3"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "wrote the latents of 7 images" in done.stdout
    assert "classes: cat, dog" in done.stdout
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("[!.]*")}
    (out / "00000001.npy").unlink()
    with pytest.raises(ValueError, match="00000001.npy is not there; run it again"):
        LatentShards(out)
    with pytest.raises(ValueError, match="expected the shards of `fastdit encode`, found none"):
        LatentShards(images)
    assert CliRunner().invoke(app, arguments).exit_code == 0
    after = {p.name: p.stat().st_mtime_ns for p in out.glob("[!.]*")}
    assert after.keys() == before.keys()
    assert [n for n in after if after[n] != before[n]] == ["00000001.npy"]

    (images / "dog" / "z.png").write_bytes(b"\x89PNG but torn")
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and "z.png: expected an image" in done.stderr
    done = CliRunner().invoke(app, [*arguments, "--skip-bad"])
    assert done.exit_code == 0 and "z.png: expected an image" in done.stderr
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("[!.]*")} == after
    (images / "dog" / "z.png").unlink()
    (images / "fox").mkdir()
    (images / ".cache").mkdir()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and "fox: expected images of a class, found none" in done.stderr


def test_encoding_refuses_what_would_spoil_it(vae_folder, images, tmp_path):
    vae = load_vae(vae_folder)
    out = tmp_path / "out"
    for source, into, size, message in (
        (tmp_path / "nowhere", out, 16, "no such folder"),
        (images, images / "latents", 16, "out: expected a folder that is not in"),
        (images, out, 17, "image_size: expected a multiple of 2, got 17"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_folder(vae, source, into, size)
    for name, image, message in (
        ("thin", Image.new("RGB", (1, 1000)), "expected sides of similar length, got 1 x 1000"),
        (
            "deep",
            Image.fromarray(np.zeros((9, 9), np.float32)),
            "expected 8 or 16 bits per channel",
        ),
    ):
        image.save(images / "cat" / f"{name}.tiff")
        with pytest.raises(ValueError, match=f"{name}.tiff: expected an image.*{message}"):
            encode_folder(vae, images, tmp_path / name, 16)
        (images / "cat" / f"{name}.tiff").unlink()
    # An autoencoder of the same name with other weights is another one.
    encode_folder(vae, images, out, 16, shard=3)
    with torch.no_grad():
        next(vae.parameters()).add_(1)
    with pytest.raises(ValueError, match="which differ in vae;"):
        encode_folder(vae, images, out, 16, shard=3)


def test_a_vae_with_other_weights_than_its_own_is_refused(vae_folder, tmp_path):
    """diffusers would use random weights instead, and only log a warning."""
    shutil.copytree(vae_folder / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({n: t for n, t in state.items() if not n.startswith("decoder.")}, path)
    with pytest.raises(ValueError, match=r"it has \d+ missing keys, such as decoder"):
        load_vae(tmp_path / "vae")


@pytest.mark.parametrize("name", ["sd-vae-ft-ema", "sd-vae-ft-mse", "some/other"])
def test_a_name_that_cannot_be_downloaded_is_an_error(tmp_path, monkeypatch, name):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    asked = name if "/" in name else f"stabilityai/{name}"
    message = f"vae: {asked} is not a folder and could not be downloaded .*; pass the folder of an"
    with pytest.raises(ValueError, match=message):
        load_vae(name)


def test_a_folder_may_have_the_name_of_a_published_autoencoder(vae_folder, tmp_path, monkeypatch):
    shutil.copytree(vae_folder / "vae", tmp_path / "sd-vae-ft-ema")
    monkeypatch.chdir(tmp_path)
    assert load_vae("sd-vae-ft-ema").config.scaling_factor == 0.25
    (tmp_path / "sd-vae-ft-ema" / "config.json").unlink()
    with pytest.raises(ValueError, match="vae: expected an AutoencoderKL in sd-vae-ft-ema"):
        load_vae("sd-vae-ft-ema")


def test_more_shards_than_files_may_be_open_are_read(vae_folder, images, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    encode_folder(load_vae(vae_folder), images, tmp_path / "out", 16, shard=1)
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    plan |= {"num": 700, "labels": plan["labels"] * 100}
    (tmp_path / "out" / "plan.json").write_text(json.dumps(plan))
    for i in range(7, 700):
        os.link(tmp_path / "out" / f"{i % 7:08d}.npy", tmp_path / "out" / f"{i:08d}.npy")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        shards = LatentShards(tmp_path / "out")
        assert all(torch.equal(shards[i][0], shards[i % 7][0]) for i in range(0, 700, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
