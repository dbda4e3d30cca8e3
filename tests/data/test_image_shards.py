"""Shards of pictures: what is read again when pictures change, and what is left out."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from fastdit.data.image_shards import arrange, write_image_shards
from fastdit.data.mapped_shards import plan_digest
from fastdit.data.pictures import centre_crop, open_pictures, read_cropped
from fastdit.data.pixels import PixelShards, cache_pixels

SETTINGS = {"kind": "pixels", "batch_size": 2, "image_size": 8}


@pytest.fixture
def write(pictures, tmp_path):
    """Write the pictures' pixels, two per shard: returns the rows' names of the shards computed."""

    def call(out=tmp_path / "out", **options):
        computed = []

        def make(squares):
            computed.append(squares)
            return squares

        plan = write_image_shards(out, open_pictures(pictures), make, SETTINGS, **options)
        rows = np.concatenate(computed) if computed else np.zeros((0, 8, 8, 3), np.uint8)
        shards = PixelShards(out)
        by_row = {shards.stored(i).tobytes(): plan["files"][i] for i in range(len(shards))}
        check_rows(shards, pictures)
        return [by_row[row.tobytes()] for row in rows]

    return call


def check_rows(shards, folder):
    """Every row is the picture, and has the label, that the plan says it has."""
    files = open_pictures(folder)
    for i, name in enumerate(shards.plan["files"]):
        assert np.array_equal(shards.stored(i), read_cropped(files, name, 8)[0]), name
        assert shards.classes[shards.labels[i]] == name.split("/")[0]


def test_a_repeated_call_reads_nothing(write, pictures, monkeypatch):
    assert len(write()) == 6
    plan = PixelShards(pictures.parent / "out").plan
    monkeypatch.setattr("fastdit.data.image_shards.read_cropped", None)
    assert write() == []
    assert PixelShards(pictures.parent / "out").plan == plan


def test_only_shards_of_changed_pictures_are_computed_again(write, pictures, draw):
    write()
    draw(pictures / "cat" / "new.png", 20)
    assert write() == ["cat/new.png"], "it is appended"
    (pictures / "cat" / "b.jpg").unlink()
    assert write() == ["cat/a.png", "cat/new.png"], (
        "the last picture takes the row of a removed one"
    )
    draw(pictures / "dog" / "d.png", 21)
    assert write() == ["cat/c.webp", "dog/d.png"]
    (pictures / "cat" / "c.webp").unlink()
    draw(pictures / "ant" / "x.png", 22)
    assert write() == ["ant/x.png", "dog/d.png"], "a new one takes the row of a removed one"
    shards = PixelShards(pictures.parent / "out")
    assert shards.classes == ["ant", "cat", "dog"] and len(shards) == 6
    for name in ("dog/d.png", "dog/e.png", "dog/grey.png"):
        (pictures / name).unlink()
    (pictures / "dog").rmdir()
    write()
    assert PixelShards(pictures.parent / "out").classes == ["ant", "cat"]
    assert sorted(p.name for p in (pictures.parent / "out").glob("*.npy")) == [
        "00000000.npy",
        "00000001.npy",
    ]


def test_pictures_that_were_only_touched_are_not_computed_again(write, pictures):
    write()
    before = PixelShards(pictures.parent / "out")
    os.utime(pictures / "cat" / "a.png", ns=(1, 1))
    assert write() == []
    after = PixelShards(pictures.parent / "out")
    assert after.digest == before.digest and after.plan != before.plan
    assert np.array_equal(before.stored(0), after.stored(0)), "an open set goes on"


def test_a_set_that_changes_while_it_is_open_is_refused(write, pictures, draw):
    write()
    shards = PixelShards(pictures.parent / "out")
    shards.stored(0)
    draw(pictures / "dog" / "e.png", 20)
    write()
    assert shards.stored(1) is not None, "a shard that is open stays as it was"
    with pytest.raises(ValueError, match="its pictures were changed while it was read"):
        shards.stored(5)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ("", "abc", "abc"),
        ("abc", "abcd", "abcd"),
        ("abcd", "aXbcd", "abcdX"),
        ("abcd", "acdX", "aXcd"),
        ("abcde", "ade", "aed"),
        ("abcde", "e", "e"),
        ("abc", "XYZ", "XYZ"),
        ("abc", "", ""),
        ("cab", "abc", "cab"),
    ],
)
def test_names_keep_their_rows(before, now, expected):
    assert arrange(list(before), list(now)) == list(expected)


def test_a_stop_at_any_moment_of_an_update_is_mended_by_the_next_call(
    write, pictures, draw, tmp_path, monkeypatch
):
    write()
    draw(pictures / "cat" / "a.png", 20)
    monkeypatch.setattr("fastdit.data.image_shards.atomic_path", stop)
    with pytest.raises(KeyboardInterrupt):
        write()  # between the stale shards' removal and the new plan
    monkeypatch.undo()
    with pytest.raises(ValueError, match="00000000.npy is not there"):
        PixelShards(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):  # before any shard of the new plan
        write_image_shards(tmp_path / "out", open_pictures(pictures), stop, SETTINGS)
    assert write() == ["cat/a.png", "cat/b.jpg"]


def stop(*_):
    raise KeyboardInterrupt


def test_bad_pictures_are_listed_before_any_work(write, pictures, tmp_path):
    (pictures / "cat" / "bad.png").write_bytes(b"no picture")
    torn = (pictures / "dog" / "e.png").read_bytes()
    (pictures / "dog" / "e.png").write_bytes(torn[: len(torn) // 2])
    with pytest.raises(ValueError) as error:
        write()
    lines = str(error.value).splitlines()
    assert lines[0].startswith("2 pictures of") and lines[0].endswith("by --skip-bad:")
    assert "cat/bad.png: expected an image (its first bytes" in lines[1]
    assert "dog/e.png: expected an image (" in lines[2] and len(lines) == 3
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="left out 2 pictures of .* cannot be read:\n.*bad.png"):
        assert len(write(skip_bad=True)) == 5
    (pictures / "dog" / "e.png").write_bytes(torn)
    (pictures / "cat" / "bad.png").unlink()
    assert write() == ["dog/grey.png", "dog/e.png"]


def test_many_bad_pictures_are_counted(write, pictures):
    for i in range(23):
        (pictures / "cat" / f"bad{i:02d}.png").write_bytes(b"")
    with pytest.raises(ValueError) as error:
        write()
    lines = str(error.value).splitlines()
    assert lines[0].startswith("23 pictures of") and len(lines) == 22
    assert lines[-1] == "  and 3 more"


def test_a_class_may_not_lose_all_its_pictures(write, pictures):
    for path in (pictures / "cat").iterdir():
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="class cat: expected a picture that can be read"),
    ):
        write(skip_bad=True)


def test_a_picture_that_changes_during_the_work_is_named(pictures, draw, tmp_path):
    def make(squares):
        draw(pictures / "dog" / "grey.png", 20)
        return squares

    with pytest.raises(ValueError, match="grey.png: it was changed while it was encoded"):
        write_image_shards(tmp_path / "out", open_pictures(pictures), make, SETTINGS)


def test_shards_of_another_set_or_size_are_not_replaced(write, pictures, tmp_path):
    write()
    with pytest.raises(ValueError, match="which differ in batch_size, image_size; remove"):
        cache_pixels(open_pictures(pictures), tmp_path / "out", 4)
    moved = pictures.rename(tmp_path / "moved")
    digest = PixelShards(tmp_path / "out").digest
    write_image_shards(tmp_path / "out", open_pictures(moved), stop, SETTINGS)
    assert PixelShards(tmp_path / "out").digest == digest, "the same pictures elsewhere"
    (moved / "cat" / "a.png").unlink()
    moved.rename(pictures)
    with pytest.raises(ValueError, match="holds the pictures of .*moved; remove it, or name"):
        write()


def test_without_update_changed_pictures_are_refused(write, pictures, draw, tmp_path):
    write()
    draw(pictures / "cat" / "a.png", 20)
    draw(pictures / "cat" / "x.png", 21)
    (pictures / "dog" / "e.png").unlink()
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("[!.]*")}
    with pytest.raises(ValueError, match="1 added, 1 removed, 1 changed.; to keep the earlier"):
        write(update=False)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("[!.]*")} == before


def test_plans_of_an_earlier_release_stay_as_they_are(write, pictures, draw, tmp_path):
    """They have no hashes; runs that were started on them compare a hash of the plan."""
    write()
    path = tmp_path / "out" / "plan.json"
    plan = json.loads(path.read_text())
    for name in ("contents", "stamps", "source"):
        del plan[name]
    path.write_text(json.dumps(plan))
    text = path.read_text()
    assert write() == [] and path.read_text() == text
    (tmp_path / "out" / "00000001.npy").unlink()
    assert write() == ["cat/c.webp", "dog/d.png"] and path.read_text() == text
    assert plan_digest(plan) == PixelShards(tmp_path / "out").digest
    draw(pictures / "cat" / "x.png", 20)
    with pytest.raises(ValueError, match="differ in files, labels; remove"):
        write()


def test_pixels_are_cropped_once_and_large_ones_are_in_smaller_shards(pictures, tmp_path):
    for size, rows in ((8, 1024), (256, 85)):
        cache_pixels(open_pictures(pictures), tmp_path / str(size), size)
        shards = PixelShards(tmp_path / str(size))
        assert shards.plan["batch_size"] == rows and len(shards) == 6
        files = open_pictures(pictures)
        _, image = files.load("dog/e.png")
        assert np.array_equal(shards.stored(4), centre_crop(image, size))
    with pytest.raises(ValueError, match="image_size: expected a positive integer, got 0"):
        cache_pixels(open_pictures(pictures), tmp_path / "none", 0)
    with pytest.raises(ValueError, match="expected pixels that `fastdit train` cached, found none"):
        PixelShards(pictures)


SHARED = """
import os, sys, warnings
from pathlib import Path
from fastdit.data.image_shards import write_image_shards
from fastdit.data.pictures import open_pictures
from fastdit.train.distributed import processes
folder, out = map(Path, sys.argv[1:])
settings = {"kind": "pixels", "batch_size": 2, "image_size": 8}
shown = []
def make(squares):
    shown.append(len(squares))
    return squares
