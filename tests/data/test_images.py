"""Images on disk: how values become pixels, and where a grid has them."""

import numpy as np
import torch
from PIL import Image

from fastdit.data.images import (
    read_metadata,
    to_pixels,
    write_grid,
    write_latents,
    write_npz,
)


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


def test_metadata_is_read_back_from_a_png_and_from_arrays(tmp_path):
    pixels, told = np.zeros((2, 4, 4, 3), dtype=np.uint8), {"images": [{"prompt": "Füchse 狐"}]}
    write_grid(tmp_path / "a.png", pixels, columns=2, metadata=told)
    write_npz(tmp_path / "a.npz", pixels, told)
    write_latents(tmp_path / "l.npz", torch.zeros(2, 4, 2, 2), told)
    write_grid(tmp_path / "none.png", pixels, columns=2)
    write_npz(tmp_path / "none.npz", pixels)
    assert all(read_metadata(tmp_path / name) == told for name in ("a.png", "a.npz", "l.npz"))
    assert all(read_metadata(tmp_path / name) is None for name in ("none.png", "none.npz"))
