"""The benchmark scripts run with tiny arguments, in the way users run them."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastdit

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# Models this small gain nothing from threads, which wait for each other on a busy machine.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


def test_sample_throughput_times_every_way_and_writes_json(tmp_path):
    path, plot = tmp_path / "results" / "r.json", tmp_path / "plots" / "r.png"
    paths = ("--json", path, "--plot", plot)
    done = run("sample_throughput.py", *"--batch 2 --steps 3 --rounds 2".split(), *paths)
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    assert {"device", "threads", "torch", "commit"} <= document["machine"].keys()
    rows = {(row["way"], row["batch"]): row for row in document["rows"]}
    ways = ["reference eager", "reference compiled", "fastdit eager", "fastdit compile"]
    if torch.cuda.is_available():
        ways.append("fastdit graph")
    if importlib.util.find_spec("diffusers"):
        ways.append("diffusers eager")
    if shutil.which("c++") and not torch.cuda.is_available():
        ways.append("fastdit trajectory")
    rivals = {"openvino": ["openvino"], "onnxruntime": ["onnxruntime", "onnx"]}
    ways += [way for way, needed in rivals.items() if all(map(importlib.util.find_spec, needed))]
    assert set(rows) == {(way, 2) for way in ways}
    for (way, _), row in rows.items():
        assert way in done.stdout
        assert row["images/s"] > 0 and row["min"] <= row["images/s"] <= row["max"]
        assert row["share"] > 0
        assert ("error" in row) == (way != "diffusers eager"), "diffusers is another network"
        assert 0 < row.get("error", 1e-6) < 1e-5, "float32 against float64"
        compiles = way.endswith(("compiled", "compile")) or way in rivals
        assert ("compile s" in row) == compiles
        assert len(row["seconds"]) == 2
        # The first run compiles everything that the timed runs need.
        assert "compile s" not in row or max(row["seconds"]) < row["first run s"]
        assert row["to compiled"] > 0 and row["ratio"] > 0
    with Image.open(plot) as image:
        assert image.format == "PNG" and image.size[0] > 300
    assert rows["reference compiled", 2]["compile s"] > 0
    assert rows["fastdit compile", 2]["compile s"] > 0
    assert [(floor["preset"], floor["rows"]) for floor in document["floors"]] == [("toy", 2)]


def test_sample_throughput_takes_presets_dtypes_and_choices(tmp_path):
    arguments = "--preset DiT-S/8 --batch 1 2 --steps 2 --rounds 1 --dtype bfloat16"
    way = ("--way", "fastdit eager", "--json", tmp_path / "r")
    done = run("sample_throughput.py", *arguments.split(), *way)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "r").read_text())
    rows = document["rows"]
    assert [(row["batch"], row["way"]) for row in rows] == [(b, "fastdit eager") for b in (1, 2)]
    assert not any("ratio" in row or "to compiled" in row for row in rows), "no baseline was named"
    assert [floor["rows"] for floor in document["floors"]] == [1, 2]
    assert all(1e-4 < row["error"] < 0.1 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", 0), "--batch: expected at least 1, got 0"),
        (("--preset", "DiT-M/2"), "invalid choice: 'DiT-M/2'"),
        (("--way", "graph"), "invalid choice: 'graph'"),
        (("--way", "fastdit graph", "--device", "cpu"), "--way: 'fastdit graph' needs CUDA"),
    ],
)
def test_sample_throughput_refuses_bad_arguments(arguments, message):
    done = run("sample_throughput.py", *arguments)
    assert done.returncode == 2 and message in done.stderr


def test_steady_times_a_sampler_beside_a_busy_process(tmp_path):
    path = tmp_path / "steady.json"
    run("steady.py", *"--model toy --rounds 1 --json".split(), path)
    rows = json.loads(path.read_text())["rows"]
    alone, every, busy = rows[:3]  # a fourth needs ONNX Runtime
    assert [row["beside"] for row in rows[:3]] == ["nothing", "nothing", "a busy process"]
    assert alone["threads"] == 1 and alone["of one thread"] == every["of all threads"] == 1
    assert all(row["images/s"] > 0 and len(row["rates"]) == 1 for row in rows)
    assert busy["of one thread"] == pytest.approx(busy["images/s"] / alone["images/s"])


def test_block_options_times_a_model_beside_a_plain_one(tmp_path):
    path = tmp_path / "r.json"
    done = run("block_options.py", *"--model SiT-S/4 --batch 1 --rounds 1 --json".split(), path)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())["rows"]
    assert row["model"] == "SiT-S/4" and row["execution"] in ("trajectory", "eager")
    assert row["time"] == pytest.approx(row["of the plain one"] / row["images/s"])


def test_crossover_times_both_ways_side_by_side(tmp_path):
    path = tmp_path / "r.json"
    done = run("crossover.py", *"--model toy --batch 2 --rounds 1 --json".split(), path)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())["rows"]
    assert row["ratio"] > 0
    assert "batch 2" in done.stdout and f"{row['ratio']:.2f}" in done.stdout


def test_roofline_measures_a_floor(tmp_path):
    done = run("roofline.py", *"--rows 1 3 --json".split(), tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "r.json").read_text())
    for rows, floor in zip((1, 3), document["floors"], strict=True):
        assert floor["rows"] == rows and floor["flop"] == rows * document["floors"][0]["flop"]
        parts = [floor[f"{name} s"] for name in ("products", "attention", "passes")]
        assert min(parts) > 0 and floor["floor s"] == pytest.approx(sum(parts))
    assert "floor ms" in done.stdout


def test_roofline_knows_the_parts_of_memory(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import roofline

    cfg = fastdit.PRESETS["DiT-XL/2"]
    parts = roofline.memory_parts(cfg, 8, torch.bfloat16, 250)
    assert parts["weights"] == 2 * 675_129_632
    assert parts["tables"] == 2 * 250 * 8 * (6 * 28 + 2) * 1152
    assert parts["state"] == 4 * 8 * 4 * 32 * 32 * 4


def test_train_throughput_times_all_loops_and_judges(tmp_path):
    arguments = "--rounds 2 --steps 2 --batch 64 --per-class 8 --seeds 1 --full-steps 4"
    ways = ("--way", "plain eager", "fastdit eager", "fastdit by block")
    ways += ("--json", tmp_path / "r.json")
    done = run("train_throughput.py", *arguments.split(), *ways)
    assert done.returncode == 0, done.stderr
    for word in ("plain eager", "spread over the seeds", "0.9147", "GFLOP/s"):
        assert word in done.stdout
    document = json.loads((tmp_path / "r.json").read_text())
    rows = {row["way"]: row for row in document["rows"]}
    assert list(rows) == ["plain eager", "fastdit eager", "fastdit by block"]
    for row in rows.values():
        assert row["min"] <= row["images/s"] <= row["max"] and row["ratio"] > 0
        # At least weights, gradients and AdamW's two moments of 323,696 float32.
        assert row["memory MiB"] > 16 * 323_696 / 2**20 and 0 < row["MFU"] < 1
        assert 0.5 < row["loss"] < 1.5
    assert rows["fastdit by block"]["loss"] == pytest.approx(rows["fastdit eager"]["loss"], 1e-4)
    assert rows["fastdit eager"]["memory MiB"] < rows["plain eager"]["memory MiB"]
    learned = document["learned"]
    assert [(row["seed"], len(row["losses by pass"])) for row in learned] == [(1, 4)] * 2
    assert all(0 < row["final loss"] < 2 for row in learned)


def test_train_throughput_trains_published_models(tmp_path):
    arguments = "--preset DiT-S/8 --batch 2 --precision bfloat16 --checkpointing --rounds 1 --steps"
    ways = ("--way", "plain eager", "fastdit eager", "--json", tmp_path / "r.json")
    done = run("train_throughput.py", *arguments.split(), 1, *ways)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ["plain eager", "fastdit eager"]
    assert rows[1]["memory MiB"] < rows[0]["memory MiB"], "checkpointing"
    assert all(0.5 < row["loss"] < 5 for row in rows)


def test_toy_recipes_adds_one_change_a_row(tmp_path):
    arguments = "--scale 0.0005 --per-class 4 --images 8 --compile none --json"
    done = run("toy_recipes.py", *arguments.split(), tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["recipe"] for row in rows][0] == "seed"
    assert rows[-1]["recipe"] == "+ guidance: sharp" and len(rows) == 7
    assert all(0 <= row["shape"] <= 1 and 0 < row["loss"] < 2 for row in rows)


def test_train_throughput_takes_newer_options_of_the_blocks(tmp_path):
    arguments = "--options modern --rounds 1 --steps 1 --batch 16 --per-class 1"
    ways = ("--way", "plain eager", "fastdit eager", "--json", tmp_path / "r.json")
    done = run("train_throughput.py", *arguments.split(), *ways)
    assert done.returncode == 0, done.stderr
    plain, own = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert own["ratio"] > 0 and own["loss"] == pytest.approx(plain["loss"], rel=0.2)


def test_flow_steps_samples_both_toys_and_goes_on_with_its_trainings(tmp_path):
    path, plot = tmp_path / "r.json", tmp_path / "r.png"
    arguments = "--scale 0.0005 --per-class 1 --images 8 --compile none --steps 1 5".split()
    paths = ("--runs", tmp_path / "runs", "--json", path, "--plot", plot)
    done = run("flow_steps.py", *arguments, *paths)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    found = [(row["recipe"], row["solver"], row["guidance"]) for row in rows]
    assert found == [
        *(
            ("sharp", s, g)
            for g in (None, 3.0)
            for s in ("ancestral", "DDIM", "DPM-Solver++", "Heun")
        ),
        *(("flow", s, g) for g in (None, 3.0) for s in ("Euler", "Heun", "DPM-Solver++")),
    ]
    assert all(0 <= row[n][what] <= 1 for row in rows for n in "15" for what in ("colour", "shape"))
    assert [row["evaluations"] for row in rows if row["recipe"] == "flow"] == [5, 9, 5] * 2
    with Image.open(plot) as image:
        assert image.format == "PNG"
    again = run("flow_steps.py", *arguments, *paths)
    assert again.returncode == 0 and json.loads(path.read_text())["rows"] == rows
    other = run("flow_steps.py", *arguments[:-1], *paths, "--scale", 0.001)
    assert other.returncode == 1 and "--runs: " in other.stderr


def test_inductive_bias_trains_both_models_alike(tmp_path):
    path, plot = tmp_path / "r.json", tmp_path / "r.png"
    arguments = ("--images", 16, 32, "--steps", 2, 3, "--samples", 1, "--json", path)
    arguments += ("--plot", plot)
    done = run("inductive_bias.py", *arguments)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [(row["steps"], row["images"], row["model"]) for row in rows] == [
        (steps, images, model)
        for steps in (2, 3)
        for images in (16, 32)
        for model in ("DiT", "U-Net")
    ]
    sizes = {row["model"]: row["parameters"] for row in rows}
    assert sizes["DiT"] == 323_696 and abs(sizes["U-Net"] / sizes["DiT"] - 1) < 0.02
    # Both models return zeros at first, so that their first losses are the variance of the noise.
    assert all(row["training loss"] == pytest.approx(1, abs=0.05) for row in rows)
    with Image.open(plot) as image:
        assert image.format == "PNG"


def test_kernels_times_each_way_both_directions_and_gives_the_error(tmp_path):
    path = tmp_path / "k.json"
    done = run("kernels.py", *"--quick --op attention --rounds 3 --json".split(), path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert torch.cuda.is_available() or "fastdit ran what is best on this CPU" in done.stdout
    document = json.loads(path.read_text())
    assert {"device", "threads", "torch", "commit"} <= document["machine"].keys()
    ceilings = [row for row in document["rows"] if row["pass"] == "ceiling"]
    assert {row["op"] for row in ceilings} == {"copy", "matmul"}
    rows = [row for row in document["rows"] if row["op"] == "attention"]
    assert {row["way"] for row in rows} >= {"eager", "fastdit", "compiled", "sdpa math"}
    assert {row["pass"] for row in rows} == {"forward", "backward"}
    for row in rows:
        if row["us"] == "not available":
            assert row["way"].startswith("sdpa") and row["reason"]
            continue
        assert 0 < row["min"] <= row["us"] <= row["max"] and row["share"] > 0
        assert ("error" in row) == (row["pass"] == "forward")
        assert 0 < row.get("error", 1e-7) < (0.02 if row["dtype"] == "bfloat16" else 1e-5)
        assert row["way"] != "eager" or row["ratio"] == 1
    plain = [row for row in rows if row["way"] == "eager" and row["dtype"] == "float32"]
    (forward,) = (row for row in plain if row["pass"] == "forward")
    # It reads qkv, writes out, and has two products of 2 B N^2 D; (B, N, h, d) = (2, 16, 2, 16).
    assert forward["bytes"] == 4 * (2 * 16 * 3 * 32 + 2 * 16 * 32)
    assert forward["flop"] == 2 * (2 * 2 * 16 * 16 * 32)
    assert forward["GB/s"] == pytest.approx(forward["bytes"] / forward["us"] / 1e3)


def test_kernels_runs_under_pytest_too(tmp_path):
    chosen = ("-k", "sampler_update and not compiled", "--benchmark-json", tmp_path / "p.json")
    command = [sys.executable, "-m", "pytest", BENCHMARKS / "kernels.py", "--benchmark-enable"]
    command += ["-p", "no:cacheprovider", *chosen]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=BENCHMARKS.parent
    )
    assert done.returncode == 0, done.stdout
    timed = json.loads((tmp_path / "p.json").read_text())["benchmarks"]
    assert len(timed) == 4 and all(b["stats"]["median"] > 0 for b in timed)


@pytest.mark.parametrize(
    ("script", "arguments", "status", "message"),
    [
        ("kernels.py", "--op gelu", 2, "invalid choice: 'gelu'"),
        ("kernels.py", "--rounds 0", 2, "--rounds: expected at least 1, got 0"),
        ("report.py", "--unit speed", 2, "invalid choice: 'speed'"),
        ("report.py", "--aot --arch sm_70", 2, "invalid choice: 'sm_70'"),
        ("train_throughput.py", "--batch 0", 2, "--batch: expected at least 1, got 0"),
        ("report.py", "--limit 0", 2, "--limit: expected at least 1, got 0"),
        ("report.py", "--aot --match gelu", 1, "no kernel or case has 'gelu' in its name"),
    ],
)
def test_kernels_and_report_refuse_bad_arguments(script, arguments, status, message):
    done = run(script, *arguments.split())
    assert done.returncode == status and message in done.stderr
