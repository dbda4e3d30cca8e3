"""`fastdit sample --prompt`: the pipelines' images, prompts in files, metadata, and errors."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdit
from fastdit.cli.prompts import read_prompts
from fastdit.data.images import read_metadata
from fastdit.functional import normal, unpatchify
from fastdit.text.encoders import TextEncoder

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """A folder with the tiny pipelines `pixart` and `sd3`."""
    path = Path(__file__).with_name("tiny_pipelines.py")
    spec = importlib.util.spec_from_file_location("tiny_pipelines", path)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    folder = tmp_path_factory.mktemp("pipelines")
    tiny.save_pixart(folder / "pixart")
    tiny.save_sd3(folder / "sd3")
    return folder


def arrays(run, *arguments):
    """What a call writes to its NPZ, which it ends with."""
    done = run("sample", *arguments)
    assert done.exit_code == 0, done.output
    with np.load(arguments[-1]) as archive:
        return archive["latents" if "latents" in archive.files else "arr_0"]


def noise_of(seeds, shape):
    """The noise of latents in patches of 2 x 2, in which the sampler's state is counted."""
    channels, height, width = shape
    rows = torch.tensor([(seed, 0) for seed in seeds])
    z = normal(rows, torch.zeros(1, dtype=torch.int64), channels * height * width)[0]
    return unpatchify(z.view(len(seeds), -1, 4 * channels), 2)


def test_the_images_of_sd3_are_its_pipelines(run, pipelines, tmp_path):
    """With the pipeline's own solver, shift, guidance and autoencoder, none of which is named."""
    from diffusers import StableDiffusion3Pipeline

    folder, out = pipelines / "sd3", tmp_path / "s.npz"
    chosen = ("--prompt", "a red fox", "--prompt", "two owls", "--steps", 4, "--seed", 5)
    latents = arrays(run, folder, *chosen, "--vae", "none", "--out", out)
    pixels = arrays(run, folder, *chosen, "--out", out)
    assert [image["seed"] for image in read_metadata(out)["images"]] == [5, 5]
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    start = noise_of([5, 5], (4, 8, 8))
    prompts = ["a red fox", "two owls"]
    options = dict(num_inference_steps=4, latents=start, height=16, width=16)
    theirs = pipe(prompts, output_type="latent", **options).images
    assert np.abs(latents - theirs.numpy()).max() < 1e-4 * theirs.abs().max()
    decoded = pipe(prompts, output_type="np", **options).images
    assert np.abs(pixels / 255 - decoded).max() < 1.5 / 255 + 1e-4


def test_the_images_of_pixart_are_its_pipelines(run, pipelines, tmp_path):
    """With the published solver, its timesteps and the guidance, none of which is named."""
    from diffusers import PixArtAlphaPipeline

    folder, out = pipelines / "pixart", tmp_path / "s.npz"
    chosen = ("--prompt", "a red fox", "--prompt", "two owls", "--seed", 5, "--vae", "none")
    latents = arrays(run, folder, *chosen, "--out", out)
    told = read_metadata(out)
    assert (told["steps"], told["last_timestep"]) == (20, "stride")
    pipe = PixArtAlphaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    options = dict(latents=noise_of([5, 5], (4, 8, 8)), height=16, width=16, output_type="latent")
    options |= dict(use_resolution_binning=False, clean_caption=False)
    theirs = pipe(["a red fox", "two owls"], **options).images
    assert np.abs(latents - theirs.numpy()).max() < 1e-4 * theirs.abs().max()
    named = ("--solver-options", "last_timestep=zero", "--out", out)
    other = arrays(run, folder, *chosen, *named)
    assert read_metadata(out)["last_timestep"] == "zero"
    assert np.abs(latents - other).max() > 1e-3 * np.abs(latents).max()


def test_a_prompt_is_the_same_image_alone_and_in_a_file(run, pipelines, tmp_path):
    folder = pipelines / "pixart"
    lines = ["a much longer text of an owl", "", "a red fox"]
    (tmp_path / "p.txt").write_text("\n".join(lines), encoding="utf-8")
    chosen = ("--steps", 3, "--count", 2, "--seed", 7, "--vae", "none", "--out")
    both = arrays(run, folder, "--prompts", tmp_path / "p.txt", *chosen, tmp_path / "b.npz")
    alone = arrays(run, folder, "--prompt", "a red fox", *chosen, tmp_path / "a.npz")
    assert both.shape == (4, 4, 8, 8) and len({image.tobytes() for image in both}) == 4
    assert np.abs(both[2:] - alone).max() < 1e-5 * np.abs(alone).max()
    named = ("--seeds", "8", "--steps", 3, "--vae", "none", "--out", tmp_path / "n.npz")
    again = arrays(run, folder, "--prompt", "a red fox", *named)
    assert np.abs(again[0] - alone[1]).max() < 1e-5 * np.abs(alone).max()


