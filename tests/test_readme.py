"""The README and docs/ say what is true: examples run, tables are the measured ones."""

import inspect
import json
import re
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastdit
from fastdit import functional

ROOT = Path(__file__).resolve().parent.parent
PAGE_PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.name: path.read_text() for path in PAGE_PATHS}
README, RESULTS_PAGE = PAGES["README.md"], PAGES["results.md"]
RESULTS = ROOT / "benchmarks" / "results" / "intel-xeon-processor-2cpu"
ON_EPYC = ROOT / "benchmarks" / "results" / "amd-epyc-2cpu"
SAMPLING = [ON_EPYC / f"sample_{name}.json" for name in ("toy", "s4_b4", "b2", "xl2")]
LOW, STEADY = ON_EPYC / "sample_bfloat16.json", ON_EPYC / "steady.json"
TRAINING = RESULTS / "train_throughput.json"
CROSSOVER, KERNELS = RESULTS / "crossover.json", RESULTS / "kernels.json"
TOY, BIAS = RESULTS / "toy_recipes.json", RESULTS / "inductive_bias.json"
FLOW_STEPS = ON_EPYC / "flow_steps.json"
TEXT = [ON_EPYC / f"text_throughput{name}.json" for name in ("", "_sd3")]
OPTIONS, TRAINED_OPTIONS = ON_EPYC / "block_options.json", ON_EPYC / "train_options.json"


@pytest.fixture
def benchmark_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in (
        "_harness",
        "sample_throughput",
        "crossover",
        "steady",
        "_rivals",
        "_ways",
        "roofline",
        "train_throughput",
        "toy_recipes",
        "inductive_bias",
        "flow_steps",
        "block_options",
        "text_throughput",
        "_text_ways",
        "kernels",
        "_ops",
    ):
        sys.modules.pop(name, None)


def read(path):
    return json.loads(path.read_text())


def test_every_op_with_a_backend_has_its_row():
    ops = [name for name in functional.__all__ if "backend" in parameters_of(name)]
    rows = re.findall(r"^\| `(\w+)` \|", PAGES["kernels.md"], re.M)
    assert sorted(rows) == sorted(ops)


def parameters_of(name):
    return inspect.signature(getattr(functional, name)).parameters


def examples(page):
    return re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)


