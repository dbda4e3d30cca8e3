"""Arrays of many images, computed in batches by any number of processes, interrupted or not.

Each batch becomes a file, a shard, as soon as it is computed. Batches are cut by the images' global
index, and each process takes whole batches in turn. The last batch is computed at full size too,
since a matrix product's bits may change with its number of rows. So the result's bytes do not
depend on the number of processes, or on how often they were stopped and started again.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.lib import format as npy
from tqdm import tqdm

from fastdit.data.files import LOCK, atomic_path, locked

PLAN = "plan.json"


def write_sharded_npz(
    out: Path,
    make: Callable[[int], np.ndarray],
    plan: dict[str, Any],
    key: str,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Compute `plan["num"]` images in batches and write them to one NPZ.

    Finished shards stay in a folder beside `out`, `parts_of(out)`, for a repeated call, until the
    file is whole. The folder is locked meanwhile, so that two calls never mix their shards.

    Args:
        out: the file.
        make: computes the batch of `plan["batch_size"]` images that starts at a global index, as
            one array whose first axis is the image.
        plan: JSON values: "num", "batch_size" and everything else that decides the images' bytes.
        key: the array's name in the file.
        rank: rank of this process; it computes every world-th batch from this one on.
        world: number of processes; rank 0 writes the file when all have done their part.

    Raises:
        ValueError: the folder holds shards of another plan.
        FileExistsError: another call is writing to the folder.
        OSError: a file cannot be written.
    """
    folder = parts_of(out)
    # The other processes write nothing until the first one has locked the folder for all of them.
    with locked(folder, "sampling", remove=True) if rank == 0 else nullcontext():
        if world > 1:
            dist.barrier()
        shards = write_shards(folder, make, plan, rank, world)
        if rank == 0:
            _join(shards, out, key, plan["num"])
            for path in folder.iterdir():
                if path.name != LOCK and path.is_file():
                    path.unlink()


def parts_of(out: Path) -> Path:
    """Return the folder in which `write_sharded_npz` keeps the shards of a file."""
    return out.with_name(f"{out.name}.parts")


def write_shards(
    folder: Path,
    make: Callable[[int], np.ndarray],
    plan: dict[str, Any],
    rank: int = 0,
    world: int = 1,
) -> list[Path]:
    """Write the shards of `write_sharded_npz` to a folder, and return them once all are there."""
    _check_plan(folder, plan)
    compute_shards(folder, make, plan, rank, world)
    if world > 1:
        dist.barrier()
    return shard_paths(folder, plan)


def shard_paths(folder: Path, plan: dict[str, Any]) -> list[Path]:
    """Return the files of a plan's shards, in order."""
    return [folder / f"{i:08d}.npy" for i in range(-(-plan["num"] // plan["batch_size"]))]


def compute_shards(
    folder: Path,
    make: Callable[[int], np.ndarray],
    plan: dict[str, Any],
    rank: int = 0,
    world: int = 1,
) -> None:
    """Write this process's part of the shards that are not there, or damaged."""
    num, size = plan["num"], plan["batch_size"]
    shards = shard_paths(folder, plan)
    own = range(rank, len(shards), world)
    with tqdm(total=len(own), unit="batch", desc=f"rank {rank}", disable=rank > 0) as bar:
        for i in own:
            if _images_in(shards[i]) != min(size, num - i * size):
                content = io.BytesIO()  # since np.save to a file can miss that the disk is full
                np.save(content, make(i * size)[: num - i * size])
                with atomic_path(shards[i]) as aside:
                    aside.write_bytes(content.getbuffer())
            bar.update()


def count_shards(folder: Path) -> int:
    """Return how many shards a folder holds by now."""
    return len(list(folder.glob("*.npy")))


def _images_in(shard: Path) -> int:
    """Return the number of images in a shard; 0 if it is missing or damaged."""
    try:
        return len(np.load(shard, mmap_mode="r"))
    except (OSError, ValueError, EOFError):
        return 0


def _check_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Check that the shards in a folder are of this plan; where there are none, write the plan."""
    if plan["num"] < 1 or plan["batch_size"] < 1:
        raise ValueError(f"expected at least 1 image, and 1 per batch, got {plan}")
    wanted = json.dumps(plan, indent=1, sort_keys=True)
    before = read_plan(folder)
    if before is None or not count_shards(folder):
        with atomic_path(folder / PLAN) as aside:
            aside.write_text(wanted)
        return
    plan = json.loads(wanted)
    if other := sorted(n for n in {**plan, **before} if plan.get(n) != before.get(n)):
        raise other_plan(folder, other)


def other_plan(folder: Path, differing: list[str]) -> ValueError:
    """Return the error for a folder whose plan has other values for some names."""
    advice = f"{', '.join(differing)}; remove the folder, or write elsewhere"
    return ValueError(f"{folder}: it holds shards of another call, which differ in {advice}")


def read_plan(folder: Path) -> dict[str, Any] | None:
    """Return the plan of a folder's shards, or None if it has no plan.

    Raises:
        ValueError: the plan is damaged.
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


def _join(shards: list[Path], out: Path, key: str, num: int) -> None:
    """Write shards as one array of an NPZ, one at a time."""
    first = np.load(shards[0], mmap_mode="r")
    shape, kind = (num, *first.shape[1:]), npy.dtype_to_descr(first.dtype)
    header = {"descr": kind, "fortran_order": False, "shape": shape}
    with (
        atomic_path(out) as aside,
        zipfile.ZipFile(aside, "w", allowZip64=True) as archive,
        archive.open(f"{key}.npy", "w", force_zip64=True) as file,
    ):
        npy.write_array_header_1_0(file, header)
        for shard in shards:
            file.write(np.load(shard).tobytes())
