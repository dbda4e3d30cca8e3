"""Training on several processes gives the losses, weights and files of a single process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from fastdit.testing import relative_error
from fastdit.train.run_folder import RunFolder

BRIEF = (
    "--recipe sharp --schedule linear-scaled --diffusion-steps 25 --label-dropout 0.3 --warmup 2 "
    "--per-class 4 --batch-size 16 --steps 8 --log-every 1 --save-every 4"
).split()
STEP = "checkpoints/step-{:08d}.safetensors"


def command(processes, out, *arguments):
    launcher = [sys.executable, "-W", "ignore"]
    if processes > 1:
        launcher += "-m torch.distributed.run --standalone --nproc-per-node".split()
        launcher.append(str(processes))
    return [*launcher, "-m", "fastdit", "train", "--out", str(out), *map(str, arguments)]


def train(processes, out, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(processes, out, *arguments), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    train(1, out, *BRIEF)
    return out


@pytest.mark.parametrize(
    "options",
    [
        "--strategy ddp",
        "--strategy ddp --accumulate 2 --checkpointing --compile block",
        "--strategy fsdp --accumulate 2 --checkpointing --compile block",
    ],
    ids=["ddp", "ddp-everything", "fsdp-everything"],
)
def test_two_processes_have_the_losses_and_the_files_of_one(alone, tmp_path, options):
    done = train(2, tmp_path / "run", *BRIEF, *options.split())
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)
    assert len(losses(alone)) == 8
    ours, theirs = (load_file(run / STEP.format(8)) for run in (tmp_path / "run", alone))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].shape == theirs[name].shape
        if not theirs[name].any():
            assert not ours[name].any()
        else:  # looser than for losses, since second moments hold squares
            assert relative_error(ours[name], theirs[name]) < 1e-4, name
    assert done.stdout.count("wrote ") == 1, "one process speaks"
    assert (tmp_path / "run" / "samples" / "step-00000008.png").exists()


@pytest.mark.parametrize(
    ("before", "after"), [((2, "fsdp"), (1, "ddp")), ((1, "ddp"), (2, "fsdp"))], ids=str
)
def test_a_run_continues_on_another_number_of_processes(alone, tmp_path, before, after):
    out = tmp_path / "run"
    train(before[0], out, *BRIEF, "--strategy", before[1])
    (out / STEP.format(8)).unlink()
    done = train(after[0], out, "--resume", "auto", "--log-every", 1, "--strategy", after[1])
    assert "resuming at step 4 of 8" in done.stderr
    assert f"processes: the run was saved under {before[0]}" in done.stderr
    assert losses(out) == pytest.approx(losses(alone), rel=1e-5)


def test_bfloat16_shards_train_too(alone, tmp_path):
    train(2, tmp_path / "run", *BRIEF, *"--strategy fsdp --precision bfloat16".split())
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=0.02)
    assert losses(tmp_path / "run") != pytest.approx(losses(alone), rel=1e-5)
    tensors = load_file(tmp_path / "run" / STEP.format(8))
    assert {t.dtype for t in tensors.values()} == {torch.float32}


OTHER_BLOCKS = """
import os, torch, torch.distributed as dist, fastdit
from fastdit.testing import randomize
from fastdit.train.distributed import full_tensor, shard
dist.init_process_group("gloo")
own_embedders = dict(embedders="block")
shared_norms = dict(norm="rms", qk_norm="rms", rope=True, mlp="swiglu", context_tokens=2)
x, t = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(4)
for options in (own_embedders, shared_norms):
    alone, split = (
        fastdit.DiT(hidden=8, n_layers=2, n_heads=2, null_class=True, **options) for _ in range(2)
    )
    randomize(alone), randomize(split)
    shard(split, torch.device("cpu"))
    for y in (torch.tensor([0, 3, 16, 5]), None):
        for model in (alone, split):
            model(x, t, y).square().mean().backward()
    for (name, a), b in zip(alone.named_parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(full_tensor(b.grad), a.grad, rtol=1e-4, atol=1e-6)
dist.barrier()
os._exit(0)  # Gloo's threads abort an interpreter that ends now and then
"""


def test_blocks_whose_weights_others_use_can_be_split(tmp_path):
    """Embedders run before the blocks, and a block calls the norm that opens the next one."""
    (tmp_path / "script.py").write_text(OTHER_BLOCKS)
    launcher = "-W ignore -m torch.distributed.run --standalone --nproc-per-node 2".split()
    done = subprocess.run(
        [sys.executable, *launcher, str(tmp_path / "script.py")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


DIFFERENT = """
import os, sys
from fastdit.cli.app import app
os.makedirs(f"{sys.argv[1]}/{os.environ['RANK']}", exist_ok=True)
os.chdir(f"{sys.argv[1]}/{os.environ['RANK']}")
sys.argv = ["fastdit", "train", "--out", "run", "--resume", "auto", *sys.argv[2:]]
app()
"""


def test_processes_that_see_different_folders_are_refused(alone, tmp_path):
    """Two machines without a shared disk would be in this state."""
    shutil.copytree(alone, tmp_path / "0" / "run")
    (tmp_path / "0" / "run" / STEP.format(8)).unlink()
    (tmp_path / "different.py").write_text(DIFFERENT)
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    done = subprocess.run(
        [sys.executable, *launcher, tmp_path / "different.py", tmp_path, *BRIEF],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "step: process 1 has 0, process 0 4; expected one run, in a folder" in done.stderr
    assert [at for at, _ in RunFolder(tmp_path / "0" / "run").checkpoints()] == [4]


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_ends(tmp_path, processes):
    """The signal reaches every process of the run, as when a job scheduler pre-empts it."""
    out = tmp_path / "run"
    arguments = "--steps 100000 --per-class 4 --batch-size 16 --log-every 2 --save-every 100000"
    process = subprocess.Popen(
        command(processes, out, *arguments.split()),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or len(losses(out)) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    stderr = process.communicate(timeout=60)[1]
    assert "and saved; continue with fastdit train --resume auto --out" in stderr
    if processes == 1:
        assert process.returncode == 128 + signal.SIGTERM
    saved = RunFolder(out).newest()
    assert saved.header["step"] >= 4
    assert f"stopped at step {saved.header['step']} of 100000" in stderr
