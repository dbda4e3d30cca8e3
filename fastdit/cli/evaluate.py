"""`fastdit evaluate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

import fastdit
from fastdit.cli.common import Device, device_of, option, plain_errors
from fastdit.data.files import atomic_path
from fastdit.evaluation.comparison import Evaluation, compare, open_sets
from fastdit.evaluation.inception import WEIGHTS_FILE, load_inception

PUBLISHED_SAMPLES = 50_000
PUBLISHED_REFERENCE = 10_000  # the images in ADM's reference batches of ImageNet


def evaluate(
    context: typer.Context,
    samples: Annotated[
        Path, typer.Argument(help="An .npz of images, as `fastdit sample` writes it, or a folder.")
    ],
    reference: Annotated[
        Path, typer.Argument(help="The same, or an .npz of statistics, or ADM's reference batch.")
    ],
    weights: Annotated[
        Path | None, option(f"The network's file, {WEIGHTS_FILE}.  [cached, or downloaded]")
    ] = None,
    image_size: Annotated[
        int | None,
        option("Crop the images of folders to squares of this side, as ADM does.", min=1),
    ] = None,
    batch_size: Annotated[int, option("Images in the network at once.", min=1)] = 64,
    json_file: Annotated[
        Path | None, option("File to write the numbers to, with versions.", "--json")
    ] = None,
    device: Device = None,
) -> None:
    """Compute FID and other metrics of samples.

    The metrics are FID, sFID, Inception Score, precision and recall. The network, its resize and
    the formulas are those of the evaluator of ADM, with which the papers on DiT, SiT and their
    successors report these numbers.
    """
    with plain_errors(context):
        if json_file is not None and json_file.is_dir():
            raise ValueError(f"--json: expected a file's name, got the folder {json_file}")
        where = device_of(device)
        sets = open_sets(samples, reference, image_size, progress=True)
        network = load_inception(weights, where, progress=True)
        found = compare(*sets, network, batch_size, progress=True)
        remarks = comparability(found)
        for name, value in metrics(found).items():
            print(f"{name:16} {'-' if value is None else f'{value:.4f}':>10}")
        others = f"{found.reference_images:,} images" if found.reference_images else "statistics"
        print(f"\n{found.samples:,} samples beside {others}")
        for remark in dict.fromkeys(remarks.values()):
            names = [name for name in remarks if remarks[name] == remark]
            print(f"{', '.join(names)}: {remark}")
        if json_file is not None:
            document = {
                **asdict(found),
                "comparable": remarks,
                "files": {"samples": str(samples), "reference": str(reference)},
                "image_size": image_size,
                "network": "inception-2015-12-05",
                "versions": {
                    "fastdit": fastdit.__version__,
                    "torch": torch.__version__,
                    "numpy": np.__version__,
                },
                "device": str(where),
            }
            with atomic_path(json_file) as aside:
                aside.write_text(json.dumps(document, indent=1) + "\n")
            print(f"wrote {json_file}")


def metrics(found: Evaluation) -> dict[str, float | None]:
    """Return the metrics under the names that papers give them."""
    return {
        "FID": found.fid,
        "sFID": found.sfid,
        "Inception Score": found.inception_score,
        "precision": found.precision,
        "recall": found.recall,
    }


def comparability(found: Evaluation) -> dict[str, str]:
    """Say for each metric whether it was computed as the published ones were, or what differs."""
    samples = others = None
    if found.samples != PUBLISHED_SAMPLES:
        samples = f"{found.samples:,} samples instead of {PUBLISHED_SAMPLES:,}"
    if found.reference_images != PUBLISHED_REFERENCE:
        others = f"{found.reference_images:,} reference images instead of {PUBLISHED_REFERENCE:,}"
    images = "statistics of the reference's images instead of those in ADM's reference batch"
    differences = {
        "FID": [samples, None if found.fid_from_statistics else images],
        "sFID": [samples, None if found.sfid_from_statistics else images],
        "Inception Score": [samples],
        "precision": [samples, others],
        "recall": [samples, others],
    }
    remarks = {}
    for name, value in metrics(found).items():
        if reasons := [reason for reason in differences[name] if reason]:
            remarks[name] = f"not comparable with published values: {', '.join(reasons)}"
        else:
            remarks[name] = "comparable with published values"
            if name != "Inception Score":
                remarks[name] += ", if the reference is ADM's batch of the same data and size"
        if value is None:
            wanted = {"FID": " or mu and sigma", "sFID": " or mu_s and sigma_s"}.get(name, "")
            remarks[name] = f"not computed: the reference holds no images{wanted}"
    return remarks
