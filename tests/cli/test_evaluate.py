"""`fastdit evaluate`: its numbers, what it says of them, and its errors."""

import json

import numpy as np
import pytest
import torch

import fastdit.cli.evaluate
from fastdit.cli.evaluate import comparability
from fastdit.evaluation import Evaluation, Features, evaluate


def network(images):
    """A stand-in for Inception: means of the image's quarters and of its channels."""
    x = images.float() / 255
    quarters = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
    return Features(quarters[:, :5], quarters[:, 5:], x.mean(dim=(2, 3)))


@pytest.fixture
def sets(tmp_path, monkeypatch):
    monkeypatch.setattr(
        fastdit.cli.evaluate, "load_inception", lambda weights, device, progress: network
    )
    generator = np.random.default_rng(0)
    for name, count in (("samples", 30), ("reference", 20)):
        images = generator.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    return tmp_path / "samples.npz", tmp_path / "reference.npz"


def test_the_numbers_are_printed_and_written(run, sets, tmp_path):
    out = tmp_path / "folder" / "numbers.json"
    done = run("evaluate", *sets, "--json", out, "--device", "cpu", "--batch-size", 7)
    assert done.exit_code == 0, done.output
    expected = evaluate(*sets, network)
    written = json.loads(out.read_text())
    assert written["fid"] == pytest.approx(expected.fid, rel=1e-5)
    assert written["recall"] == expected.recall and written["samples"] == 30
    assert written["versions"]["torch"] == torch.__version__
    assert written["files"] == {"samples": str(sets[0]), "reference": str(sets[1])}
    rows = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines()[:5])
    assert rows == {
        "FID": f"{expected.fid:.4f}",
        "sFID": f"{expected.sfid:.4f}",
        "Inception Score": f"{expected.inception_score:.4f}",
        "precision": f"{expected.precision:.4f}",
        "recall": f"{expected.recall:.4f}",
    }
    assert "30 samples beside 20 images" in done.stdout
    assert "not comparable with published values: 30 samples instead of 50,000" in done.stdout


def test_metrics_that_the_reference_does_not_allow_are_left_out(run, sets, tmp_path):
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=np.zeros(5), sigma=np.eye(5))
    done = run("evaluate", sets[0], path)
    assert done.exit_code == 0, done.output
    assert "sFID                      -\n" in done.stdout
    assert "sFID: not computed: the reference holds no images or mu_s and sigma_s" in done.stdout
    assert "precision, recall: not computed: the reference holds no images\n" in done.stdout
    assert "30 samples beside statistics" in done.stdout


def test_what_is_computed_as_published_is_said_to_be_comparable():
    found = Evaluation(2.3, 4.6, 278.0, 1.0, 0.8, 0.6, 50_000, 10, 10_000, True, True)
    said = comparability(found)
    assert said["Inception Score"] == "comparable with published values"
    for name in ("FID", "sFID", "precision", "recall"):
        assert said[name].startswith("comparable with published values, if the reference is ADM's")


ERRORS = {
    "samples": (["gone.npz", "reference.npz"], "gone.npz: no such file or folder"),
    "reference": (["samples.npz", "gone"], "gone: no such file or folder"),
    "json": (["samples.npz", "reference.npz", "--json", "."], "--json: expected a file's name"),
    "size": (
        ["samples.npz", "reference.npz", "--image-size", 8],
        "--image-size: expected a folder",
    ),
    "device": (["samples.npz", "reference.npz", "--device", "gpu"], "--device: expected one that"),
    "weights": (["samples.npz", "reference.npz", "--weights", "w.pth"], "weights: w.pth: no such"),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line(arguments, message, run, sets, tmp_path, monkeypatch):
    monkeypatch.undo()  # the stand-in too, so that weights are looked for
    monkeypatch.chdir(tmp_path)
    done = run("evaluate", *arguments)
    assert done.exit_code == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_interruption_says_that_nothing_was_written(run, sets, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(fastdit.cli.evaluate, "compare", interrupted)
    done = run("evaluate", *sets)
    assert done.exit_code == 130 and done.stderr == "interrupted; nothing was written\n"
