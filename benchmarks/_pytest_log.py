"""A pytest plugin that logs a line of JSON when a test is found, begins and ends.

The variable FASTDIT_TEST_LOG names the file. A test that leaves the GPU broken, for example by an
illegal address, ends the process, since every later test would fail because of it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

LOG = "FASTDIT_TEST_LOG"
BROKEN = 86  # the exit status


def _append(test: str, outcome: str, **more: Any) -> None:
    with Path(os.environ[LOG]).open("a") as log:
        log.write(json.dumps({"test": test, "outcome": outcome} | more) + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        for item in session.items:
            _append(item.nodeid, "found")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _append(report.nodeid, "failed", tail=report.longreprtext[-2000:])


def pytest_runtest_logstart(nodeid: str) -> None:
    _append(nodeid, "began")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        broken = _broken()
        tail = f"{report.longreprtext[-2000:]}{broken}"
        _append(report.nodeid, "failed", seconds=report.duration, tail=tail)
        if broken:
            os._exit(BROKEN)
    elif report.when == "call" or report.skipped:
        _append(report.nodeid, report.outcome, seconds=report.duration)


def _broken() -> str:
    """Return the GPU's error if this process cannot use it any more."""
    torch = sys.modules.get("torch")  # not imported here, since tests without it start faster
    if torch is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return f"\n{error}"
    return ""
