"""The README says what is true: its example runs, its tables are the measured ones."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2cpu"


@pytest.fixture
def benchmark_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in ("_harness", "sample_throughput", "train_throughput"):
        sys.modules.pop(name, None)


def read(name):
    return json.loads((RESULTS / name).read_text())


def test_the_example_runs(tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["images"].shape == (3, 3, 16, 16)
    assert (tmp_path / "model.safetensors").exists()


def test_the_sampling_table_is_the_measured_one(benchmark_modules):
    from _harness import table
    from sample_throughput import COLUMNS

    document = read("sample_throughput.json")
    assert table(COLUMNS, document["rows"], markdown=True) in README


def test_the_training_tables_are_the_measured_ones(benchmark_modules):
    from _harness import table
    from train_throughput import QUALITY_COLUMNS, RATE_COLUMNS

    document = read("train_throughput.json")
    assert table(RATE_COLUMNS, document["rates"], markdown=True) in README
    assert table(QUALITY_COLUMNS, document["learned"], markdown=True) in README


@pytest.mark.parametrize("name", ["sample_throughput.json", "train_throughput.json"])
def test_results_name_their_machine_and_come_from_a_commit(name):
    machine = read(name)["machine"]
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
