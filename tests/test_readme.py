"""The README says what is true: its example runs, its tables are the measured ones."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastdit

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results" / "intel-xeon-processor-2cpu"
SAMPLING, TRAINING = RESULTS / "sample_throughput.json", RESULTS / "train_throughput.json"
CROSSOVER, KERNELS = RESULTS / "crossover.json", RESULTS / "kernels.json"
TOY, BIAS = RESULTS / "toy_recipes.json", RESULTS / "inductive_bias.json"


@pytest.fixture
def benchmark_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in (
        "_harness",
        "sample_throughput",
        "crossover",
        "train_throughput",
        "toy_recipes",
        "inductive_bias",
        "kernels",
        "_ops",
    ):
        sys.modules.pop(name, None)


def read(path):
    return json.loads(path.read_text())


def examples():
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_example_runs(tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    code = examples()[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["images"].shape == (3, 3, 16, 16)
    assert (tmp_path / "model.safetensors").exists()


def test_the_sampling_example_runs():
    cfg = replace(fastdit.PRESETS["DiT-S/8"], hidden=32, n_layers=1, n_heads=2)
    model = fastdit.DiT.from_config(cfg)
    scheduler = fastdit.DiffusionScheduler(T=4, schedule="cosine")
    names = {"fastdit": fastdit, "torch": torch, "model": model, "scheduler": scheduler}
    (example,) = (code for code in examples() if "execution=" in code)
    exec(compile(example, "README.md", "exec"), names)
    assert names["images"].shape == (2, 4, 32, 32)


def test_the_sampling_table_is_the_measured_one(benchmark_modules):
    from _harness import table
    from sample_throughput import COLUMNS

    document = read(SAMPLING)
    assert table(COLUMNS, document["rows"], markdown=True) in README


def test_the_table_of_the_crossover_is_the_measured_one(benchmark_modules):
    from _harness import table
    from crossover import summary

    assert table(*summary(read(CROSSOVER)["rows"]), markdown=True) in README


def test_the_table_of_the_ops_is_the_measured_one(benchmark_modules):
    from _harness import table

    from kernels import SUMMARY, summary

    assert table(SUMMARY, summary(read(KERNELS)["rows"]), markdown=True) in README


def test_the_training_tables_are_the_measured_ones(benchmark_modules):
    from _harness import table
    from train_throughput import QUALITY_COLUMNS, RATE_COLUMNS

    document = read(TRAINING)
    assert table(RATE_COLUMNS, document["rows"], markdown=True) in README
    assert table(QUALITY_COLUMNS, document["learned"], markdown=True) in README


def test_the_table_of_the_toys_recipes_is_the_measured_one(benchmark_modules):
    from _harness import table
    from toy_recipes import COLUMNS

    assert table(COLUMNS, read(TOY)["rows"], markdown=True) in README


def test_the_table_beside_the_u_net_is_the_measured_one(benchmark_modules):
    from _harness import table
    from inductive_bias import COLUMNS

    page = (ROOT / "docs" / "inductive_bias.md").read_text()
    assert table(COLUMNS, read(BIAS)["rows"], markdown=True) in page
    assert "![" in page and (ROOT / "docs" / "inductive_bias.png").exists()


@pytest.mark.parametrize(
    "path", [SAMPLING, CROSSOVER, KERNELS, TRAINING, TOY, BIAS], ids=lambda path: path.stem
)
def test_results_name_their_machine_and_come_from_a_commit(path):
    machine = read(path)["machine"]
    assert machine["device"] in README and f"torch {machine['torch']}" in README
    assert re.fullmatch(r"[0-9a-f]{10}", machine["commit"])


def test_every_linked_file_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_ci_runs_the_readme_command():
    commands = [line for line in README.splitlines() if line.startswith("pip install")]
    assert len(commands) == 2
    assert commands[0].endswith("python benchmarks/sample_throughput.py")
    assert commands[1].endswith("pytest")
