"""The benchmark scripts run, with tiny arguments, as users run them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_sample_throughput_times_every_way_and_writes_json(tmp_path):
    path, plot = tmp_path / "results" / "r.json", tmp_path / "plots" / "r.png"
    paths = ("--json", path, "--plot", plot)
    done = run("sample_throughput.py", *"--batch 1 2 --steps 3 --rounds 2".split(), *paths)
    assert done.returncode == 0, done.stderr
    for word in ("threads", "torch", "reference eager", "reference compiled", "fastdit eager"):
        assert word in done.stdout
    document = json.loads(path.read_text())
    assert {"device", "threads", "torch", "commit"} <= document["machine"].keys()
    rows = {(row["way"], row["batch"]): row for row in document["rows"]}
    assert len(rows) == 6
    for (way, _), row in rows.items():
        assert row["images/s"] > 0 and row["min"] <= row["images/s"] <= row["max"]
        assert row["error"] < 1e-5, "float32 against float64"
        assert row["error"] > 0
        assert ("compile s" in row) == (way == "reference compiled")
        assert len(row["seconds"]) == 2
    with Image.open(plot) as image:
        assert image.format == "PNG" and image.size[0] > 300
    assert rows["reference compiled", 1]["compile s"] > 0


def test_sample_throughput_takes_presets_dtypes_and_choices(tmp_path):
    arguments = "--preset DiT-S/8 --batch 2 --steps 2 --rounds 1 --dtype bfloat16"
    done = run(
        "sample_throughput.py", *arguments.split(), "--execution", "eager", "--json", tmp_path / "r"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "r").read_text())["rows"]
    assert [row["way"] for row in rows] == ["reference eager", "fastdit eager"]
    assert all(1e-4 < row["error"] < 0.1 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", 0), "--batch: expected at least 1, got [0]"),
        (("--preset", "DiT-M/2"), "invalid choice: 'DiT-M/2'"),
        (("--execution", "graph"), "invalid choice: 'graph'"),
    ],
)
def test_sample_throughput_refuses_bad_arguments(arguments, message):
    done = run("sample_throughput.py", *arguments)
    assert done.returncode == 2 and message in done.stderr


def test_train_throughput_times_both_loops_and_judges(tmp_path):
    arguments = "--rounds 2 --per-class 8 --seeds 0 1 --epochs 2 --no-compile --json"
    done = run("train_throughput.py", *arguments.split(), tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    for word in ("plain eager", "spread over the seeds", "0.9147"):
        assert word in done.stdout
    document = json.loads((tmp_path / "r.json").read_text())
    assert [row["way"] for row in document["rates"]] == ["plain eager", "fastdit eager"]
    assert all(row["min"] <= row["images/s"] <= row["max"] for row in document["rates"])
    learned = document["learned"]
    assert [(row["seed"], len(row["epoch losses"])) for row in learned] == [(0, 2)] * 2 + [
        (1, 2)
    ] * 2
    assert all(0 < row["final loss"] < 2 for row in learned)
