"""Shards of labelled pictures, encoded or as pixels, which follow the pictures when they change.

The plan lists every picture with a hash of its content, and with a stamp that tells without reading
the picture that it has not changed. Pictures keep their rows from one call to the next: new ones
take the rows of removed ones and are then appended. So only the shards of pictures that were added,
removed or changed are computed again.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from fastdit.data.files import atomic_path, locked
from fastdit.data.mapped_shards import PLACE, SCALING, plan_digest
from fastdit.data.pictures import Listing, Pictures, read_cropped
from fastdit.data.shards import PLAN, compute_shards, other_plan, read_plan, shard_paths
from fastdit.errors import warn

T = TypeVar("T")

_THREADS = min(16, os.cpu_count() or 1)
_NAMED = 20  # bad pictures that a message names
_CHUNK = 512  # pictures that are read between two updates of the progress bar
_LISTED = ("num", "files", "labels", "classes", "contents", *PLACE)


def write_image_shards(
    out: Path,
    pictures: Pictures,
    make: Callable[[np.ndarray], np.ndarray],
    settings: Mapping[str, Any],
    *,
    skip_bad: bool = False,
    update: bool = True,
    rank: int = 0,
    world: int = 1,
) -> dict[str, Any]:
    """Read pictures, compute something of each, and write it to shards, in batches.

    Before any shard is computed, every picture that is new or has changed is decoded once, which
    finds those that cannot be read. A call that was interrupted can be repeated.

    Args:
        out: the folder to write.
        pictures: the pictures.
        make: computes a batch: [b, H, W, 3] uint8 to an array whose first axis is the image.
        settings: JSON values: "batch_size", "image_size" (a side, or [H, W]) and everything else
            that decides the shards' bytes beside the pictures.
        skip_bad: whether to leave out pictures that cannot be read, with a warning.
        update: whether shards of earlier pictures may be replaced.
        rank: rank of this process; each reads and computes its part.
        world: number of processes, which torch.distributed connects.

    Returns:
        The plan.

    Raises:
        FileExistsError: another process writes to the folder.
        ValueError: pictures cannot be read, or `out` holds shards that were made in another way or
            from another set, or that must not be replaced.
    """
    with _team(rank, world) as team, ExitStack() as stack:
        listing = team.first(lambda: _listing(out, pictures))
        # One lock for all processes; a folder in which nothing was written is removed.
        team.first(lambda: stack.enter_context(locked(out, "encoding", remove=True)))
        before = team.first(lambda: _checked(out, settings))
        if before is not None and "contents" not in before:
            _check_old(out, before, listing)
            plan = before
        else:
            contents, bad = _read_contents(pictures, listing, before, settings, team)
            if bad:
                _report(pictures, bad, skip_bad, rank)
                listing = _without(listing, bad)
            plan = _plan(pictures, listing, contents, before, settings)
            team.first(lambda: _put_plan(out, before, plan, update))
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="fastdit-read") as pool:
            batch = functools.partial(_batch, pictures, plan, make, pool)
            compute_shards(out, batch, plan, rank, world)
        team.wait()
    return plan


class _Team:
    """The processes that write shards together; one that is alone talks to itself."""

    def __init__(self, rank: int, world: int, group: Any) -> None:
        self.rank, self.world, self._group = rank, world, group

    def first(self, make: Callable[[], T]) -> T:
        """Return to all processes what process 0 makes, or raise its error in all of them."""
        if self.world == 1:
            return make()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = make()
            except (ValueError, OSError) as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0, group=self._group)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def merged(self, own: dict[str, str]) -> dict[str, str]:
        """Return the entries of all processes."""
        everyone: list[Any] = [own] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, own, group=self._group)
        return {name: value for part in everyone for name, value in part.items()}

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.world > 1:
            dist.barrier(group=self._group)


@contextmanager
def _team(rank: int, world: int) -> Iterator[_Team]:
    """Connect the processes for as long as a large set may take them."""
    group = dist.new_group(timeout=timedelta(days=7), backend="gloo") if world > 1 else None
    yield _Team(rank, world, group)
    if group is not None:
        dist.destroy_process_group(group)


def _listing(out: Path, pictures: Pictures) -> Listing:
    if out.resolve().is_relative_to(pictures.path.resolve()):
        raise ValueError(f"out: expected a folder that is not in {pictures.path}, got {out}")
    return pictures.listing()


def _checked(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the plan of a folder, which must have the same settings, or None."""
    before = read_plan(out)
    if before is not None:
        names = {*settings, *before} - set(_LISTED)
        names |= settings.keys() & before.keys() & {SCALING}  # earlier releases did not write it
        if differing := sorted(n for n in names if settings.get(n) != before.get(n)):
            raise other_plan(out, differing)
    return before


