"""What the error rule accepts and what it rejects."""

import pytest
import torch

import fastdit
from fastdit.testing import check_against_oracle, randomize


@pytest.fixture
def oracle():
    return torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def noisy(oracle, size, seed):
    z = torch.randn(4096, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return oracle + size * z


def test_an_equally_good_result_passes(oracle):
    check_against_oracle(noisy(oracle, 1e-3, 1), noisy(oracle, 1e-3, 2), oracle)


def test_three_times_the_error_fails(oracle):
    with pytest.raises(AssertionError, match="relative error"):
        check_against_oracle(noisy(oracle, 3e-3, 1), noisy(oracle, 1e-3, 2), oracle)


def test_one_wrong_element_fails(oracle):
    actual = noisy(oracle, 1e-3, 1)
    actual[77] += 0.04
    with pytest.raises(AssertionError, match="largest error"):
        check_against_oracle(actual, noisy(oracle, 1e-3, 2), oracle)


def test_nan_fails(oracle):
    actual = oracle.clone()
    actual[0] = float("nan")
    with pytest.raises(AssertionError):
        check_against_oracle(actual, noisy(oracle, 1e-3, 2), oracle)


@pytest.mark.parametrize("proves_nothing", [torch.zeros(4096).double(), torch.ones(4095).double()])
def test_an_oracle_that_proves_nothing_is_refused(proves_nothing):
    with pytest.raises(ValueError, match="oracle: expected at least 4096"):
        check_against_oracle(proves_nothing, proves_nothing, proves_nothing)


def test_randomize_leaves_no_weight_zero():
    model = fastdit.DiT()
    randomize(model)
    assert all((p != 0).all() for p in model.parameters())
