"""The advice from timed configurations: the best one, its gain, and the source line to change."""

import math
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def tuned(kernel, shape, dtype="bfloat16", **times):
    """Make rows from `name=(values, microseconds)`, the default first."""
    return [
        {"kernel": kernel, "shape": shape, "dtype": dtype, "arch": "sm_90"}
        | {"values": values, "us": us, "default": "default" if i == 0 else ""}
        for i, (values, us) in enumerate(times.values())
    ]


def tile(BM, BN, num_warps, num_stages):
    return {"BM": BM, "BN": BN, "num_warps": num_warps, "num_stages": num_stages}


SOURCE = """
_FWD: dict[str, _Sizes] = {
    "sm_80": [Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)],
    "sm_90": [Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(128, 128, 8, 2)],
}
_DQ: dict[str, _Sizes] = {
    "sm_90": [Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)],
}
"""


def test_advice_names_the_line_and_what_it_becomes(tmp_path):
    from _advice import best_of, changes

    (tmp_path / "attention_configs.py").write_text(SOURCE)
    a, b, c = tile(128, 64, 8, 3), tile(64, 64, 4, 3), tile(128, 128, 8, 2)
    rows = [
        *tuned("attention_fwd", "2x256x16x72", a=(a, 10.0), b=(b, 8.0), c=(c, 5.0)),
        *tuned("attention_fwd", "128x256x16x72", a=(a, 100.0), b=(b, 50.0), c=(c, "failed")),
        *tuned("attention_dq_bwd", "32x256x16x72", a=(tile(64, 64, 4, 2), 7.0), b=(b, 9.0)),
    ]
    lines = best_of(rows)
    assert [(line["best"], line["faster"]) for line in lines] == [
        ("Tile(128, 128, 8, 2)", 2.0),
        ("Tile(64, 64, 4, 3)", 2.0),
        ("Tile(64, 64, 4, 2)", 1.0),
    ]
    # One line serves both shapes, so that a configuration that failed on one of them is not taken.
    gain = 1 / math.sqrt(0.8 * 0.5)
    assert changes(rows, tmp_path) == [
        f"kernels/attention_configs.py:4: Tile(64, 64, 4, 3) is {gain:.2f} times as fast as the "
        'default: becomes  "sm_90": [Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), '
        "Tile(128, 128, 8, 2)],",
        "kernels/attention_configs.py:7: stays as it is, its first entry is the fastest",
    ]


def test_advice_says_nothing_of_gains_if_the_default_failed(tmp_path):
    from _advice import best_of, changes

    (tmp_path / "attention_configs.py").write_text(SOURCE)
    rows = tuned(
        "attention_fwd", "2x1", a=(tile(128, 64, 8, 3), "failed"), b=(tile(1, 2, 3, 4), 5.0)
    )
    assert "faster" not in best_of(rows)[0] and best_of(rows)[0]["best us"] == 5.0
    assert changes(rows, tmp_path) == []


@pytest.mark.parametrize("kernel", ["attention_fwd", "attention_dq_bwd", "attention_dkv_bwd"])
def test_advice_finds_each_attention_table_of_the_source(kernel):
    from _advice import KERNELS, TABLES, line_of

    (row,) = tuned(kernel, "2x256x16x72", a=(tile(64, 64, 4, 2), 1.0))
    file, number = line_of(row)
    source = (KERNELS / file).read_text().splitlines()
    assert source[number - 1].strip().startswith('"sm_90": [')
    above = [line for line in source[:number] if line.startswith("_")]
    assert above[-1].startswith(TABLES[kernel].name)


@pytest.mark.parametrize(
    ("kernel", "shape", "begins"),
    [
        ("trajectory", "132x16x64", "(16, 64): [("),
        ("layer_norm_modulate_fwd", "2x256x1152", "return "),
        ("gated_residual_layer_norm_modulate_bwd", "2x256x1152", "return "),
        ("sampler_update", "64x4x32x32", "return "),
    ],
)
def test_advice_finds_the_other_lists_of_the_source(kernel, shape, begins):
    from _advice import KERNELS, line_of

    (row,) = tuned(kernel, shape, a=({"ROWS": 1, "num_warps": 1}, 1.0))
    file, number = line_of(row)
    assert (KERNELS / file).read_text().splitlines()[number - 1].strip().startswith(begins)
