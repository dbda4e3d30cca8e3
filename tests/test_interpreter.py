"""The kernels' suite under Triton's interpreter, in processes of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

SUITE = Path(__file__).parent / "kernels"


def test_kernels_pass_their_suite_under_the_interpreter():
    """In two halves side by side: the interpreter keeps one core busy."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    halves = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "--durations=5", "-k", chosen, SUITE],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for chosen in ("error_rule", "not error_rule")
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
