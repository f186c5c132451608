"""Rotations rounded into matrices in fp8, against float64."""

import pytest
import torch
from torch import Tensor

from sliceserve.server.fp8 import FP8, LARGEST, add_columns, round_rows


def values(rows: int, columns: int, spread: float) -> Tensor:
    """Normal values whose rows differ in size by as much as `spread` powers of ten."""
    generator = torch.Generator().manual_seed(3)
    sizes = 10 ** (spread * (torch.rand(rows, 1, generator=generator) - 0.5))
    return torch.randn(rows, columns, generator=generator) * sizes


def assert_nearest(rounded: Tensor, scales: Tensor, exact: Tensor) -> None:
    """Check that no value is further off than half of e4m3's last bit, or smallest step."""
    furthest = torch.maximum(exact.double().abs() * 2**-4, scales.double() * 2**-10)
    error = (rounded.double() * scales.double() - exact.double()).abs()
    assert (error <= furthest * (1 + 1e-5)).all()


def test_rows_have_scales_of_their_own() -> None:
    rows = values(50, 24, 6.0)
    rows[7] = 0
    rounded, scales = round_rows(rows)
    assert rounded.dtype == FP8
    assert_nearest(rounded, scales, rows)
    assert rounded.float().abs().amax(1).tolist() == [LARGEST] * 7 + [0] + [LARGEST] * 42


@pytest.mark.parametrize("spread", [0.0, 4.0])
def test_columns_join_rows_that_stay_as_they_are(spread: float) -> None:
    stored, scales = round_rows(values(50, 24, 0.0))
    before = stored.double() * scales
    columns = values(50, 8, spread)
    weight, rounded, grown = add_columns(stored, scales, columns)
    assert_nearest(rounded, grown, columns)
    steps = grown / scales
    assert torch.equal(steps, 2 ** steps.log2().round())
    assert (steps >= 1).all()
    # No scale is twice what it has to be.
    needed = torch.maximum(scales, columns.abs().amax(1, keepdim=True) / LARGEST)
    assert (grown < 2 * needed * (1 + 1e-6)).all()
    # Exactly, but for what falls below the smallest normal value.
    normal = (before / grown).abs() >= torch.finfo(FP8).smallest_normal
    assert torch.equal((weight.double() * grown)[normal], before[normal])
    assert normal.float().mean() > 0.8


def test_rows_of_zeros_take_the_columns_scales() -> None:
    stored, scales = torch.zeros(3, 4).to(FP8), torch.zeros(3, 1)
    columns = torch.tensor([[1.0, -2.0], [0.0, 0.0], [3e-4, 1e-4]])
    weight, rounded, grown = add_columns(stored, scales, columns)
    assert not weight.float().any()
    assert_nearest(rounded, grown, columns)
