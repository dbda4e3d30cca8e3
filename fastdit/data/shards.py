"""Many images: batches that processes share, kept as they are made, and one file at the end.

Batches are cut by the images' global index, and the last one is computed whole, since a matrix
product's bits change with its rows; processes take whole batches in turn. So the file's bytes do
not depend on how many processes made it, or on how often they were stopped and started again.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.lib import format as npy
from tqdm import tqdm

from fastdit.data.files import atomic_path

PLAN = "plan.json"


def write_many(
    out: Path,
    make: Callable[[int], np.ndarray],
    plan: dict[str, Any],
    key: str,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Make `plan["num"]` images in batches and write them to one NPZ.

    Finished batches lie in a folder beside `out` until the file is whole. A call that finds them
    goes on from there.

    Args:
        out: the file.
        make: makes the batch that starts at a global index, of `plan["batch_size"]` images, as one
            array with the image first.
        plan: "num", "batch_size" and whatever else decides the images' bytes, for JSON.
        key: the array's name in the file.
        rank: of this process; it makes every world-th batch.
        world: number of processes; the first one writes the file when all have done their part.

    Raises:
        ValueError: the folder holds batches of another plan.
        OSError: a file cannot be written.
    """
    folder = out.with_name(f"{out.name}.parts")
    parts = write_parts(folder, make, plan, rank, world)
    if rank == 0:
        _join(parts, out, key, plan["num"])
        shutil.rmtree(folder)


def write_parts(
    folder: Path,
    make: Callable[[int], np.ndarray],
    plan: dict[str, Any],
    rank: int = 0,
    world: int = 1,
) -> list[Path]:
    """Batches of `write_many` as files of their own, which stay; returns once all are there."""
    _agree(folder, plan)
    num, size = plan["num"], plan["batch_size"]
    parts = [folder / f"{i:08d}.npy" for i in range(-(-num // size))]
    own = range(rank, len(parts), world)
    with tqdm(total=len(own), unit="batch", desc=f"rank {rank}", disable=rank > 0) as bar:
        for i in own:
            if _rows(parts[i]) != min(size, num - i * size):  # not there, or damaged
                content = io.BytesIO()  # NumPy's own writing to a file can miss that a disk is full
                np.save(content, make(i * size)[: num - i * size])
                with atomic_path(parts[i]) as aside:
                    aside.write_bytes(content.getbuffer())
            bar.update()
    if world > 1:
        dist.barrier()
    return parts


def _rows(part: Path) -> int:
    """How many images a part holds whole; 0 where it is not there or damaged."""
    try:
        return len(np.load(part, mmap_mode="r"))
    except (OSError, ValueError, EOFError):
        return 0


def _agree(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or see that it is the one whose batches lie there."""
    if plan["num"] < 1 or plan["batch_size"] < 1:
        raise ValueError(f"expected 1 image or more, and as many a batch, got {plan}")
    wanted = json.dumps(plan, indent=1, sort_keys=True)
    before = read_plan(folder)
    if before is None:
        with atomic_path(folder / PLAN) as aside:
            aside.write_text(wanted)
        return
    plan = json.loads(wanted)
    other = sorted(n for n in {**plan, **before} if plan.get(n) != before.get(n))
    if other:
        raise ValueError(
            f"{folder}: the batches there are of another call: they differ in {', '.join(other)}; "
            "remove the folder, or write elsewhere"
        )


def read_plan(folder: Path) -> dict[str, Any] | None:
    """The plan whose batches lie in a folder; None where there is none.

    Raises:
        ValueError: it is damaged.
    """
    try:
        plan = json.loads((folder / PLAN).read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{folder / PLAN}: it is damaged ({error}); remove {folder}") from error
    if not isinstance(plan, dict):
        raise ValueError(f"{folder / PLAN}: it is damaged; remove {folder}")
    return plan


def _join(parts: list[Path], out: Path, key: str, num: int) -> None:
    """One array of an NPZ, written part by part."""
    first = np.load(parts[0], mmap_mode="r")
    header = {
        "descr": npy.dtype_to_descr(first.dtype),
        "fortran_order": False,
        "shape": (num, *first.shape[1:]),
    }
    with (
        atomic_path(out) as aside,
        zipfile.ZipFile(aside, "w", allowZip64=True) as archive,
        archive.open(f"{key}.npy", "w", force_zip64=True) as file,
    ):
        npy.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.load(part).tobytes())
