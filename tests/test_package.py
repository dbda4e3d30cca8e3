"""What importing fastdit costs, and how its kernels may be imported."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

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


# What each module may import of fastdit's own; nothing points back up.
LAYERS = [
    {"errors", "registration"},
    {"config", "files", "data", "foreign"},
    {"many"},
    {"latents"},
    {"sources"},
    {"diffusion", "noise", "images", "testing", "work", "packed"},
    {"reference", "losses"},
    {"solvers", "layouts"},
    {"recipe"},
    {"ops", "checks"},
    {"backends"},
    {"functional"},
    {"objective"},
    {"model"},
    {"parallel"},
    {"checkpoint", "conditioning", "pipeline", "ema"},
    {"runs", "runtime"},
    {"meter", "state"},
    {"predictors"},
    {"execution", "choice"},
    {"engine"},
    {"sampler"},
    {"monitor"},
    {"train", "cli_common"},
    {"cli_models", "cli_train"},
    {"cli"},
]


def fastdit_imports(path: Path) -> set[str]:
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


def test_imports_run_one_way():
    modules = {p.stem for p in (ROOT / "fastdit").glob("*.py")} - {"__init__", "__main__"}
    assert modules == set().union(*LAYERS)
    below: set[str] = set()
    for layer in LAYERS:
        for module in layer:
            upward = fastdit_imports(ROOT / "fastdit" / f"{module}.py") - below
            if module == "ops":  # the one door to the kernels
                upward -= {"kernels"}
            assert not upward, f"{module} imports {upward}"
        below |= layer


def test_kernels_import_nothing_of_fastdit():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert fastdit_imports(path) <= {"kernels"}, path
