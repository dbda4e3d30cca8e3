"""Images on disk: how values become pixels, and where a grid has them."""

import numpy as np
import torch
from PIL import Image

from fastdit.data.images import to_pixels, write_grid


def test_pixels_are_scaled_as_published():
    values = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 0.996, 1.0, 2.0])
    pixels = to_pixels(values.view(1, 1, 2, 4))
    assert pixels.shape == (1, 2, 4, 1)
    assert pixels.flatten().tolist() == [0, 0, 0, 128, 191, 254, 255, 255]


def test_grid_places_images_row_by_row(tmp_path):
    pixels = np.zeros((5, 2, 3, 3), dtype=np.uint8)
    pixels[:] = (np.arange(5) * 40)[:, None, None, None]
    write_grid(tmp_path / "g.png", pixels, columns=3, zoom=2)
    with Image.open(tmp_path / "g.png") as image:
        assert image.size == ((3 * 4 - 1) * 2, (2 * 3 - 1) * 2)
        for i in range(5):
            row, column = divmod(i, 3)
            assert image.getpixel((column * 8, row * 6)) == (i * 40,) * 3
