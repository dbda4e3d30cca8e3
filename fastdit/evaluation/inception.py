"""The Inception network of FID and of Dhariwal & Nichol's evaluator, in PyTorch.

It is the graph `inception-2015-12-05` of TensorFlow, which differs from the Inception v3 of
torchvision: in its weights and its 1,008 classes, in averages that leave out the padding, in a
maximum in place of the last average, and in a resize that is aligned to the upper left pixel.
Modules have the names of torchvision's, as in the weights that torch-fidelity publishes.

Source: Szegedy et al. 2015; Heusel et al. 2017; `evaluations/evaluator.py` of guided-diffusion.
"""

from __future__ import annotations

import http.client
import urllib.request
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastdit.checkpoints.pickles import read_pickle
from fastdit.data.files import atomic_path
from fastdit.errors import check_finite

WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_FILE}"
SIZE = 299  # pixels to which images are resized, whatever their own size

_SPATIAL_CHANNELS = 7  # with 17 x 17 positions about as many features as the pooled ones


class Features(NamedTuple):
    """What a network makes of a batch: pooled features, spatial features and logits, [B, ...]."""

    pool: Tensor
    spatial: Tensor
    logits: Tensor


class ConvNorm(nn.Module):
    """Convolution, batch normalization with fixed statistics, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padded: bool = True,
    ) -> None:
        """Build the layers; only with stride 1 and `padded` the output has the input's size."""
        super().__init__()
        sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (sides[0] // 2, sides[1] // 2) if padded and stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


Layer = tuple  # (name, output channels, kernel[, stride]) of a ConvNorm
Branch = list  # of layers, one after the other; a list in their place is of layers side by side


class Mixed(nn.Module):
    """Branches of convolutions side by side, and a last one that begins with pooling."""

    def __init__(self, inputs: int, branches: list[Branch], pool: str, pooled: int = 0) -> None:
        """Build the layers; `pooled` is the channels of the convolution after pooling, if any."""
        super().__init__()
        self.branches, self.pool, self.pooled = branches, pool, pooled
        self.outputs = pooled or inputs
        for branch in branches:
            width = inputs
            for step in branch:
                beside = step if isinstance(step, list) else [step]
                for name, outputs, *shape in beside:
                    self.add_module(name, ConvNorm(width, outputs, *shape))
                width = sum(outputs for _, outputs, *_ in beside)
            self.outputs += width
        if pooled:
            self.branch_pool = ConvNorm(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        results = []
        for branch in self.branches:
            y = x
            for step in branch:
                beside = step if isinstance(step, list) else [step]
                y = torch.cat([getattr(self, name)(y) for name, *_ in beside], dim=1)
            results.append(y)
        if self.pool == "halve":
            y = F.max_pool2d(x, 3, 2)
        elif self.pool == "max":
            y = F.max_pool2d(x, 3, 1, 1)
        else:
            y = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        results.append(self.branch_pool(y) if self.pooled else y)
        return torch.cat(results, dim=1)


def _mixed_5(inputs: int, pooled: int) -> Mixed:
    branches: list[Branch] = [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
    ]
    return Mixed(inputs, branches, "average", pooled)


def _mixed_6a(inputs: int) -> Mixed:
    branches: list[Branch] = [
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
    ]
    return Mixed(inputs, branches, "halve")


def _mixed_6(inputs: int, width: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    branches: list[Branch] = [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", width, 1), ("branch7x7_2", width, row), ("branch7x7_3", 192, column)],
        [
            ("branch7x7dbl_1", width, 1),
            ("branch7x7dbl_2", width, column),
            ("branch7x7dbl_3", width, row),
            ("branch7x7dbl_4", width, column),
            ("branch7x7dbl_5", 192, row),
        ],
    ]
    return Mixed(inputs, branches, "average", 192)


def _mixed_7a(inputs: int) -> Mixed:
    branches: list[Branch] = [
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
        [
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3, 2),
        ],
    ]
    return Mixed(inputs, branches, "halve")


def _mixed_7(inputs: int, pool: str) -> Mixed:
    row, column = (1, 3), (3, 1)
    branches: list[Branch] = [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, row), ("branch3x3_2b", 384, column)]],
        [
            ("branch3x3dbl_1", 448, 1),
            ("branch3x3dbl_2", 384, 3),
            [("branch3x3dbl_3a", 384, row), ("branch3x3dbl_3b", 384, column)],
        ],
    ]
    return Mixed(inputs, branches, pool, 192)


