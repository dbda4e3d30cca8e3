"""What rows of `_tune.py` mean for the code: the best configuration, its gain, its line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _harness import ROOT, table

KERNELS = ROOT / "kernels"
COLUMNS = {
    "kernel": "",
    "shape": "",
    "dtype": "",
    "default": "",
    "us": ".1f",
    "best": "",
    "best us": ".1f",
    "faster": ".2f",
}
Row = dict[str, Any]
Values = dict[str, int]


@dataclass(frozen=True)
class Table:
    """Where a kernel's configurations are listed: a file, the name above the list, the entries."""

    file: str
    name: str
    entry: tuple[str, ...]  # which values make an entry, in order; "maxnreg" only where it is given
    kind: str = ""  # the class of an entry, if it is not a plain tuple


_TILE = ("num_warps", "num_stages")
_OWN_STEP = (("BM", "BN", *_TILE, "maxnreg"), "Tile")
_STEP_OWN = (("BN", "BM", *_TILE, "maxnreg"), "Tile")
_ROWS = ("ROWS", "num_warps")
TABLES = {
    "attention_fwd": Table("attention_configs.py", "_FWD", *_OWN_STEP),
    "attention_dq_bwd": Table("attention_configs.py", "_DQ", *_OWN_STEP),
    "attention_dkv_bwd": Table("attention_configs.py", "_DKV", *_STEP_OWN),
    "trajectory": Table("trajectory_configs.py", "_SIZES", ("CHUNK", *_TILE, "STAGES")),
    "sampler_update": Table("sampling.py", "sampler_update_configs", ("BLOCK", "num_warps")),
}
for _kernel in ("layer_norm_modulate", "gated_residual_layer_norm_modulate"):
    for _pass in ("fwd", "bwd"):
        _name = f"layer_norm_modulate_{_pass}_configs"
        TABLES[f"{_kernel}_{_pass}"] = Table("adaln.py", _name, _ROWS)


def best_of(rows: Iterable[Row]) -> list[Row]:
    """A line a kernel and shape: its default, its best, and how many times as fast that is."""
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
    """A configuration as its table has it: "Tile(128, 64, 8, 3)"."""
    place, values = TABLES[row["kernel"]], row["values"]
    listed = [name for name in place.entry if name != "maxnreg" or values.get(name)]
    return f"{place.kind}({', '.join(str(values.get(name, '-')) for name in listed)})"


def changes(rows: list[Row], folder: Path = KERNELS) -> list[str]:
    """For each line of code that lists configurations, what to put first in it.

    A line serves several shapes: the best is the entry with the least geometric mean of its times
    over the default's, among those that ran on every shape.
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
    """By entry the geometric mean over the shapes of its time over the default's."""
    times: dict[tuple[str, str, str], dict[str, float]] = {}
    defaults: dict[tuple[str, str, str], str] = {}
    for row in rows:
        key = row["kernel"], row["shape"], row["dtype"]
        if row["default"]:
            defaults[key] = entry_of(row)
        if isinstance(row.get("us"), float):
            times.setdefault(key, {})[entry_of(row)] = row["us"]
    shapes = [key for key in times if defaults.get(key) in times[key]]
    if not shapes:
        return {}
    everywhere = set.intersection(*(set(times[key]) for key in shapes))
    return {
        entry: math.exp(
            sum(math.log(times[key][entry] / times[key][defaults[key]]) for key in shapes)
            / len(shapes)
        )
        for entry in everywhere
    }


def line_of(row: Row, folder: Path = KERNELS) -> tuple[str, int] | None:
    """(file, number) of the line that lists a row's configurations, or None."""
    place = TABLES[row["kernel"]]
    source = (folder / place.file).read_text().splitlines()
    pattern = rf"(def )?{place.name}\b"
    start = next((i for i, line in enumerate(source) if re.match(pattern, line)), None)
    if start is None:
        return None
    below = list(enumerate(source))[start + 1 :]
    if place.name.startswith("_"):  # a table by architecture
        family = rf'\s+"{row["arch"]}": '
        below = [(i, line) for i, line in below]
        at = next((n for n, (_, line) in enumerate(below) if re.match(family, line)), None)
        if at is None:
            return None
        if row["kernel"] == "trajectory":  # and in it by tokens and hidden
            _, tokens, hidden = row["shape"].split("x")
            of_shape = rf"\s+\({tokens}, {hidden}\): \["
            found = (i for i, line in below[at:] if re.match(of_shape, line))
        else:
            found = (i for i, line in below[at:] if re.match(family, line))
    else:
        found = (i for i, line in below if re.match(r"\s+return ", line))
    number = next(found, None)
    return None if number is None else (place.file, number + 1)


def _with_first(line: str, entry: str) -> str | None:
    """A line's list with an entry moved to its front; None where it does not list it literally."""
    head, bracket, tail = line.partition("[")
    entries = re.findall(r"\w*\([^()]*\)", tail)
    if entry not in entries:
        return None
    others = [own for own in entries if own != entry]
    return f"{head}{bracket}{', '.join([entry, *others])}{tail[tail.rindex(']') :]}"


def print_advice(rows: list[Row]) -> None:
    print(table(COLUMNS, best_of(rows)))
    print("\n".join(["", *changes(rows)]))