def test_a_grid_holds_prompts_seeds_and_settings(run, pipelines, tmp_path):
    lines = [{"prompt": "ein Füchslein"}, {"prompt": "an owl", "negative_prompt": "b", "seed": 9}]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "p.jsonl").write_text(text, encoding="utf-8")
    out = tmp_path / "s.png"
    size = ("--size", "8x16", "--steps", 2, "--guidance-scale", 2, "--clip", 3)
    done = run(
        "sample", pipelines / "pixart", "--prompts", tmp_path / "p.jsonl", *size, "--out", out
    )
    assert done.exit_code == 0, done.output
    told = read_metadata(out)
    assert told["images"] == [
        {"prompt": "ein Füchslein", "negative_prompt": "", "seed": 0},
        {"prompt": "an owl", "negative_prompt": "b", "seed": 9},
    ]
    assert (told["solver"], told["steps"], told["guidance_scale"]) == ("dpm++", 2, 2)
    assert told["clip"] == 3 and "solver_options" not in told
    assert told["size"] == [8, 16] and told["model"] == "PixArt"


def test_the_embeddings_are_those_of_the_pipeline(pipelines):
    from diffusers import PixArtAlphaPipeline

    folder = pipelines / "pixart"
    pipe = PixArtAlphaPipeline.from_pretrained(folder)
    cfg = fastdit.load(folder).cfg
    made = TextEncoder(folder, cfg).prompts(["A red fox", "owl"])
    with torch.no_grad():
        theirs, mask, *_ = pipe.encode_prompt(["A red fox", "owl"], False)
    assert made.lengths == mask.sum(1).tolist() and made.pooled is None
    for i, length in enumerate(made.lengths):
        torch.testing.assert_close(made.embeds[i, :length], theirs[i, :length])


def test_a_prompt_that_is_too_long_is_warned_of(pipelines):
    encoder = TextEncoder(pipelines / "pixart", fastdit.PixArtConfig(text_width=12, text_tokens=4))
    with pytest.warns(UserWarning, match="'abcdef' has 7 tokens, of which the model reads 4"):
        embeds, _ = encoder.encode("abcdef")
    assert embeds.shape == (4, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--prompt: expected a prompt, or a file of them by --prompts, got none"),
        (("--prompt", " "), "--prompt: expected words, got ' '"),
        (
            ("--prompt", "a", "--seed", -1),
            "--seed: expected a seed in [0, 2^63) for each image, go",
        ),
        (("--prompt", "a", "--seed", 2**63 - 1, "--count", 2), "image, got 9223372036854775808"),
        (("--prompt", "a", "--text-encoder", "other"), "got other, which is of a StableDiffusion3"),
        (("--prompt", "a", "--labels", "1"), "--labels: expected none, since the model is a PixAr"),
        (("--prompt", "a", "--num-images", 4, "--out", "s.npz"), "--num-images: expected none, si"),
        (("--prompt", "a", "--first-index", 4), "--first-index: expected none, since the model is"),
        (("--prompt", "a", "--size", "15x16"), "--size: expected (height, width), each a"),
        (("--prompt", "a", "--solver", "euler"), "--solver: expected one that takes a Diffusion"),
        (("--prompt", "a", "--execution", "grpah"), "did you mean 'graph'?"),
        (("--prompt", "a", "--text-dtype", "bf16"), "--text-dtype: expected one of float32, bfl"),
        (("--prompt", "a", "--text-encoder", "there"), "--text-encoder: expected a folder of a "),
        (("--prompt", "a", "--vae", "none"), "--vae: expected an autoencoder to decode a PNG by"),
        (("--prompts", "no.txt"), "--prompts: expected a text file in UTF-8, got no.txt"),
        (("--prompts", "bad.jsonl"), "bad.jsonl, line 2: expected one of prompt, negative_prompt"),
        (("--prompts", "seed.jsonl"), "seed.jsonl, line 1: expected an integer from 0 as seed"),
        (("--prompts", "empty.txt"), "--prompts: expected a prompt on each line, got none in emp"),
        (
            ("--prompt", "a", "--negative-prompt", "b", "--guidance-scale", 1),
            "--negative-prompt: expected guidance beside it, got --guidance-scale 1",
        ),
    ],
)
def test_bad_options_of_prompts_are_named(
    run, pipelines, arguments, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}')
    Path("seed.jsonl").write_text('{"prompt": "a", "seed": -1}')
    Path("empty.txt").write_text("\n \n")
    shutil.copytree(pipelines / "sd3", "other")
    done = run("sample", pipelines / "pixart", *arguments)
    assert done.exit_code == 1 and message in done.stderr, done.stderr
    assert "Traceback" not in done.output and not list(tmp_path.glob("s*.png"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "line 1: expected a JSON object"),
        ('{"prompt": "a", "seed": 9223372036854775808}', "seed, below 2^63, got 922337203685477"),
    ],
)
def test_a_hostile_line_is_named(line, message, tmp_path):
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_prompts(tmp_path / "p.jsonl")


