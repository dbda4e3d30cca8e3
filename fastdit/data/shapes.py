"""The toy's data set, 16 classes of coloured shapes, and the judge of a model's samples.

An image has 16 x 16 pixels in [-1, 1] and shows a shape (circle, square, triangle or cross) of one
colour (red, green, blue or yellow) on a dark ground. Its class is `4 * colour + shape`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.errors import check_range

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle", "cross")
LABEL_NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
IMG_SIZE = 16

GROUND = (-0.9, -0.9, -0.9)
PALETTE = ((0.9, -0.7, -0.7), (-0.7, 0.8, -0.6), (-0.6, -0.5, 0.9), (0.9, 0.8, -0.7))

_CENTRE_JITTER = 1.0  # pixels, in either direction
_RADIUS = (4.0, 5.5)  # pixels
_COLOUR_JITTER = 0.08  # per channel, in either direction
_EDGE = 0.5  # width of the antialiased edge, pixels

# Of white noise, the best template explained at most 0.045 of the variance in 100,000 images.
_NOISE_SHARE = 0.05
_FLAT_VARIANCE = (2 / 255) ** 2  # per pixel: differences of about one displayed level


class ShapesData(NamedTuple):
    images: Tensor  # [n, 3, 16, 16] float32 in [-1, 1]
    labels: Tensor  # [n] int64


class Accuracy(NamedTuple):
    colour: float  # share of images in the label's colour
    shape: float  # share of images in the label's shape


def coloured_shapes(per_class: int = 200, seed: int = 0) -> ShapesData:
    """Draw the set: `per_class` images of each of the 16 classes, in class order.

    Position, size and colour are random; the same seed gives the same set.

    Raises:
        ValueError: per_class is below 1.
    """
    if per_class < 1:
        raise ValueError(f"per_class: expected at least 1, got {per_class}")
    n = len(LABEL_NAMES) * per_class
    generator = torch.Generator().manual_seed(seed)

    def jitter(width: int, low: float, high: float) -> Tensor:
        return torch.rand(n, width, generator=generator, dtype=torch.float32) * (high - low) + low

    labels = torch.arange(len(LABEL_NAMES)).repeat_interleave(per_class)
    centre = jitter(2, -_CENTRE_JITTER, _CENTRE_JITTER)
    radius = jitter(1, *_RADIUS)[:, 0]
    colour = torch.tensor(PALETTE, dtype=torch.float32)[labels // len(SHAPES)]
    colour = colour + jitter(3, -_COLOUR_JITTER, _COLOUR_JITTER)

    masks = shape_masks(centre, radius)[labels % len(SHAPES), torch.arange(n)]  # [n, 16, 16]
    ground = torch.tensor(GROUND, dtype=torch.float32)[:, None, None]
    images = ground + masks[:, None] * (colour[:, :, None, None] - ground)
    return ShapesData(images.clamp(-1, 1), labels)


def shape_masks(centre: Tensor, radius: Tensor) -> Tensor:
    """Return every shape's coverage of the pixels, at n positions and sizes.

    Args:
        centre: [n, 2] offsets (x, y) from the image's centre, in pixels.
        radius: [n] half the shapes' extent, in pixels.

    Returns:
        [4, n, 16, 16] in [0, 1], in the order of SHAPES.
    """
    axis = torch.arange(IMG_SIZE, dtype=radius.dtype) - (IMG_SIZE - 1) / 2
    x = axis[None, None, :] - centre[:, 0, None, None]  # [n, 1, 16]
    y = axis[None, :, None] - centre[:, 1, None, None]  # [n, 16, 1]
    r = radius[:, None, None]
    # Signed distances, negative inside. The sides of square and triangle make the areas
    # comparable, so that no shape can be recognised by its area alone.
    circle = (x**2 + y**2).sqrt() - r
    square = torch.maximum(x.abs(), y.abs()) - 0.85 * r
    # Upright triangle: base at y = 0.8 r, apex at y = -r.
    triangle = torch.maximum(y - 0.8 * r, (1.8 * x.abs() - (y + r)) / (1.8**2 + 1) ** 0.5)
    arm = 0.33 * r
    cross = torch.minimum(
        torch.maximum(x.abs() - arm, y.abs() - r), torch.maximum(y.abs() - arm, x.abs() - r)
    )
    distance = torch.stack([circle, square, triangle, cross])
    return (0.5 - distance / (2 * _EDGE)).clamp(0, 1)


def judge(images: Tensor, labels: Tensor) -> Accuracy:
    """Return the shares of images that show their label's colour, and its shape.

    Args:
        images: [n, 3, 16, 16], about -1 to 1.
        labels: [n] int64 in [0, 16).

    Returns:
        Accuracy(colour, shape), each in [0, 1]; guessing scores about 1/4.

    Raises:
        ValueError: a tensor's shape is wrong, or a label is out of range.
    """
    if labels.shape != images.shape[:1] or not len(labels):
        wanted = f"shape [{len(images)}] and not empty"
        raise ValueError(f"labels: expected {wanted}, got {list(labels.shape)}")
    check_range("labels", labels, len(LABEL_NAMES))
    colour, shape = classify(images)
    labels = labels.to(colour.device)
    right = colour == labels // len(SHAPES), shape == labels % len(SHAPES)
    return Accuracy(*(share.float().mean().item() for share in right))


def classify(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the colour and the shape that each image shows best.

    This is template matching in closed form. For every shape, position and size, the image is
    fitted as `ground + mask * contrast` by least squares, with ground and contrast free in each
    channel. The mask that explains most of the image's variance gives the shape. The palette's
    entry at the smallest angle to its contrast gives the colour. An image shows nothing if it is
    flat, or if its best mask explains no more of it than of noise.

    Args:
        images: [n, 3, 16, 16].

    Returns:
        (colour, shape): [n] int64 each, on the CPU; -1 where the image shows nothing.

    Raises:
        ValueError: the tensor's shape is wrong, or a pixel is not finite.
    """
    if images.dim() != 4 or list(images.shape[1:]) != [3, IMG_SIZE, IMG_SIZE]:
        raise ValueError(f"images: expected shape [n, 3, 16, 16], got {list(images.shape)}")
    pixels = images.detach().to("cpu", torch.float64).flatten(2)  # [n, 3, 256]
    if not pixels.isfinite().all():
        raise ValueError("images: expected finite pixels, got NaN or Inf")
    pixels = pixels.clamp(-1, 1)  # as they are shown
    pixels = pixels - pixels.mean(2, keepdim=True)
    masks, shape_of_mask = _templates()  # [K, 256], [K]
    centred = masks - masks.mean(1, keepdim=True)
    norm = centred.norm(dim=1)
    projection = pixels @ (centred / norm[:, None]).T  # [n, 3, K]
    explained, best = projection.square().sum(1).max(1)  # [n]
    variance = pixels.square().sum((1, 2))
    contrast = projection.gather(2, best[:, None, None].expand(-1, 3, 1))[..., 0]  # [n, 3]

    ground = torch.tensor(GROUND, dtype=torch.float64)
    palette = torch.tensor(PALETTE, dtype=torch.float64) - ground
    alignment = contrast @ F.normalize(palette, dim=1).T  # [n, 4]
    strongest, colour = alignment.max(1)
    flat = variance <= _FLAT_VARIANCE * pixels[0].numel()
    nothing = flat | (explained <= _NOISE_SHARE * variance) | (strongest <= 0)
    shape = shape_of_mask[best]
    return colour.masked_fill(nothing, -1), shape.masked_fill(nothing, -1)


def _templates() -> tuple[Tensor, Tensor]:
    """Return all shapes on a half-pixel grid of positions and sizes: [K, 256] masks, [K] shapes."""
    jitter = _CENTRE_JITTER
    offsets = torch.arange(-jitter, jitter + 0.25, 0.5, dtype=torch.float32)
    radii = torch.arange(_RADIUS[0], _RADIUS[1] + 0.25, 0.5, dtype=torch.float32)
    grid = torch.cartesian_prod(offsets, offsets, radii)
    masks = shape_masks(grid[:, :2], grid[:, 2]).flatten(2)  # [4, k, 256]
    shapes = torch.arange(len(SHAPES)).repeat_interleave(len(grid))
    return masks.flatten(0, 1).double(), shapes
