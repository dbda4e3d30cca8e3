"""The C++ kernels are built once, with a message, and fastdit also runs without them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SAMPLE = """
import sys, time, warnings, torch, fastdit
warnings.simplefilter("always")
scheduler = fastdit.DiffusionScheduler(3, schedule="cosine")
sampler = fastdit.Sampler(fastdit.DiT(), scheduler, {options})
start, own = time.perf_counter(), time.process_time()
for _ in range(2):
    images = sampler([1, 2])
wall, own = time.perf_counter() - start, time.process_time() - own
print(wall, own, sampler.execution_for(), images.isfinite().all().item())
"""


def start(cache: Path, options="", **environment):
    return subprocess.Popen(
        [sys.executable, "-c", SAMPLE.format(options=options)],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out.split(), err


@pytest.fixture
def quick_compiler(tmp_path):
    """A compiler that optimises nothing, for tests of when a library is built and loaded."""
    path = tmp_path / "quick-c++"
    path.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    path.chmod(0o755)
    return str(path)


def built(cache: Path) -> list[Path]:
    return list((cache / "fastdit").glob("cpu-*.so"))


def test_a_first_process_says_what_it_builds_and_a_second_loads_it(tmp_path):
    code, (wall, _, execution, finite), err = finish(start(tmp_path))
    assert (code, execution, finite) == (0, "trajectory", "True"), err
    assert float(wall) < 60  # 25 on an idle machine
    (library,) = built(tmp_path)
    assert "building the C++ kernels for this CPU, once, some ten seconds" in err
    assert str(library) in err
    code, (_, own, execution, _), err = finish(start(tmp_path))
    assert (code, execution, err) == (0, "trajectory", "")
    assert float(own) < 2


def test_a_build_that_is_killed_leaves_nothing_behind_that_is_used(tmp_path, quick_compiler):
    killed = start(tmp_path, CXX=quick_compiler)
    while not list(tmp_path.glob("fastdit/building-*/*")):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    finish(killed)
    assert not built(tmp_path)
    # The second waits for the first.
    two = [start(tmp_path, CXX=quick_compiler) for _ in range(2)]
    results = [finish(process) for process in two]
    assert [code for code, _, _ in results] == [0, 0]
    assert len(built(tmp_path)) == 1
    assert sum("building" in err for _, _, err in results) == 1


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_one_warning_and_the_next_execution(tmp_path, compiler):
    code, (_, _, execution, finite), err = finish(start(tmp_path, CXX=compiler))
    assert (code, execution, finite) == (0, "eager", "True")
    assert err.count("fastdit runs without its C++ kernels") == 1 and compiler in err
    code, _, err = finish(start(tmp_path, "execution='trajectory'", CXX=compiler))
    assert code == 1 and "BuildError" in err and compiler in err


def test_a_library_that_cannot_be_loaded_is_a_reason_to_go_on_without(tmp_path, quick_compiler):
    finish(start(tmp_path, CXX=quick_compiler))
    (library,) = built(tmp_path)
    library.write_bytes(b"torn")
    code, (_, _, execution, _), err = finish(start(tmp_path, CXX=quick_compiler))
    assert (code, execution) == (0, "eager") and "runs without its C++ kernels" in err


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "fastdit").write_text("in the way")
    code, (_, _, execution, _), err = finish(start(tmp_path))
    assert (code, execution) == (0, "eager") and "XDG_CACHE_HOME" in err