class Inception(nn.Module):
    """Images to the features of FID (2,048), of sFID (2,023) and to the logits of 1,008 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padded=False)
        self.Mixed_5b = _mixed_5(192, 32)
        self.Mixed_5c = _mixed_5(256, 64)
        self.Mixed_5d = _mixed_5(288, 64)
        self.Mixed_6a = _mixed_6a(288)
        self.Mixed_6b = _mixed_6(768, 128)
        self.Mixed_6c = _mixed_6(768, 160)
        self.Mixed_6d = _mixed_6(768, 160)
        self.Mixed_6e = _mixed_6(768, 192)
        self.Mixed_7a = _mixed_7a(768)
        self.Mixed_7b = _mixed_7(1280, "average")
        self.Mixed_7c = _mixed_7(2048, "max")
        self.fc = nn.Linear(2048, 1008)
        self.eval()

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Features:
        """Return the features of images, on the network's device.

        Args:
            images: [B, 3, H, W] uint8, on any device.

        Returns:
            pool [B, 2048], spatial [B, 2023] (the first 7 channels of `mixed_6/conv`, position by
            position, as in TensorFlow), and logits [B, 1008] without the bias, which the Inception
            Score of Salimans et al. leaves out; in float32.
        """
        x = resize(images.to(self.fc.weight.device, torch.float32), SIZE)
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [B, 64, 147, 147]
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # [B, 192, 71, 71]
        x = F.max_pool2d(x, 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # [B, 288, 35, 35]
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # [B, 768, 17, 17]
        spatial = x[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7a(self.Mixed_6e(x))  # [B, 1280, 8, 8]
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean(dim=(2, 3))
        return Features(pool, spatial, pool @ self.fc.weight.T)


def resize(images: Tensor, size: int) -> Tensor:
    """Return [B, C, H, W] as [B, C, size, size] by TensorFlow 1's bilinear interpolation.

    Pixel i of the result lies at `i * H / size` of the image, so that the last pixels are repeated.
    Larger images are not smoothed first.
    """

    def along(n: int) -> tuple[Tensor, Tensor, Tensor]:
        position = torch.arange(size, dtype=torch.float32, device=images.device) * (n / size)
        low = position.long()
        return low, (low + 1).clamp(max=n - 1), position - low

    top, bottom, down = along(images.shape[2])
    left, right, across = along(images.shape[3])
    near = images[..., left]
    rows = near + (images[..., right] - near) * across
    upper = rows[:, :, top]
    return upper + (rows[:, :, bottom] - upper) * down[:, None]


def load_inception(
    weights: Path | None = None, device: torch.device | str = "cpu", progress: bool = False
) -> Inception:
    """Return the Inception network with its published weights.

    Args:
        weights: their file; None takes it from the cache that torch-fidelity uses too, or downloads
            it to there (95 MB).
        device: where the network computes.
        progress: whether to show a bar while it is downloaded.

    Raises:
        ValueError: the file is not there and cannot be downloaded, or holds other weights.
    """
    path = _downloaded(progress) if weights is None else Path(weights)
    if not path.is_file():
        raise ValueError(f"weights: {path}: no such file; it is {WEIGHTS_URL}")
    unlike = f"weights: {path}: expected the Inception weights of {WEIGHTS_URL}"
    try:
        stored = read_pickle(path)
    except ValueError as error:
        raise ValueError(f"weights: {error}; it should be {WEIGHTS_URL}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{unlike}, got {type(stored).__name__}")
    with torch.device("meta"):  # no random weights, which would take a second
        network = Inception()
    complete = {}
    for name, t in network.state_dict().items():
        if name.endswith("num_batches_tracked"):  # of the training; the published file has none
            complete[name] = torch.zeros((), dtype=torch.int64)
            continue
        shape, found = list(t.shape), stored.get(name)
        if not isinstance(found, Tensor) or list(found.shape) != shape:
            got = f"shape {list(found.shape)}" if isinstance(found, Tensor) else "none"
            raise ValueError(f"{unlike}, where {name} has shape {shape}, got {got}")
        complete[name] = found.float()
    check_finite(f"weights: {path}", complete)
    network.load_state_dict(complete, assign=True)
    return network.requires_grad_(False).to(device)


def _downloaded(progress: bool) -> Path:
    """Return the path of the weights in the cache of torch.hub, after a download if need be."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
    if path.is_file():
        return path
    try:
        with urllib.request.urlopen(WEIGHTS_URL, timeout=30) as answer, atomic_path(path) as aside:
            total = int(answer.headers.get("Content-Length", 0))
            bar = tqdm(total=total, unit="B", unit_scale=True, desc=path.name, disable=not progress)
            with bar, open(aside, "wb") as file:
                while block := answer.read(2**20):
                    file.write(block)
                    bar.update(len(block))
            if aside.stat().st_size < total:
                raise OSError("the connection ended early")
    except (OSError, http.client.HTTPException) as error:
        advice = f"download {WEIGHTS_URL} to {path}, or name the file if it lies elsewhere"
        raise ValueError(f"weights: they could not be downloaded ({error}); {advice}") from error
    return path
