"""The kernels' suite under Triton's interpreter, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path


def test_kernels_pass_their_suite_under_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--durations=5", Path(__file__).parent / "kernels"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 100