def planned_size(height: int, width: int) -> int | list[int]:
    """Return a size as plans hold it: one side for squares, as ever, else both."""
    return height if height == width else [height, width]


def _check_old(out: Path, before: dict[str, Any], listing: Listing) -> None:
    """Check the plan of an earlier release, which has names only, against a listing."""
    now = {"files": listing.names, "labels": listing.labels, "classes": listing.classes}
    if differing := [name for name, value in now.items() if before.get(name) != value]:
        raise other_plan(out, differing)


def _read_contents(
    pictures: Pictures,
    listing: Listing,
    before: dict[str, Any] | None,
    settings: Mapping[str, Any],
    team: _Team,
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the hash of each picture's content, and what is wrong with those that are bad."""
    known = {}
    if before is not None and before["source"] == _source(pictures):
        of_row = zip(before["files"], before["stamps"], before["contents"], strict=True)
        known = {(name, stamp): content for name, stamp, content in of_row}
    stamped = list(zip(listing.names, listing.stamps, strict=True))
    contents = {pair[0]: known[pair] for pair in stamped if pair in known}
    todo = [name for name in listing.names if name not in contents]
    own = todo[team.rank :: team.world]
    fresh: dict[str, str] = {}
    bad: dict[str, str] = {}

    def check(name: str) -> None:
        try:
            _, fresh[name] = read_cropped(pictures, name, settings["image_size"])
        except ValueError as error:
            bad[name] = str(error)

    quiet = team.rank > 0 or not todo
    with (
        ThreadPoolExecutor(_THREADS, thread_name_prefix="fastdit-check") as pool,
        tqdm(total=len(own), unit="image", desc="checking", disable=quiet) as bar,
    ):
        for i in range(0, len(own), _CHUNK):
            some = own[i : i + _CHUNK]
            list(pool.map(check, some))
            bar.update(len(some))
    return contents | team.merged(fresh), team.merged(bad)


def _report(pictures: Pictures, bad: dict[str, str], skip: bool, rank: int) -> None:
    """Name the pictures that cannot be read, in a warning or an error of process 0."""
    lines = [f"  {bad[name]}" for name in sorted(bad)[:_NAMED]]
    if len(bad) > _NAMED:
        lines.append(f"  and {len(bad) - _NAMED} more")
    number = "1 picture" if len(bad) == 1 else f"{len(bad)} pictures"
    if skip:
        if rank == 0:
            warn("\n".join([f"left out {number} of {pictures.path} that cannot be read:", *lines]))
        return
    text = f"{number} of {pictures.path} cannot be read"
    if rank > 0:
        raise ValueError(f"{text}; process 0 names them")
    advice = "mend what is listed here, or leave it out by --skip-bad:"
    raise ValueError("\n".join([f"{text}; {advice}", *lines]))


def _without(listing: Listing, bad: dict[str, str]) -> Listing:
    """Return a listing without the bad pictures, in which no class may have lost all its own."""
    rows = [i for i, name in enumerate(listing.names) if name not in bad]
    labels = [listing.labels[i] for i in rows]
    for label in sorted({*listing.labels} - {*labels}):
        name = listing.classes[label]
        raise ValueError(f"class {name}: expected a picture that can be read, found none")
    names, stamps = ([column[i] for i in rows] for column in (listing.names, listing.stamps))
    return Listing(names, labels, listing.classes, stamps)


def arrange(before: list[str], now: list[str]) -> list[str]:
    """Order names so that as many as possible keep the row that they had before.

    New names take the rows of removed ones, and the rest is appended. If more were removed, names
    of the last rows take theirs.
    """
    staying, old = set(now), set(before)
    fresh = iter([name for name in now if name not in old])
    rows = [name if name in staying else next(fresh, None) for name in before]
    rows += fresh
    hole, last = 0, len(rows) - 1
    while True:
        while last >= 0 and rows[last] is None:
            last -= 1
        while hole < last and rows[hole] is not None:
            hole += 1
        if hole >= last:
            return [name for name in rows[: last + 1] if name is not None]
        rows[hole], rows[last] = rows[last], None


def _plan(
    pictures: Pictures,
    listing: Listing,
    contents: dict[str, str],
    before: dict[str, Any] | None,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    row = {name: i for i, name in enumerate(listing.names)}
    files = arrange(before["files"] if before else [], listing.names)
    rows = [row[name] for name in files]
    return {
        **settings,
        "source": _source(pictures),
        "num": len(files),
        "files": files,
        "labels": [listing.labels[i] for i in rows],
        "classes": listing.classes,
        "contents": [contents[name] for name in files],
        "stamps": [listing.stamps[i] for i in rows],
    }


def _source(pictures: Pictures) -> str:
    return str(pictures.path.resolve())


def _put_plan(out: Path, before: dict[str, Any] | None, plan: dict[str, Any], update: bool) -> None:
    """Remove the shards that are no longer of their rows' pictures, then write the plan."""
    if before == plan:
        return
    if before is not None and plan_digest(before) != plan_digest(plan):
        if not update:
            advice = f"to keep the earlier ones, name {out} instead"
            raise ValueError(f"{plan['source']}: {_changes(before, plan)}; {advice}")
        if (then_from := before["source"]) != (now_from := plan["source"]):
            advice = f"remove it, or name another folder for those of {now_from}"
            raise ValueError(f"{out}: it holds the pictures of {then_from}; {advice}")
        then, now = _by_shard(before), _by_shard(plan)
        for i, path in enumerate(shard_paths(out, before)):
            if i >= len(now) or then[i] != now[i]:
                path.unlink(missing_ok=True)
    with atomic_path(out / PLAN) as aside:
        aside.write_text(json.dumps(plan, indent=1, sort_keys=True))


def _by_shard(plan: dict[str, Any]) -> list[list[tuple[str, str]]]:
    """Return the (name, content) of each shard's pictures."""
    pairs = list(zip(plan["files"], plan["contents"], strict=True))
    size = plan["batch_size"]
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


def _changes(before: dict[str, Any], plan: dict[str, Any]) -> str:
    """Say how many pictures differ between two plans."""
    then, now = (dict(zip(p["files"], p["contents"], strict=True)) for p in (before, plan))
    added, removed = len(now.keys() - then.keys()), len(then.keys() - now.keys())
    changed = sum(then[name] != now[name] for name in then.keys() & now.keys())
    return f"its pictures have changed ({added} added, {removed} removed, {changed} changed)"


def _batch(
    pictures: Pictures,
    plan: dict[str, Any],
    make: Callable[[np.ndarray], np.ndarray],
    pool: ThreadPoolExecutor,
    first: int,
) -> np.ndarray:
    """Return what is computed of the pictures from a row on."""
    rows = range(first, min(first + plan["batch_size"], plan["num"]))
    read = functools.partial(read_cropped, pictures, size=plan["image_size"])
    squares = list(pool.map(read, [plan["files"][i] for i in rows]))
    contents = plan.get("contents")  # which plans of an earlier release do not have
    for i, (_, content) in zip(rows, squares, strict=True):
        if contents is not None and contents[i] != content:
            path = pictures.path / plan["files"][i]
            raise ValueError(f"{path}: it was changed while it was encoded; run it again")
    made = make(np.stack([pixels for pixels, _ in squares]))
    for i, one in zip(rows, made, strict=True):
        if not np.isfinite(one).all():
            path = pictures.path / plan["files"][i]
            raise ValueError(f"{path}: its latent holds NaN or Inf; try the VAE in float32")
    return made
