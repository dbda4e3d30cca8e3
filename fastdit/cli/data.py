"""The options of `fastdit train` that say which images a run is trained on."""

from __future__ import annotations

from pathlib import Path

from fastdit.train.recipe import Recipe
from fastdit.train.sources import Images, Latents, Source, is_shards, open_data, variants_of

_MIRRORED = ("dit", "sit", "lightning")  # recipes that were published with mirror images


def check_no_pictures(pictures: dict) -> None:
    """Raise a ValueError if an option of pictures is given, but no pictures."""
    for name, default in (("image_size", None), ("flip", None), ("skip_bad", False)):
        if pictures[name] is not default:
            raise ValueError(f"--{name.replace('_', '-')}: expected --data beside it, got none")


def reopen_data(
    header: dict, data: Path | None, pictures: dict, new_data: bool = False
) -> Source | None:
    """Return the set of a run that goes on, or None to open it from where it was.

    Args:
        header: of the checkpoint.
        data: what --data names.
        pictures: options of `open_data`; "cache" is where the run has its pixels by default.
        new_data: whether the pictures may have changed, so that their pixels are read anew.

    Raises:
        ValueError: an option does not fit the run, or pictures have changed since it began.
    """
    then, cache = header["data"], pictures["cache"]
    of_images = isinstance(then, dict) and {"flip", "folder"} <= then.keys()
    if data is None:
        check_no_pictures(pictures)
        if of_images and not is_shards(Path(then["folder"])) and is_shards(cache):
            return Images(cache, then["flip"])  # the run's folder was moved, and the pixels in it
        return None
    if of_images:
        size, asked = header["config"]["img_size"], pictures["image_size"]
        size = tuple(size) if isinstance(size, list) else size
        if asked not in (None, size):
            raise ValueError(f"--image-size: the run was started with {size}, got {asked}")
        started = {"image_size": None if is_shards(data) else size, "flip": then["flip"]}
        missing = {name: value for name, value in started.items() if pictures[name] is None}
        pictures = pictures | missing
    return open_data(data, **pictures, update=new_data)


def describe_data(source: Source, recipe: Recipe) -> str | None:
    """Return what to say about the mirror images of a set; None for the coloured shapes."""
    if isinstance(source, Images):
        flips = "mirrored at random" if variants_of(source) > 1 else "never mirrored"
        return f"{len(source)} pictures of {len(source.label_names)} classes, {flips}"
    if not isinstance(source, Latents):
        return None
    if variants_of(source) > 1:
        return "latents with flips"
    advice = ", which the published recipe has: fastdit encode --flip"
    return "latents without flips" + advice * (recipe.name in _MIRRORED)
