"""The report keeps every result, whatever fails, crashes or is killed, and keeps to its limit."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastdit

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FACTS = {"device": "NVIDIA H100", "torch": "2.11", "code": "abc", "commit": "1234567890"}

STAND_IN = """
import argparse, json, os, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("rows", type=int)
parser.add_argument("then", nargs="?", default="")
parser.add_argument("--json")
args = parser.parse_args()
with open(os.environ["RUNS"], "a") as runs:
    print(args.rows, args.then, file=runs)
for i in range(args.rows):
    with open(args.json + ".aside", "w") as aside:
        json.dump({"machine": {}, "arguments": {}, "rows": [{"i": j} for j in range(i + 1)]}, aside)
    os.replace(args.json + ".aside", args.json)
    time.sleep(0.1)
print("the last words", flush=True)
if args.then == "raise":
    raise ValueError("broken")
if args.then == "die":
    os.kill(os.getpid(), 11)
if args.then == "hang":
    time.sleep(600)
"""
DRIVER = """
import sys, time
sys.path.insert(0, {benchmarks!r})
from pathlib import Path
from _runner import Runner, Unit
units = [Unit("first", ({script!r}, 3), 1, 60, ""), Unit("second", ({script!r}, 100), 1, 60, "")]
Runner(Path({folder!r}), {facts!r}, {{}}, time.monotonic() + 60).run(units)
"""


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def stand_in(tmp_path, monkeypatch, benchmarks):
    """Make units that write some rows and then end as told; `tmp_path / "runs"` logs each run."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    from _runner import Unit

    def make(name, *options, cap=60):
        return Unit(name, (script, *options), estimate=1, cap=cap, source="")

    return make


def runner(tmp_path, seconds=60, facts=FACTS, earlier=None, least=0):
    from _runner import Runner

    deadline = time.monotonic() + seconds
    return Runner(tmp_path / "out", facts, {}, deadline, earlier, least)


def read(tmp_path):
    return json.loads((tmp_path / "out" / "stand_in.json").read_text())


def rows_of(document, name):
    return [row["i"] for row in document["rows"] if row["unit"] == name]


def test_a_unit_that_fails_ends_alone_and_leaves_its_rows_and_last_words(tmp_path, stand_in):
    ends = ("raise", "die", "hang")
    units = [stand_in(end, 2, end, cap=2 if end == "hang" else 60) for end in ends]
    assert not runner(tmp_path).run([*units, stand_in("good", 3)])
    document = read(tmp_path)
    statuses = {name: unit["status"] for name, unit in document["units"].items()}
    assert statuses == {"raise": "failed", "die": "failed", "hang": "over its time", "good": "done"}
    for name in ends:
        assert rows_of(document, name) == [0, 1]
        assert "the last words" in document["units"][name]["tail"]
    assert "ValueError: broken" in document["units"]["raise"]["tail"]
    assert document["units"]["die"]["exit status"] == -11
    assert rows_of(document, "good") == [0, 1, 2]


def test_one_limit_holds_for_all_units(tmp_path, stand_in):
    start = time.monotonic()
    units = [stand_in("long", 1000), stand_in("late", 1)]
    assert not runner(tmp_path, seconds=2, least=0.5).run(units)
    assert time.monotonic() - start < 5
    document = read(tmp_path)
    assert document["units"]["long"]["status"] == "over its time" and rows_of(document, "long")
    assert document["left_out"] == ["late"] and "late" not in document["units"]


def test_a_resumed_run_skips_what_was_done_on_this_machine_and_code(tmp_path, stand_in):
    first = [stand_in("good", 2), stand_in("bad", 3, "raise")]
    runner(tmp_path).run(first)
    fewer = [first[0], stand_in("bad", 1, "raise"), stand_in("new", 1)]
    runner(tmp_path, facts=FACTS | {"commit": "of results"}, earlier=tmp_path / "out").run(fewer)
    ran = (tmp_path / "runs").read_text().splitlines()
    assert ran == ["2 ", "3 raise", "1 raise", "1 "]
    document = read(tmp_path)
    assert rows_of(document, "good") == [0, 1] and rows_of(document, "new") == [0]
    assert rows_of(document, "bad") == [0, 1, 2], "the second try had fewer rows"
    elsewhere = tmp_path / "elsewhere"
    assert runner(elsewhere, earlier=tmp_path / "out").run(first[:1])
    assert rows_of(read(elsewhere), "good") == [0, 1], "the file holds both runs"
    runner(tmp_path, facts=FACTS | {"code": "other"}, earlier=tmp_path / "out").run(first[:1])
    assert (tmp_path / "runs").read_text().splitlines()[-1] == "2 "
    assert list(read(tmp_path)["units"]) == ["good"]


