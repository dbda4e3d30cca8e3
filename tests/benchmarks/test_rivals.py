"""Other runtimes in processes of their own: what they answer, how they fail, how they end.

No test but the last needs these runtimes: a fake one takes their place.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")
FAKE = '''
import os
import signal
import threading
import time

import _ways as ways


def killed_after(calls, case):
    """The plain model in the plain loop, whose process is killed when it is called once more."""
    sample, made = ways.plain_loop(case, case.plain), []

    def way(labels, given):
        if len(made) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.06)  # a shorter call would be repeated
        made.append(sample(labels, given))
        return made[-1]

    return way


def echo():
    return answer


def spinning():
    return spin


def answer(labels, given):
    if labels[0] < 0:
        raise ValueError("expected a label of at least 0")
    time.sleep(0.05)
    return given[0] + given[1][0] if given else labels.float()


def spin(labels, given):
    """Leave a thread behind that uses the CPU for a while, as those of a pool do."""
    end = time.monotonic() + 0.5

    def wait():
        while time.monotonic() < end:
            pass

    threading.Thread(target=wait).start()
    return labels.float()
'''


@pytest.fixture(autouse=True)
def fake(monkeypatch, tmp_path):
    """Make the benchmarks and a module of fake ways importable, in new processes too."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "fake_ways.py").write_text(FAKE)
    monkeypatch.delitem(sys.modules, "fake_ways", raising=False)
    import fake_ways

    return fake_ways


def toy_case(*options):
    import sample_throughput

    args = sample_throughput.parse(["--steps", "2", "--device", "cpu", *options])
    return sample_throughput.make_case("toy", args.dtype[0], args)


def test_a_missing_package_is_named_with_the_extra_that_has_it(monkeypatch, capsys):
    import sample_throughput

    found, missing = importlib.util.find_spec, {"openvino", "onnx"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else found(name)
    )
    for way, package in (("openvino", "openvino"), ("onnxruntime", "onnx")):
        with pytest.raises(SystemExit):
            sample_throughput.parse(["--way", way, "--device", "cpu"])
        message = capsys.readouterr().err
        assert f"--way: '{way}' needs" in message and f"{package}; pip install" in message
        assert "'fastdit[rivals]'" in message
    assert not {"openvino", "onnxruntime"} & set(sample_throughput.parse([]).way)


def test_rivals_are_timed_on_a_cpu_in_float32_only():
    import _rivals
    import _ways

    reason = _rivals.obstacle("openvino", torch.device("cuda"))
    assert reason == "is timed on a CPU only"
    assert _ways.case_obstacle("openvino", toy_case()) is None
    case = toy_case("--dtype", "bfloat16")
    assert _ways.case_obstacle("onnxruntime", case) == "is timed in float32 only"


def test_a_process_answers_with_seconds_and_images_and_ends_with_an_error(
    fake, monkeypatch, tmp_path
):
    """What the process does runs here, with requests that have been sent before."""
    import _rivals

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(_rivals, "_end_with_parent", lambda folder: None)
    monkeypatch.setattr(tempfile, "tempdir", None)
    ours, theirs = multiprocessing.Pipe()
    labels, x_T, noise = torch.tensor([1, 2]), torch.randn(2, 3), torch.randn(4, 2, 3)
    ours.send((labels.numpy(), (x_T.numpy(), noise.numpy()), False))
    ours.send((labels.numpy(), None, True))
    ours.send((-labels.numpy(), None, True))
    _rivals._serve(theirs, fake.echo, str(tmp_path))
    assert ours.recv() == (None, None), "it is ready"
    for images in (x_T + noise[0], labels.float()):
        error, (seconds, answer) = ours.recv()
        assert error is None and 0.05 <= seconds < 5
        assert torch.equal(torch.from_numpy(answer), images)
    error, answer = ours.recv()
    assert error.startswith("ValueError: expected a label of at least 0\n") and answer is None
    assert "fake_ways.py" in error, "the traceback follows"
    ours.close()
    theirs.close()


def test_a_process_answers_when_its_threads_are_idle_and_ends_with_an_interruption(fake):
    import _rivals

    rival = _rivals.Rival("fake", fake.spinning)
    folder, labels = Path(rival._folder.name), torch.tensor([3])
    with pytest.raises(KeyboardInterrupt):
        with contextlib.ExitStack() as processes:
            processes.callback(rival.close)
            start = time.monotonic()
            assert rival.seconds(labels) < 0.4, "the spinning is no part of the run"
            assert time.monotonic() - start > 0.4, "but nothing else is timed meanwhile"
            assert rival(labels, None) == 3
            raise KeyboardInterrupt
    assert not rival.process.is_alive() and not multiprocessing.active_children()
    assert not folder.exists()


def test_a_rival_takes_turns_and_its_death_is_told_in_its_row(fake, monkeypatch):
    import _rivals
    import _ways
    import sample_throughput
    from _harness import Results
    from tqdm import tqdm

    case, started = toy_case(), []

    def start(case):
        make = functools.partial(fake.killed_after, 3, dataclasses.replace(case))
        started.append(_rivals.Rival("openvino", make))
        return started[-1]

    monkeypatch.setitem(_ways.WAYS, "openvino", start)
    names = ["reference eager", "openvino"]
    sampling = sample_throughput.Sampling(case, 2, names, Results(None, {}, {}))
    with sampling.processes:
        # Three calls: the first run, the one that is judged, and the first round.
        assert sampling.run(2, tqdm(disable=True)) == ["reference eager"]
    plain, rival = (sampling.rows[name] for name in names)
    assert len(plain["seconds"]) == 2
    assert len(rival["seconds"]) == 1 and rival["ratio"] > 0 and rival["compile s"] >= 0
    assert rival["error"] == pytest.approx(plain["error"], rel=0.5)
    assert rival["images/s"] == "failed"
    assert "openvino: its process was ended by SIGKILL" in rival["reason"]
    assert not started[0].process.is_alive() and not multiprocessing.active_children()


def test_openvino_and_onnx_runtime_compute_what_the_reference_computes(tmp_path):
    for package in ("openvino", "onnxruntime", "onnx"):
        pytest.importorskip(package)
    command = [sys.executable, str(BENCHMARKS / "sample_throughput.py"), "--json", tmp_path / "r"]
    command += "--batch 2 --steps 2 --rounds 1 --way openvino onnxruntime".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "r").read_text())
    assert {"openvino", "onnxruntime", "onnx"} <= document["machine"].keys()
    assert [row["way"] for row in document["rows"]] == ["openvino", "onnxruntime"]
    for row in document["rows"]:
        assert len(row["seconds"]) == 1 and row["images/s"] > 0 and row["compile s"] > 0
        assert 0 < row["error"] < 1e-5
