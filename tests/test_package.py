"""What importing fastdit costs, and how its kernels may be imported."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastdit

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_version_is_the_installed_one():
    assert fastdit.__version__ == importlib.metadata.version("fastdit")


def test_the_lowest_versions_asked_for_are_those_that_were_tested():
    """2.11 is 2.11.0: pyproject.toml's bounds, and what tests/with_oldest.sh installs."""
    project = (ROOT / "pyproject.toml").read_text()
    bounds = dict(re.findall(r'"(\w+)>=([\d.]+)[;"]', project.partition("dependencies")[2]))
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
    code = "import kernels"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip install -e ." in done.stderr


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


# A wing or a root file may import those in the lines below its own, and nothing points back up.
# "data" is what others read and write through; only ops imports kernels.
LAYERS = [
    {"errors", "testing", "update"},
    {"config", "data"},
    {"diffusion", "noise", "flops"},
    {"reference", "solvers"},
    {"ops"},
    {"functional"},
    {"model"},
    {"checkpoints", "pipeline"},
    {"sampling"},
    {"train"},
    {"cli", "_moved"},
]


def fastdit_imports(path: Path) -> set[str]:
    """The root files and wings that a file imports."""
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


def test_kernels_import_nothing_of_fastdit():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert fastdit_imports(path) <= {"kernels"}, path


@pytest.mark.parametrize("old", ["recipe", "sources", "latents"])
def test_names_that_the_readme_showed_still_work_and_say_where_they_are(old, tmp_path):
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