def wait_for(path, ready, process, seconds=120):
    """Wait until the document at a path is ready, and return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        if path.exists() and ready(document := json.loads(path.read_text())):
            return document
        time.sleep(0.05)
    raise AssertionError(f"{path}: not ready after {seconds} s")


@pytest.fixture
def start():
    """Start scripts, which are killed with their own processes at the end of the test."""
    started = []

    def make(*command, **options):
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # threads are slow on a busy machine
            **options,
        )
        started.append(process)
        return process

    yield make
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()


def output_of(process):
    """Return all output of a process, which must succeed."""
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


def test_a_kill_of_the_runner_loses_no_finished_unit(tmp_path, stand_in, start):
    facts = {"benchmarks": str(BENCHMARKS), "folder": str(tmp_path / "out"), "facts": FACTS}
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(script=str(tmp_path / "stand_in.py"), **facts))
    process = start(driver)
    path = tmp_path / "out" / "stand_in.json"
    seen = wait_for(path, lambda d: len(rows_of(d, "second")) > 1, process)
    process.kill()
    process.communicate()
    document = read(tmp_path)
    assert document["units"]["first"]["status"] == "done"
    assert rows_of(document, "first") == [0, 1, 2]
    assert document["units"]["second"]["status"] == "running"
    assert len(rows_of(document, "second")) >= len(rows_of(seen, "second"))


EAGER = ("--device", "cpu", "--way", "fastdit eager")
LONG = {
    "sample_throughput.py": (*"--batch 1 2 3 4 --steps 20 --rounds 99".split(), *EAGER),
    "train_throughput.py": (*"--batch 8 --per-class 1 --rounds 999 --steps 1".split(), *EAGER),
    "kernels.py": "--quick --op sampler_update attention --rounds 999 --device cpu".split(),
}


def is_measured(row):
    return bool(row.keys() & {"first run s", "first step s", "us"})


@pytest.mark.parametrize("script", LONG)
def test_a_killed_benchmark_leaves_a_whole_file_of_its_rows(script, tmp_path, start):
    path, options = tmp_path / "rows.json", LONG[script]
    process = start(BENCHMARKS / script, *options, "--json", path)
    seen = wait_for(path, lambda d: any(map(is_measured, d["rows"])), process)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    document = json.loads(path.read_text())
    assert "commit" in document["machine"]
    assert is_measured(document["rows"][0]) and len(document["rows"]) >= len(seen["rows"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run where there is no GPU")
@pytest.mark.parametrize("signalled", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_a_killed_report_leaves_a_whole_file_of_its_rows(signalled, tmp_path, monkeypatch, start):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    options = ("--unit", "train", "--out", tmp_path / "out")
    process = start(BENCHMARKS / "report.py", *options)
    path = tmp_path / "out" / "dry-run" / "train_throughput.json"
    wait_for(path, lambda d: any(map(is_measured, d["rows"])), process)
    process.send_signal(signalled)
    process.communicate()
    assert process.returncode in (-signal.SIGKILL, 1)
    document = json.loads(path.read_text())
    assert document["rows"][0]["unit"] == "train" and is_measured(document["rows"][0])
    expected = "running" if signalled == signal.SIGKILL else "stopped"
    assert document["units"]["train"]["status"] == expected


TESTS = """
import os, time, pytest
def test_a(): pass
@pytest.mark.parametrize("word", ["a b", "c"])
def test_b(word): assert not word
def test_c(): os._exit(3)
def test_d(): pytest.skip("no")
@pytest.fixture
def bad_end():
    yield
    raise ValueError("at the end")
