"""Files come back bit for bit, are replaced whole, and are refused with a clear error if bad."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import fastdit
from fastdit import PRESETS, DiffusionScheduler, DiTConfig
from fastdit.checkpoints import CheckpointInfo, inspect
from fastdit.checkpoints.native import write_tensors
from fastdit.model import unwrap
from fastdit.testing import randomize

SMALL = DiTConfig(hidden=32, n_layers=1, n_heads=2)


def header_with(diffusion=None, labels=None, **options):
    config = SMALL.to_dict() | options
    return json.dumps({"config": config, "diffusion": diffusion, "labels": labels})


def make_model(cfg=SMALL):
    model = fastdit.DiT.from_config(cfg)
    randomize(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "cfg",
    [SMALL, replace(PRESETS["DiT-S/8"], hidden=32, n_layers=1, n_heads=2)],
    ids=["toy", "published"],
)
def test_round_trip_is_bit_exact(tmp_path, cfg, dtype):
    model = make_model(cfg).to(dtype)
    fastdit.save(model, tmp_path / "m.safetensors")
    loaded = fastdit.load(tmp_path / "m.safetensors")
    assert loaded.cfg == cfg
    for (name, a), b in zip(
        model.named_parameters(), dict(loaded.named_parameters()).values(), strict=True
    ):
        assert a.dtype == b.dtype and torch.equal(a, b), name
        assert a.requires_grad == b.requires_grad, name
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_header_carries_schedule_and_labels(tmp_path):
    scheduler = DiffusionScheduler(50, schedule="cosine")
    names = [f"class {i}" for i in range(16)]
    fastdit.save(make_model(), tmp_path / "m.safetensors", scheduler, names)
    assert inspect(tmp_path / "m.safetensors") == CheckpointInfo(
        SMALL, scheduler.options, tuple(names)
    )


def test_every_class_must_have_a_label(tmp_path):
    with pytest.raises(ValueError, match="labels: expected 16 names, got ..a., .b.."):
        fastdit.save(make_model(), tmp_path / "m.safetensors", labels=["a", "b"])


def test_loading_draws_no_random_numbers(tmp_path):
    fastdit.save(make_model(), tmp_path / "m.safetensors")
    before = torch.get_rng_state()
    fastdit.load(tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_file_has_the_mode_of_any_new_file(tmp_path):
    fastdit.save(make_model(), tmp_path / "m.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leftover = tmp_path / f".m.safetensors.{dead.pid}-1.tmp"
    alive = tmp_path / f".m.safetensors.{os.getppid()}-1.tmp"
    for aside in (leftover, alive):
        aside.write_bytes(b"half a file")
    fastdit.save(make_model(), tmp_path / "m.safetensors")
    assert {p.name for p in tmp_path.iterdir()} == {"m.safetensors", alive.name}


SAVE_AGAIN_AND_AGAIN = """
import sys, fastdit
model = fastdit.load(sys.argv[1])
for p in model.parameters():
    p.data.fill_(float(sys.argv[2]))
for _ in range(60):
    fastdit.save(model, sys.argv[1])