def test_a_line_ends_where_a_file_of_json_says_so(tmp_path):
    """U+2028 may stand within a text of JSON, and within a prompt."""
    for name, text in (("p.jsonl", '{"prompt": "a\u2028b"}\r\n'), ("p.txt", "\ufeffa\u2028b\r\n")):
        (tmp_path / name).write_bytes(text.encode())
        assert read_prompts(tmp_path / name) == [("a\u2028b", None, None)]


def test_half_a_character_is_no_prompt(run, pipelines, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "\\ud83e"}')
    done = run("sample", pipelines / "pixart", "--prompts", tmp_path / "p.jsonl")
    assert done.exit_code and "--prompt: expected Unicode, got half a character" in done.output


@pytest.mark.parametrize(("kind", "part"), [("pixart", "tokenizer"), ("sd3", "tokenizer_3")])
def test_a_folder_without_a_tokenizer_is_refused(kind, part, pipelines, tmp_path):
    """transformers would make one that knows no words."""
    folder = shutil.copytree(pipelines / kind, tmp_path / kind)
    shutil.rmtree(folder / part)
    with pytest.raises(ValueError, match=f"text_encoder: expected a folder {part} in .*, got none"):
        TextEncoder(folder, fastdit.load(folder).cfg)


def test_an_infinite_shift_is_refused(run, pipelines, tmp_path):
    folder = shutil.copytree(pipelines / "sd3", tmp_path / "sd3")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shift": float("inf")}))
    done = run("sample", folder, "--prompt", "a")
    assert done.exit_code and "expected a positive shift, got inf" in done.output


def test_a_model_of_labels_refuses_prompts(run, checkpoint):
    for flag in ("--prompt", "--prompts", "--negative-prompt", "--size", "--text-encoder"):
        done = run("sample", checkpoint, flag, "8x8")
        assert done.exit_code == 1
        assert f"{flag}: expected none, since the model is a DiT, which takes" in done.stderr


def test_a_missing_package_names_the_extra(run, pipelines, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = run("sample", pipelines / "pixart", "--prompt", "a", "--vae", "none", "--out", "s.npz")
    assert done.exit_code == 1 and "pip install 'fastdit[text]'" in done.stderr


def test_a_transformer_alone_takes_text_encoders_and_autoencoder_from_a_folder(
    run, pipelines, tmp_path
):
    folder, model = pipelines / "pixart", tmp_path / "m.safetensors"
    loaded = fastdit.load(folder)
    fastdit.save(loaded, model, fastdit.DiffusionScheduler(**loaded.diffusion))
    chosen = ("--prompt", "a red fox", "--steps", 2, "--text-dtype", "float32", "--out")
    done = run("sample", model, *chosen, tmp_path / "s.png")
    assert done.exit_code == 1 and "--vae: expected an autoencoder to decode" in done.stderr
    done = run("sample", model, *chosen, tmp_path / "s.npz")
    assert done.exit_code == 1 and "--text-encoder: expected the folder of a pipel" in done.stderr
    beside = ("--text-encoder", folder, "--vae", folder)
    alone = arrays(run, model, *beside, *chosen, tmp_path / "s.npz")
    whole = arrays(run, folder, *chosen, tmp_path / "t.npz")
    assert np.array_equal(alone, whole)
    inside = folder / "transformer"  # of a pipeline, which has the rest
    assert np.array_equal(arrays(run, inside, *chosen, tmp_path / "i.npz"), whole)


def test_sd3_without_t5_is_encoded_by_clip_alone_and_says_so(pipelines, tmp_path):
    """As diffusers does it, with zeros in place of T5's tokens."""
    folder, cfg = tmp_path / "sd3", fastdit.load(pipelines / "sd3").cfg
    shutil.copytree(pipelines / "sd3", folder)
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / name)
    with pytest.warns(UserWarning, match="no text_encoder_3"):
        encoder = TextEncoder(folder, cfg)
    embeds, pooled = encoder.encode("a red fox")
    whole, _ = TextEncoder(pipelines / "sd3", cfg).encode("a red fox")
    torch.testing.assert_close(embeds[:77], whole[:77])
    assert not embeds[77:].any() and whole[77:].any() and pooled.shape == (16,)


def test_embeddings_that_are_not_finite_name_the_dtype(run, pipelines, monkeypatch, tmp_path):
    import diffusers

    def encode_prompt(self, *_, **__):
        return torch.full((1, 2, 12), torch.inf), torch.ones(1, 2), None, None

    monkeypatch.setattr(diffusers.PixArtAlphaPipeline, "encode_prompt", encode_prompt)
    done = run("sample", pipelines / "pixart", "--prompt", "a", "--out", tmp_path / "s.png")
    assert done.exit_code == 1 and "--text-dtype: in torch.float32 the embeddings" in done.stderr