def test_e(bad_end): pass
def test_f(): time.sleep(600)
"""


def outcomes(path):
    return {row["test"]: row["outcome"] for row in json.loads(path.read_text())["rows"]}


def test_a_crash_costs_one_test_a_broken_file_its_own_and_a_kill_none(tmp_path, start):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name\n")
    options = ("--processes", 1, "--json", "rows.json", "test_some.py", "test_broken.py")
    process = start(BENCHMARKS / "_tests.py", *options, cwd=tmp_path)
    path = tmp_path / "rows.json"
    wait_for(path, lambda d: d["running"] == ["test_some.py::test_f"], process)
    os.killpg(process.pid, signal.SIGKILL)  # while test_f sleeps
    process.communicate()
    assert outcomes(path) == {
        "test_broken.py": "failed",
        "test_some.py::test_a": "passed",
        "test_some.py::test_b[a b]": "failed",
        "test_some.py::test_b[c]": "failed",
        "test_some.py::test_c": "failed",
        "test_some.py::test_d": "skipped",
        "test_some.py::test_e": "failed",
    }
    assert json.loads(path.read_text())["running"] == ["test_some.py::test_f"]
    tails = {row["test"]: row.get("tail", "") for row in json.loads(path.read_text())["rows"]}
    assert "nothing_of_this_name" in tails["test_broken.py"]
    assert "ended with status 3" in tails["test_some.py::test_c"]
    assert "at the end" in tails["test_some.py::test_e"]


def test_the_plan_fits_a_first_command_and_its_units_take_their_options(benchmarks):
    import _tests
    import _units
    import sample_throughput
    import train_throughput

    import kernels

    units = _units.plan(8)
    names = [unit.name for unit in units]
    assert names[:5] == ["smoke", "xl", "toy", "tune", "tune-trajectory"]
    assert len(set(names)) == len(names) and all(unit.cap > unit.estimate for unit in units)
    assert _units.START + sum(unit.estimate for unit in units[:5]) < 420
    assert units[0].cap <= 75, "the smoke test is to end within a minute"
    parsers = {
        "sample_throughput.py": lambda argv: sample_throughput.parse(["--device", "cuda", *argv]),
        "train_throughput.py": train_throughput.parse,
        "kernels.py": kernels.parse,
        "_tests.py": _tests.parse,
    }
    for unit in units:
        script, *options = map(str, unit.command)
        assert (BENCHMARKS / script).exists()
        if script in parsers:
            parsers[script](options)
        assert "max-autotune" not in " ".join(options)
    lines = _units.plan_table(units).splitlines()
    assert [line.split()[0] for line in lines[2:]] == names
    so_far = [int(line.split()[3]) for line in lines[2:]]
    assert so_far[-1] == round(_units.START + sum(unit.estimate for unit in units))
    assert so_far == sorted(so_far)


def test_the_plan_times_every_op(benchmarks):
    import _units
    from _ops import OPS

    commands = [list(map(str, unit.command)) for unit in _units.plan(8)]
    timed = [own[own.index("--op") + 1] for own in commands if own[0] == "kernels.py"]
    assert sorted(timed) == sorted(OPS)


def test_plan_is_printed_and_writes_nothing(tmp_path, start):
    process = start(BENCHMARKS / "report.py", "--plan", "--out", tmp_path / "out")
    assert "tune-trajectory" in output_of(process)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the output without a GPU")
def test_report_does_not_pretend_to_have_a_gpu(tmp_path, start):
    process = start(BENCHMARKS / "report.py", "--unit", "smoke", "tune", "--out", tmp_path / "out")
    output = output_of(process)
    for name in ("smoke", "tune"):
        assert f"{name}: not measured, since it needs a GPU" in output
    assert not list(tmp_path.iterdir())


def test_report_says_what_kernels_compile_to_and_resumes(tmp_path, start):
    arguments = "--aot --arch sm_90 --match sampler_update --processes 2 --resume --out".split()
    output = output_of(start(BENCHMARKS / "report.py", *arguments, tmp_path))
    assert "4 launches, 0 with faults" in output
    path = tmp_path / "aot" / "aot.json"
    document = json.loads(path.read_text())
    assert document["left_out"] == []
    for row in document["rows"]:
        assert (row["kernel"], row["arch"]) == ("sampler_update_kernel", "sm_90")
        assert row["registers"] > 0 and row["spills"] == 0 and row["load bits"] == 128

    document["rows"][0]["registers"] = -1  # would be gone if it were compiled again
    path.write_text(json.dumps(document))
    output_of(start(BENCHMARKS / "report.py", *arguments, tmp_path))
    assert json.loads(path.read_text())["rows"][0]["registers"] == -1


def test_running_out_of_memory_leaves_a_row_and_the_others_go_on(benchmarks, monkeypatch, tmp_path):
    import _loops as loops
    import train_throughput as train
    from _harness import Results

    made, make = [], loops.make_loop

    def make_loop(way, task, initial):
        made.append((way, task.recipe.batch_size))
        if made[-1] == ("plain eager", 4):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return make(way, task, initial)

    monkeypatch.setattr(loops, "make_loop", make_loop)
    recipe = replace(train.RECIPES["seed"], steps=9, label_dropout=0.0, ema=None)
    device = torch.device("cpu")
    task = loops.Task(fastdit.PRESETS["toy"], recipe, train.Shapes(1), device)
    results = Results(tmp_path / "r.json", {}, {}, rows=[])
    turns = train.Turns(rounds=1, steps=1)
    train.measure_rates(["plain eager", "fastdit eager"], task, [2, 4, 8], turns, results)
    document = json.loads((tmp_path / "r.json").read_text())
    rows = {(row["batch"], row["way"]): row for row in document["rows"]}
    assert rows[4, "plain eager"]["images/s"] == "out of memory"
    assert [batch for way, batch in made if way == "plain eager"] == [2, 4]
    assert all(rows[batch, "fastdit eager"]["images/s"] > 0 for batch in (2, 4, 8))
    assert rows[2, "fastdit eager"]["ratio"] > 0 and "ratio" not in rows[8, "fastdit eager"]


def test_columns_are_headings_with_the_format_of_their_group(benchmarks):
    from _harness import columns

    expected = {"way": "", "rows": ",d", "max": ",d", "ms/step": ".1f"}
    assert columns("way; rows, max: ,d; ms/step: .1f") == expected


def test_a_copy_without_git_is_told_its_commit(benchmarks, monkeypatch):
    from _harness import machine

    monkeypatch.setenv("FASTDIT_COMMIT", "0123456789abcdef")
    facts = machine(torch.device("cpu"))
    assert facts["commit"] == "0123456789" and len(facts["code"]) == 12
