"""The benchmark of text-to-image models, on tiny ones and in this process."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Return the script; its ways run here, since each process would import everything anew."""
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import text_throughput

    class Here:
        process = SimpleNamespace(pid=os.getpid())

        def __init__(self, name, make):
            self.way = make()

        def __call__(self, labels, given):
            return self.way(labels, given)

        def seconds(self, labels):
            return text_throughput.seconds(lambda: self(labels, None), text_throughput.CPU)

        def close(self):
            pass

    monkeypatch.setattr(text_throughput.rivals, "Rival", Here)
    monkeypatch.setattr(text_throughput.ways, "TEXT_WIDTH", 48)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small gain nothing from more
    yield text_throughput
    torch.set_num_threads(before)


def test_text_throughput_times_ways_that_make_the_same_images(script, tmp_path, capsys):
    path = tmp_path / "r.json"
    sizes = "--hidden 64 --layers 1 --size 8 --steps 3 --batch 2 --rounds 1 --json".split()
    way = ("--way", "diffusers eager", "fastdit eager")
    assert not script.main([*sizes, str(path), *way])
    document = json.loads(path.read_text())
    assert {"device", "threads", "torch", "diffusers", "commit"} <= document["machine"].keys()
    rows = {(row["preset"], row["way"]): row for row in document["rows"]}
    assert set(rows) == {(p, w) for p in ("PixArt", "SD3") for w in way[1:]}
    for row in rows.values():
        assert row["error"] < 1e-4, "float32 against float64"
        assert row["min"] <= row["images/s"] <= row["max"] and len(row["seconds"]) == 1
        assert row["ratio"] > 0 and "to compiled" not in row
        assert row["ms/step"] * 3 * row["images/s"] == pytest.approx(2000)
        if Path("/proc/self/clear_refs").exists():
            assert row["peak MiB"] >= row["imports MiB"] > 100 and row["call MiB"] > 100
    assert "images/s" in capsys.readouterr().out


def test_an_images_prompt_and_noise_are_its_own(script):
    case = script.Case("SD3", "", 64, 1, 8, 3, 1)
    alone, among = case.given(torch.tensor([2])), case.given(torch.arange(3))
    for name in ("x", "text", "pooled"):
        one, many = getattr(alone, name), getattr(among, name)
        assert torch.equal(one[0], many[2]) and not torch.equal(many[0], many[2])
    assert torch.equal(alone.negative, among.negative)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--hidden", "96"), "--hidden: expected a multiple of 64, got 96"),
        (("--size", "9"), "--size: expected an even number, got 9"),
        (("--way", "openvino"), "invalid choice: 'openvino'"),
    ],
)
def test_text_throughput_refuses_bad_arguments(script, capsys, option, message):
    with pytest.raises(SystemExit):
        script.parse(option)
    assert message in capsys.readouterr().err
