"""What the rows of `_tune.py` mean for the code: best configurations, gains, lines to change."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from _harness import ROOT, Row, columns, table

KERNELS = ROOT / "kernels"
COLUMNS = columns("kernel, shape, dtype, default; us: .1f; best; best us: .1f; faster: .2f")


@dataclass(frozen=True)
class Table:
    """Where a kernel's configurations are listed.

    Attributes:
        file: in the folder of the kernels.
        name: the table or the function that holds the list.
        entry: the values of an entry in order; "maxnreg" may be missing.
        kind: the class of an entry, if it is not a plain tuple.
    """

    file: str
    name: str
    entry: tuple[str, ...]
    kind: str = ""


_LAUNCH = ("num_warps", "num_stages")
_BY_QUERY, _BY_KEY = ("BM", "BN", *_LAUNCH, "maxnreg"), ("BN", "BM", *_LAUNCH, "maxnreg")
TABLES = {
    "attention_fwd": Table("attention_configs.py", "_FWD", _BY_QUERY, "Tile"),
    "attention_dq_bwd": Table("attention_configs.py", "_DQ", _BY_QUERY, "Tile"),
    "attention_dkv_bwd": Table("attention_configs.py", "_DKV", _BY_KEY, "Tile"),
    "trajectory": Table("trajectory_configs.py", "_SIZES", ("CHUNK", *_LAUNCH, "STAGES")),
    "sampler_update": Table("sampling.py", "sampler_update_configs", ("BLOCK", "num_warps")),
}
for _pass in ("fwd", "bwd"):
    _own = Table("adaln_configs.py", f"norm_modulate_{_pass}_configs", ("ROWS", "num_warps"))
    TABLES[f"layer_norm_modulate_{_pass}"] = _own
    TABLES[f"gated_residual_layer_norm_modulate_{_pass}"] = _own
    _own = Table("qk_norm_rope.py", f"qk_norm_rope_{_pass}_configs", ("ROWS", "num_warps"))
    TABLES[f"qk_norm_rope_{_pass}"] = _own
    _own = Table("swiglu.py", "swiglu_configs", ("ROWS", "COLUMNS", "num_warps"))
    TABLES[f"swiglu_{_pass}"] = _own


def best_of(rows: Iterable[Row]) -> list[Row]:
    """Return a line for each kernel and shape: its default, its best configuration, the gain."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["shape"], row["dtype"], row["arch"]), []).append(row)
    lines = []
    for (kernel, shape, dtype, arch), own in groups.items():
        timed = [row for row in own if isinstance(row.get("us"), float)]
        default = next((row for row in own if row["default"]), None)
        if not timed or default is None:
            continue
        best = min(timed, key=lambda row: row["us"])
        line = {"kernel": kernel, "shape": shape, "dtype": dtype, "arch": arch, "us": default["us"]}
        line |= {"default": entry_of(default), "best": entry_of(best), "best us": best["us"]}
        if isinstance(default["us"], float):
            line["faster"] = default["us"] / best["us"]
        lines.append(line)
    return lines


def entry_of(row: Row) -> str:
    """Return a configuration as its table spells it: "Tile(128, 64, 8, 3)"."""
    place, values = TABLES[row["kernel"]], row["values"]
    listed = [name for name in place.entry if name != "maxnreg" or values.get(name)]
    return f"{place.kind}({', '.join(str(values.get(name, '-')) for name in listed)})"


def changes(rows: list[Row], folder: Path = KERNELS) -> list[str]:
    """Say for each line of code that lists configurations which entry should come first.

    A line may serve several shapes. The best entry has the least geometric mean of its times over
    the default's times, among the entries that ran on every shape.
    """
    lines: dict[tuple[str, int], list[Row]] = {}
    advice = []
    for row in rows:
        place = line_of(row, folder)
        if place is None:
            advice.append(f"{TABLES[row['kernel']].file}: no line lists {entry_of(row)}")
        else:
            lines.setdefault(place, []).append(row)
    for (file, number), own in lines.items():
        means = _means(own)
        if not means:
            continue
        best = min(means, key=lambda entry: means[entry])
        old = (folder / file).read_text().splitlines()[number - 1].strip()
        where = f"kernels/{file}:{number}"
        if means[best] == 1.0:
            advice.append(f"{where}: stays as it is, its first entry is the fastest")
            continue
        faster = f"{1 / means[best]:.2f} times as fast as the default"
        new = _with_first(old, best)
        change = f"becomes  {new}" if new else f"put {best} first in  {old}"
        advice.append(f"{where}: {best} is {faster}: {change}")
    return list(dict.fromkeys(advice))


def _means(rows: list[Row]) -> dict[str, float]:
    """Return by entry the geometric mean over the shapes of its time over the default's time."""
    times: dict[tuple[str, str, str], dict[str, float]] = {}
    defaults: dict[tuple[str, str, str], str] = {}
    for row in rows:
        key = row["kernel"], row["shape"], row["dtype"]
        if row["default"]:
            defaults[key] = entry_of(row)
        if isinstance(row.get("us"), float):
            times.setdefault(key, {})[entry_of(row)] = row["us"]
    shapes = [(own, own[defaults[key]]) for key, own in times.items() if defaults.get(key) in own]
    if not shapes:
        return {}
    everywhere = set.intersection(*(set(own) for own, _ in shapes))
    return {
        entry: statistics.geometric_mean(own[entry] / default for own, default in shapes)
        for entry in everywhere
    }


def line_of(row: Row, folder: Path = KERNELS) -> tuple[str, int] | None:
    """Return (file, number) of the line that lists a row's configurations, or None."""
    place = TABLES[row["kernel"]]
    headings = [rf"(def )?{place.name}\b"]
    if place.name.startswith("_"):  # a table by architecture
        headings.append(rf'\s+"{row["arch"]}": ')
    else:
        headings.append(r"\s+return ")
    if row["kernel"] == "trajectory":  # whose table is also by tokens and hidden
        _, tokens, hidden = row["shape"].split("x")
        headings.append(rf"\s+\({tokens}, {hidden}\): \[")
    numbered = enumerate((folder / place.file).read_text().splitlines(), start=1)
    number = None
    for heading in headings:  # each is searched below the previous one
        number = next((n for n, line in numbered if re.match(heading, line)), None)
    return None if number is None else (place.file, number)


def _with_first(line: str, entry: str) -> str | None:
    """Return a line with an entry of its list moved to the front, or None if it is not there."""
    head, bracket, tail = line.partition("[")
    entries = re.findall(r"\w*\([^()]*\)", tail)
    if entry not in entries:
        return None
    others = [own for own in entries if own != entry]
    return f"{head}{bracket}{', '.join([entry, *others])}{tail[tail.rindex(']') :]}"


def print_advice(rows: list[Row]) -> None:
    print(table(COLUMNS, best_of(rows)))
    print("\n".join(["", *changes(rows)]))
