"""The kernels' suite under Triton's interpreter, run in separate processes."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

SUITE = Path(__file__).parent / "kernels"
HALF = "test_parity and not takes_any"  # takes as long as all else


def major_and_minor(package):
    return tuple(map(int, version(package).split(".")[:2]))


@pytest.mark.skipif(
    major_and_minor("triton") < (3, 7) and major_and_minor("numpy") >= (2, 4),
    reason="the interpreter of Triton 3.6 needs numpy before 2.4",
)
def test_kernels_pass_their_suite_under_the_interpreter():
    """Two halves run side by side, since the interpreter uses a single core."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    halves = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "--durations=5", "-k", chosen, SUITE],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for chosen in (HALF, f"not ({HALF})")
    ]
    try:
        outputs = [half.communicate(timeout=1800)[0] for half in halves]
    finally:
        for half in halves:
            half.kill()
    for half, output in zip(halves, outputs, strict=True):
        print(output)
        assert half.returncode == 0, output
    assert sum(int(re.search(r"(\d+) passed", output)[1]) for output in outputs) > 150