with processes() as world:
    for options in ({}, {"skip_bad": True}):
        options |= {"rank": world.rank, "world": world.size}
        with warnings.catch_warnings(record=True) as seen:
            try:
                write_image_shards(out, open_pictures(folder), make, settings, **options)
            except ValueError as error:
                print(f"{world.rank} refused {error}".splitlines()[0], flush=True)
        print(f"{world.rank} warned {len(seen)}, computed {shown}", flush=True)
    try:
        settings["image_size"] = 4
        write_image_shards(out, open_pictures(folder), make, settings, **options)
    except ValueError as error:
        print(f"{world.rank} {error}", flush=True)
"""


def test_processes_share_the_work_and_its_errors(write, pictures, tmp_path):
    (pictures / "dog" / "bad.png").write_bytes(b"")
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    done = subprocess.run(
        [sys.executable, *launcher, script, pictures, tmp_path / "two"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if "refused" in line]
    assert "0 refused 1 picture of" in min(told) and min(told).endswith("by --skip-bad:")
    assert max(told).endswith("cannot be read; process 0 names them") and len(told) == 2
    assert done.stdout.count("0 warned 1, computed [2, 2]") == 1
    assert done.stdout.count("1 warned 0, computed [2]") == 1
    assert done.stdout.count("which differ in image_size; remove the folder") == 2
    with pytest.warns(UserWarning, match="left out"):
        write(skip_bad=True)
    for path in (tmp_path / "out").glob("[!.]*"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
