"""The installed command, and `python -m fastdit`."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "command",
    [[Path(sys.executable).with_name("fastdit")], [sys.executable, "-m", "fastdit"]],
    ids=["script", "module"],
)
def test_the_installed_command_answers(command):
    done = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "train" in done.stdout and "sample" in done.stdout