"""


def test_two_writers_and_a_reader_never_see_half_a_file(tmp_path):
    path = tmp_path / "m.safetensors"
    fastdit.save(make_model(), path)
    command = [sys.executable, "-c", SAVE_AGAIN_AND_AGAIN, str(path)]
    writers = [subprocess.Popen([*command, value]) for value in ("1", "2")]
    loads = 0
    while any(w.poll() is None for w in writers):
        fastdit.load(path)
        loads += 1
    assert [w.returncode for w in writers] == [0, 0] and loads > 10
    assert fastdit.load(path).pos_embed.unique().item() in (1.0, 2.0)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "m").symlink_to(tmp_path / "there" / "m")
    fastdit.save(make_model(), tmp_path / "m")
    assert (tmp_path / "m").is_symlink() and (tmp_path / "there" / "m").is_file()


def test_a_loaded_model_outlives_its_file(tmp_path):
    path = tmp_path / "m.safetensors"
    fastdit.save(make_model(), path)
    model = fastdit.load(path)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with open(path, "r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model, files = make_model(), []
    for i in range(8):
        fastdit.save(model, tmp_path / str(i), DiffusionScheduler(5, schedule="cosine"))
        files.append((tmp_path / str(i)).read_bytes())
    assert len(set(files)) == 1


def test_what_load_would_refuse_is_not_saved(tmp_path):
    model = make_model()
    model.extra = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="unexpected extra.weight, extra.bias"):
        fastdit.save(model, tmp_path / "m")
    model = make_model(DiTConfig(hidden=32, n_layers=2, n_heads=2))
    model.blocks[1].mlp = model.blocks[0].mlp
    with pytest.raises(ValueError, match="expected tensors with memory of their own"):
        fastdit.save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_module_that_contains_a_dit_is_not_unwrapped():
    class Latent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = make_model()

    latent, model = Latent(), make_model()
    assert unwrap(latent) is latent
    assert unwrap(torch.nn.DataParallel(torch.compile(model))) is model


def test_a_compiled_model_saves_under_its_own_keys(tmp_path):
    model = make_model()
    fastdit.save(torch.compile(model), tmp_path / "m.safetensors")
    assert fastdit.load(tmp_path / "m.safetensors").state_dict().keys() == model.state_dict().keys()
    with pytest.raises(
        ValueError, match="model: expected a fastdit.DiT, PixArt or MMDiT, got Linear"
    ):
        fastdit.save(torch.nn.Linear(1, 1), tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "expected JSON in the fastdit header"),
        ("[]", "expected a JSON object as the fastdit header"),
        ("{}", "expected a config in the fastdit header"),
        ('{"recipe": {}, "config": {}}', "DiTConfig: expected every option"),
        ('{"config": {"hidden": 3}}', "DiTConfig: expected every option, img_size"),
        ('{"config": 5}', "DiTConfig: expected a dict of options, got 5"),
        ("[" * 100_000, "expected JSON in the fastdit header"),
        (header_with(diffusion={"q": 1}), "expected a diffusion of T and schedule"),
        (header_with(labels=5), "labels: expected 16 names, got 5"),
        (header_with(labels=list(range(16))), "labels: expected 16 names, got [0, 1"),
        (header_with(hidden=10**12, n_heads=1), "a model of this config cannot be built"),
        (header_with(hidden=10**30, n_heads=1), "a model of this config cannot be built"),
    ],
)
def test_a_broken_header_is_one_clear_error(tmp_path, header, message):
    save_file({"a": torch.zeros(1)}, tmp_path / "m", metadata={"fastdit": header})
    with pytest.raises(ValueError) as error:
        fastdit.load(tmp_path / "m")
    assert message in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors: no such file"):
        fastdit.load(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999], ids="keep-{}".format)
def test_truncated_files_are_one_clear_error(tmp_path, keep):
    path = tmp_path / "m.safetensors"
    fastdit.save(make_model(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if keep > 1 or keep == 0 else int(keep * len(whole))])
    with pytest.raises(ValueError, match="expected a whole safetensors file.*truncated"):
        fastdit.load(path)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.pt").write_bytes(pickle.dumps(Hostile()))
    torch.save({"model": Hostile()}, tmp_path / "zipped.pt")
    for name in ("m.pt", "zipped.pt"):
        with pytest.raises(ValueError, match="holds more than tensors.*is.*not run") as error:
            fastdit.load(tmp_path / name)
        assert "weights_only" not in str(error.value)  # PyTorch advises to run the file
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["patch_embed.proj.weight"], "tensors that tell the config are missing: pos_embed"),
        (["transformer_blocks.0.norm1.linear.weight"], "look like those of diffusers"),
        (["encoder.weight"], r"the keys \(encoder.weight\) are not of a known layout"),
    ],
)
def test_a_foreign_file_is_recognised_by_its_keys(tmp_path, keys, message):
    save_file({key: torch.zeros(2) for key in keys}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=f"m.safetensors: .*{message}"):
        fastdit.load(tmp_path / "m.safetensors")


def test_keys_that_do_not_fit_are_listed(tmp_path):
    state = dict(make_model().state_dict())
    state["extra.weight"] = state.pop("final_mod.bias")
    state["pos_embed"] = torch.zeros(1, 4, 32)
    write_tensors(tmp_path / "m.safetensors", state, {"config": SMALL.to_dict()})
    with pytest.raises(ValueError) as error:
        fastdit.load(tmp_path / "m.safetensors")
    for part in (
        "missing final_mod.bias",
        "unexpected extra.weight",
        "pos_embed: expected shape [1, 16, 32], got [1, 4, 32]",
    ):
        assert part in str(error.value)


def test_weights_of_an_integer_dtype_are_refused(tmp_path):
    state = dict(make_model().state_dict()) | {"pos_embed": torch.zeros(1, 16, 32).int()}
    write_tensors(tmp_path / "m", state, {"config": SMALL.to_dict()})
    with pytest.raises(ValueError, match="expected float weights, but pos_embed is torch.int32"):
        fastdit.load(tmp_path / "m")


WRITE_UNDER_A_LIMIT = """
import resource, sys, fastdit
path, limit = sys.argv[1], int(sys.argv[2])
model = fastdit.load(path)
for p in model.parameters():
    p.data.zero_()
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
try:
    fastdit.save(model, path)
except OSError as error:
    print(error)
"""


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path):
    """A limit on file sizes stands in for a full disk: the write fails half way."""
    path = tmp_path / "m.safetensors"
    fastdit.save(make_model(), path)
    before = path.read_bytes()
    command = [sys.executable, "-c", WRITE_UNDER_A_LIMIT, str(path), str(len(before) // 2)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not written" in done.stdout and "an older file is as it was" in done.stdout
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