def test_the_first_example_runs(tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    code = examples("README.md")[0]
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
    (example,) = (code for code in examples("sampling.md") if "execution=" in code)
    exec(compile(example, "sampling.md", "exec"), names)
    assert names["images"].shape == (2, 4, 32, 32)


def test_the_example_of_prompts_runs():
    sizes = dict(hidden=24, n_layers=1, n_heads=2, text_width=8)
    encoded = torch.randn(2, 5, 8), torch.ones(2, 5), torch.randn(2, 3, 8), torch.ones(2, 3)
    names = {
        "fastdit": fastdit,
        "pixart": fastdit.PixArt(**sizes),
        "scheduler": fastdit.DiffusionScheduler(1000, schedule="linear"),
        "pipeline": SimpleNamespace(encode_prompt=lambda prompts: encoded),
    }
    (example,) = (code for code in examples("sampling.md") if "encode_prompt" in code)
    exec(compile(example, "sampling.md", "exec"), names)
    assert names["latents"].shape == (2, 4, 64, 96)


def test_the_example_of_text_to_image_runs():
    names = {}
    (example,) = (code for code in examples("text.md") if "prompt_embeds=" in code)
    exec(compile(example, "text.md", "exec"), names)
    assert names["latents"].shape == (2, 4, 8, 8)


def test_the_example_of_a_published_checkpoint_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = replace(fastdit.PRESETS["DiT-S/8"], n_layers=1)  # so that 250 steps take a second
    model = fastdit.DiT.from_config(small)
    fastdit.save(model, "DiT-XL-2-256x256.pt", layout="facebookresearch/DiT")
    monkeypatch.setattr(fastdit, "load", partial(fastdit.load, n_heads=small.n_heads))
    names = {"fastdit": fastdit}
    exec(compile(examples("checkpoints.md")[0], "checkpoints.md", "exec"), names)
    assert names["latents"].shape == (2, 4, 32, 32)


def test_the_examples_of_a_lightningdit_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preset = fastdit.PRESETS["LightningDiT-XL/1"]
    model = fastdit.DiT.from_config(replace(preset, hidden=16, n_layers=1, n_heads=2, img_size=2))
    fastdit.save(model, "lightningdit-xl-imagenet256-800ep.pt", layout="hustvl/LightningDiT")
    names = {"fastdit": fastdit}
    statistics = {"mean": torch.full((1, 32, 1, 1), 3.0), "std": torch.ones(1, 32, 1, 1)}
    torch.save(statistics, "latents_stats.pt")
    _, lightning, stats, *_ = examples("checkpoints.md")
    exec(compile(lightning, "checkpoints.md", "exec"), names)
    before = names["latents"]
    exec(compile(stats, "checkpoints.md", "exec"), names)
    assert before.shape == (2, 32, 2, 2) and torch.allclose(names["latents"], before + 3)


def test_the_example_of_the_architecture_runs():
    names = {"fastdit": fastdit, "model": fastdit.DiT()}
    exec(compile(examples("architecture.md")[0], "architecture.md", "exec"), names)
    assert names["image"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("page", PAGES)
def test_every_example_is_python_and_what_it_imports_exists(page):
    for code in examples(page):
        compile(code, page, "exec")
        for line in re.findall(r"^(?:import|from) .*fastdit.*$", code, re.MULTILINE):
            exec(line, {})


def test_the_readme_is_one_screen():
    assert len(README.splitlines()) <= 80


def speed_table(documents):
    """The README's columns and rows: the ways that it compares beside each other.

    Args:
        documents: what `sample_throughput.py` has written, in the table's order.
    """
    ways = {
        "plain loop": "reference eager",
        "plain compiled": "reference compiled",
        "ONNX Runtime": "onnxruntime",
        "OpenVINO": "openvino",
        "fastdit": "fastdit trajectory",
    }
    columns = {"model": "", "batch": "d", **dict.fromkeys(ways, ".3g")}
    columns |= {"to OpenVINO": ".2f", "error": ".1e"}
    by_case = {}
    for document in documents:
        for row in document["rows"]:
            by_case.setdefault((row["preset"], row["batch"]), {})[row["way"]] = row
    rows = []
    for (model, batch), by_way in by_case.items():
        if "openvino" not in by_way:
            continue
        own = by_way["fastdit trajectory"]
        figures = {name: by_way[way]["images/s"] for name, way in ways.items() if way in by_way}
        pairs = zip(by_way["openvino"]["seconds"], own["seconds"], strict=True)
        ratio = statistics.median(theirs / ours for theirs, ours in pairs)
        last = {"to OpenVINO": ratio, "error": own["error"]}
        rows.append({"model": model, "batch": batch, **figures, **last})
    return columns, rows


def test_the_readmes_table_is_the_measured_one(benchmark_modules):
    from _harness import table

    columns, rows = speed_table(read(path) for path in SAMPLING)
    assert table(columns, rows, markdown=True) in README


@pytest.mark.parametrize("path", [*SAMPLING, LOW], ids=lambda path: path.stem)
def test_the_sampling_tables_are_the_measured_ones(path, benchmark_modules):
    from _harness import table
    from sample_throughput import COLUMNS

    rows = read(path)["rows"]
    for case in dict.fromkeys((row["preset"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["preset"], row["dtype"]) == case]
        assert table(COLUMNS, own, markdown=True) in RESULTS_PAGE


def test_the_table_beside_other_work_is_the_measured_one(benchmark_modules):
    from _harness import table
    from steady import COLUMNS

    assert table(COLUMNS, read(STEADY)["rows"], markdown=True) in RESULTS_PAGE


def test_the_table_of_the_crossover_is_the_measured_one(benchmark_modules):
    from _harness import table
    from crossover import summary

    assert table(*summary(read(CROSSOVER)["rows"]), markdown=True) in RESULTS_PAGE


def test_the_table_of_the_ops_is_the_measured_one(benchmark_modules):
    from _harness import table

    from kernels import SUMMARY, summary

    assert table(SUMMARY, summary(read(KERNELS)["rows"]), markdown=True) in RESULTS_PAGE


def test_the_training_tables_are_the_measured_ones(benchmark_modules):
    from _harness import table
    from train_throughput import QUALITY_COLUMNS, RATE_COLUMNS

    document = read(TRAINING)
    assert table(RATE_COLUMNS, document["rows"], markdown=True) in RESULTS_PAGE
    assert table(QUALITY_COLUMNS, document["learned"], markdown=True) in RESULTS_PAGE
    plain, own = (
        [row["final loss"] for row in document["learned"] if row["way"] == way]
        for way in ("plain eager", "fastdit compiled")
    )
    apart = abs(statistics.mean(plain) - statistics.mean(own))
    spread = max(plain) - min(plain)
    assert f"means differ by {apart:.4f}, the textbook loop's seeds" in RESULTS_PAGE
    assert f"among themselves by {spread:.4f}" in RESULTS_PAGE


def test_newer_blocks_cost_little_and_their_tables_are_the_measured_ones(benchmark_modules):
    from _harness import table
    from block_options import COLUMNS
    from train_throughput import RATE_COLUMNS

    sampled, trained = read(OPTIONS)["rows"], read(TRAINED_OPTIONS)["rows"]
    assert table(COLUMNS, sampled, markdown=True) in RESULTS_PAGE
    assert table(RATE_COLUMNS, trained, markdown=True) in RESULTS_PAGE
    assert all(row["time"] < 1.1 for row in sampled)
    assert trained[1]["way"] == "fastdit compiled" and trained[1]["to compiled"] >= 1


def test_text_models_are_ahead_of_diffusers_and_their_tables_are_the_measured_ones(
    benchmark_modules,
):
    from _harness import table
    from text_throughput import COLUMNS

    rows = [row for path in TEXT for row in read(path)["rows"]]
    for preset in ("PixArt", "SD3"):
        own = [row for row in rows if row["preset"] == preset]
        assert table(COLUMNS, own, markdown=True) in RESULTS_PAGE
    for batch in {row["batch"] for row in rows if row["preset"] == "PixArt"}:
        by_way = {r["way"]: r for r in rows if (r["preset"], r["batch"]) == ("PixArt", batch)}
        ours = by_way.pop("fastdit eager")
        assert ours["ratio"] >= 1.3 and ours["to compiled"] >= 1.05
        assert all(ours["peak MiB"] <= row["peak MiB"] for row in by_way.values())


def test_the_table_of_the_toys_recipes_is_the_measured_one(benchmark_modules):
    from _harness import table
    from toy_recipes import COLUMNS

    assert table(COLUMNS, read(TOY)["rows"], markdown=True) in PAGES["training.md"]


def test_the_table_of_steps_is_the_measured_one_and_the_flow_needs_few(benchmark_modules):
    from _harness import table
    from flow_steps import summary

    rows, page = read(FLOW_STEPS)["rows"], PAGES["training.md"]
    assert table(*summary(rows), markdown=True) in page
    assert "](flow_steps.png)" in page and (ROOT / "docs" / "flow_steps.png").exists()
    by_euler = [row["25"] for row in rows if (row["recipe"], row["solver"]) == ("flow", "Euler")]
    assert len(by_euler) == 2
    assert all(min(measured["colour"], measured["shape"]) >= 0.99 for measured in by_euler)


def test_the_table_beside_the_u_net_is_the_measured_one(benchmark_modules):
    from _harness import table
    from inductive_bias import COLUMNS

    page = PAGES["inductive_bias.md"]
    assert table(COLUMNS, read(BIAS)["rows"], markdown=True) in page
    assert "![" in page and (ROOT / "docs" / "inductive_bias.png").exists()


@pytest.mark.parametrize(
    "path",
    [*SAMPLING, LOW, STEADY, CROSSOVER, KERNELS, TRAINING, TOY, BIAS, FLOW_STEPS, *TEXT],
    ids=lambda path: path.stem,
)
def test_results_name_their_machine_and_come_from_a_commit(path):
    machine = read(path)["machine"]
    for page in (README, RESULTS_PAGE) if path in SAMPLING else (RESULTS_PAGE,):
        assert machine["device"] in page and f"torch {machine['torch']}" in page
    assert re.fullmatch(r"[0-9a-f]{10}", machine["commit"])


def heading_anchors(text):
    """The fragments that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGE_PATHS, ids=lambda path: path.name)
def test_every_linked_file_and_heading_exists(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        file, _, heading = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        if heading:
            assert heading in heading_anchors(path.read_text()), target


@pytest.mark.parametrize("page", PAGES)
def test_every_image_says_what_it_shows(page):
    for text in re.findall(r"!\[(.*?)\]", PAGES[page]):
        assert len(text.split()) >= 4, text


def test_every_page_is_reached_from_the_readme():
    linked = set(re.findall(r"\]\(docs/(\w+\.md)", README))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("page", ["architecture.md", "CONTRIBUTING.md"])
def test_every_file_that_is_named_exists(page):
    """Paths are from the repository's root or, as imports are, from the package's."""
    named = set(re.findall(r"`([\w/.-]+\.(?:py|h|cpp|sh|txt|toml))`", PAGES[page]))
    named |= set(re.findall(r"`(\w[\w/]*/)`", PAGES[page]))
    assert named
    missing = [
        name
        for name in sorted(named)
        if not any((base / name).exists() for base in (ROOT, ROOT / "fastdit", ROOT / "tests"))
    ]
    assert not missing


def test_the_picture_of_the_architecture_shows_every_wing():
    picture = (ROOT / "docs" / "architecture.svg").read_text()
    wings = [p.parent.name for p in (ROOT / "fastdit").glob("*/__init__.py")]
    for wing in [*wings, "kernels"]:
        assert wing.startswith("_") or f">{wing}/<" in picture, wing


def test_ci_runs_the_readme_command():
    commands = [line for line in README.splitlines() if line.startswith("pip install")]
    assert len(commands) == 2
    assert commands[0].endswith("python benchmarks/sample_throughput.py")
    assert commands[1].endswith("pytest")
