"""What fastdit.DiT takes: tokens of any grid; and errors for wrong shapes, dtypes and labels."""

import pytest
import torch
import torch.nn.functional as F

import fastdit
from fastdit import functional


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_patchify_inverts_unpatchify():
    x = torch.randn(2, 3, 12, 12)
    tokens = functional.patchify(x, 4)
    assert tokens.shape == (2, 9, 48)
    assert torch.equal(functional.unpatchify(tokens, 4), x)
    assert torch.equal(functional.patchify(functional.unpatchify(tokens, 4), 4), tokens)
    first = x[1, :, 4:8, 8:12].permute(1, 2, 0).flatten()  # row 1, column 2; channel fastest
    assert torch.equal(tokens[1, 1 * 3 + 2], first)


@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (1, 5)], ids=str)
def test_tokens_of_any_grid_are_joined_as_torch_folds_them(grid):
    rows, columns = grid
    tokens = torch.randn(2, rows * columns, 4 * 4 * 3)
    channel_slowest = tokens.unflatten(2, (16, 3)).permute(0, 3, 2, 1).flatten(1, 2)
    expected = F.fold(channel_slowest, (4 * rows, 4 * columns), kernel_size=4, stride=4)
    assert torch.equal(functional.unpatchify(tokens, 4, grid), expected)
    assert torch.equal(functional.patchify(expected, 4), tokens)


@pytest.mark.parametrize("grid", [None, (2, 3)])
def test_tokens_of_another_grid_are_an_error(grid):
    with pytest.raises(ValueError, match=r"grid: expected \(rows, columns\) of 8 tokens, got "):
        functional.unpatchify(torch.zeros(1, 8, 48), 4, grid)


@pytest.mark.parametrize(
    ("x", "t", "y", "message"),
    [
        ((2, 3, 16, 8), (2,), (2,), "x: expected shape [B, 3, 16, 16], got [2, 3, 16, 8]"),
        ((3, 16, 16), (3,), (3,), "x: expected shape"),
        ((2, 3, 16, 16), (), (2,), "t: expected shape [2], one timestep an image, got []"),
        ((2, 3, 16, 16), (3,), (2,), "t: expected shape [2]"),
        ((2, 3, 16, 16), (2,), (2, 1), "y: expected shape [2], one label an image, got [2, 1]"),
    ],
)
def test_wrong_shapes_are_value_errors(x, t, y, message):
    model = fastdit.DiT()
    with pytest.raises(ValueError) as error:
        model(torch.zeros(x), torch.zeros(t), torch.zeros(y, dtype=torch.int64))
    assert message in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_images_of_another_dtype_are_a_value_error_that_says_what_to_do(dtype, device):
    model = fastdit.DiT(n_layers=1).to(device)
    x, t = torch.zeros(2, 3, 16, 16, dtype=dtype, device=device), torch.zeros(2, device=device)
    with pytest.raises(ValueError, match=rf"x: expected torch.float32, .* got {dtype}; pass x.to"):
        model(x, t)


def test_autocast_takes_images_of_any_dtype():
    model = fastdit.DiT(n_layers=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.zeros(2, 3, 16, 16).bfloat16(), torch.zeros(2)).shape == (2, 3, 16, 16)


def test_timesteps_that_bfloat16_has_rounded_are_a_value_error():
    model = fastdit.DiT(n_layers=1).bfloat16()
    x = torch.zeros(1, 3, 16, 16).bfloat16()
    with pytest.raises(ValueError, match=r"t: expected integers or float32, got torch.bfloat16"):
        model(x, torch.tensor([999.0]).bfloat16())
    assert model(x, torch.tensor([999.0])).isfinite().all()


@pytest.mark.parametrize("label", [-1, 10, 11])
def test_a_label_out_of_range_is_a_value_error_on_a_cpu(label):
    model = fastdit.DiT(n_layers=1, num_classes=10, null_class=label == 11)
    x, t, y = torch.zeros(2, 3, 16, 16), torch.zeros(2), torch.tensor([0, label])
    rows = model.cfg.class_rows
    with pytest.raises(ValueError, match=rf"y: expected values in \[0, {rows}\), got"):
        model(x, t, y)
