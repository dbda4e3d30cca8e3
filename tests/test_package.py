"""How the package is built and imported, and which of its modules may import which."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastdit

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (".py", ".cpp", ".h", ".typed")


def run_python(code: str, cwd: Path) -> str:
    # As after an installation, modules are loaded from bytecode and not compiled at every start.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_version_is_the_installed_one():
    assert fastdit.__version__ == importlib.metadata.version("fastdit")


def test_the_lowest_versions_asked_for_are_those_that_were_tested():
    """pyproject.toml's bounds are what tests/with_oldest.sh installs; 2.11 stands for 2.11.0."""
    project = (ROOT / "pyproject.toml").read_text()
    dependencies = project.partition("\ndependencies = [")[2].partition("\n]")[0]
    bounds = dict(re.findall(r'"(\w+)>=([\d.]+)[;"]', dependencies))
    lines = (ROOT / "constraints-oldest.txt").read_text().split()
    pins = dict(line.split("==") for line in lines)
    assert {"torch", "triton", "numpy"} <= bounds.keys() == pins.keys()
    for package, bound in bounds.items():
        assert pins[package].startswith(bound), package


def test_every_public_name_exists():
    assert all(hasattr(fastdit, name) for name in fastdit.__all__)


def test_import_takes_no_triton_and_little_time(tmp_path):
    code = (
        "import sys, time, torch\n"
        "start = time.process_time()\n"
        "import fastdit\n"
        "print(time.process_time() - start, 'triton' in sys.modules)"
    )
    runs = [run_python(code, tmp_path).split() for _ in range(3)]
    assert all(triton == "False" for _, triton in runs)
    assert min(float(seconds) for seconds, _ in runs) < 0.2


def test_kernels_are_installed_inside_fastdit(tmp_path):
    assert run_python("import fastdit.kernels as k; print(k.__name__)", tmp_path).strip() == (
        "fastdit.kernels"
    )


def test_kernels_under_another_name_say_how_to_install():
    code = "from kernels import attention"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip install -e ." in done.stderr
    assert run_python("import kernels", ROOT) == ""  # Transformers probes for that name
    submodule = [sys.executable, "-c", "import kernels.attention"]
    assert subprocess.run(submodule, cwd=ROOT, capture_output=True).returncode != 0


USE_THE_WHEEL = """
import fastdit, fastdit.train, fastdit.data, fastdit.cli.app, fastdit.pipeline, fastdit.kernels
print(fastdit.__file__)
print(fastdit.kernels.__file__)
model = fastdit.DiT(hidden=8, n_layers=1, n_heads=1)
scheduler = fastdit.DiffusionScheduler(2, schedule="cosine")
print(list(fastdit.Sampler(model, scheduler, execution="eager")([3]).shape))
"""


def test_a_wheel_holds_the_whole_package_and_works(tmp_path):
    """Built from a copy, since files of an earlier build beside the sources would be packed."""
    source, site = tmp_path / "source", tmp_path / "site"
    for folder in ("fastdit", "kernels"):
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "wheel", *offline, "--wheel-dir", tmp_path, source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)

    packed = {p.relative_to(site).as_posix() for p in site.rglob("*") if p.is_file()}
    sources = {p.relative_to(source) for p in source.rglob("*") if p.suffix in SOURCES}
    expected = {p.as_posix() for p in sources if p.parts[0] == "fastdit"}
    expected |= {f"fastdit/{p.as_posix()}" for p in sources if p.parts[0] == "kernels"}
    assert {name for name in packed if ".dist-info/" not in name} == expected
    assert {"fastdit/py.typed", "fastdit/kernels/cpu/trajectory.cpp"} < expected

    done = subprocess.run(
        [sys.executable, "-c", USE_THE_WHEEL],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(site / "fastdit" / "__init__.py"),
        str(site / "fastdit" / "kernels" / "__init__.py"),
        "[1, 3, 16, 16]",
    ]


def test_import_changes_nothing_global(tmp_path):
    code = (
        "import logging, torch\n"
        "def state(): return (torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32,\n"
        "    torch.get_float32_matmul_precision(), torch.get_num_threads(),\n"
        "    torch.is_grad_enabled(), torch.initial_seed(), list(logging.getLogger().handlers))\n"
        "before = state()\n"
        "import fastdit, fastdit.train, fastdit.cli\n"
        "print(state() == before)"
    )
    assert run_python(code, tmp_path).strip() == "True"


# A wing or a root file may import what stands in the lines above its own, and nothing else. Only
# ops imports kernels.
LAYERS = [
    {"errors", "testing", "update"},
    {"config", "data", "text_config"},
    {"diffusion", "noise", "flops"},
    {"flow"},
    {"reference", "solvers"},
    {"ops"},
    {"functional"},
    {"blocks"},
    {"model", "text"},
    {"checkpoints"},
    {"sampling", "evaluation", "pipeline"},
    {"train"},
    {"cli", "_moved"},
]


def fastdit_imports(path: Path) -> set[str]:
    """Return the root files and wings that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "fastdit" else []
            names += [f"fastdit.{a.name}" for a in node.names if node.module == "fastdit"]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("fastdit.")}
    return found


def files_of(name: str) -> list[Path]:
    file = ROOT / "fastdit" / f"{name}.py"
    return [file] if file.exists() else sorted((ROOT / "fastdit" / name).rglob("*.py"))


def test_imports_run_one_way():
    rooms = {p.stem for p in (ROOT / "fastdit").iterdir() if p.suffix == ".py" or p.is_dir()}
    rooms -= {"__init__", "__main__", "__pycache__", "py"}
    assert rooms == set().union(*LAYERS)
    below: set[str] = set()
    for layer in LAYERS:
        for name in layer:
            allowed = below | {name} | ({"kernels"} if name == "ops" else set())
            for path in files_of(name):
                upward = fastdit_imports(path) - allowed
                assert not upward, f"{path.relative_to(ROOT)} imports {upward}"
        below |= layer


def test_no_module_imports_anothers_private_names():
    for path in [*(ROOT / "fastdit").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastdit"):
                private = [a.name for a in node.names if a.name.startswith("_")]
                assert not private, f"{path.relative_to(ROOT)} imports {private}"


def test_kernels_import_nothing_of_fastdit():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert fastdit_imports(path) <= {"kernels"}, path


@pytest.mark.parametrize("old", ["recipe", "sources", "latents"])
def test_modules_that_moved_still_import_and_warn(old, tmp_path):
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        f"    import fastdit.{old} as module\n"
        "print(*(w.message for w in seen), seen[0].category.__name__, seen[0].filename)\n"
        "print(module.__name__, {'Recipe', 'Shapes', 'LatentShards'} & set(dir(module)))"
    )
    said, names = run_python(code, tmp_path).splitlines()
    assert f"fastdit.{old} has moved to fastdit." in said
    assert said.endswith("DeprecationWarning <string>")
    assert "set()" not in names
