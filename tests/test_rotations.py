import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sliceserve.slicing.rotations import align, auto_rank, default_rank, fixed_rank


def bases(hidden_size: int, width: int, closeness: float) -> tuple[Tensor, Tensor]:
    """Two orthonormal bases of spaces that are the closer the larger `closeness` is."""
    generator = torch.Generator().manual_seed(hidden_size + width)
    first, second = (
        torch.randn(hidden_size, width, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    before, after = torch.linalg.qr(first).Q, torch.linalg.qr(second + closeness * first).Q
    return before, after


@pytest.mark.parametrize(("hidden_size", "width"), [(96, 72), (64, 56), (48, 47), (40, 40)])
@pytest.mark.parametrize("closeness", [0.0, 3.0])
def test_the_rotation_turns_no_more_directions_than_are_deleted(
    hidden_size: int, width: int, closeness: float
) -> None:
    before, after = bases(hidden_size, width, closeness)
    alignment = align(before, after)
    basis = alignment.basis
    identity = torch.eye(width, dtype=torch.float64)
    assert_close(basis.T @ basis, identity, rtol=0, atol=1e-12)
    assert_close(basis @ basis.T, after @ after.T, rtol=0, atol=1e-12)
    rotation = before.T @ basis
    assert_close(rotation, rotation.T, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(identity - rotation, atol=1e-9) <= hidden_size - width
    down, up = alignment.factors(hidden_size - width)
    assert down.shape == (width, hidden_size - width)
    assert up.shape == (hidden_size - width, width)
    assert_close(identity + down @ up, rotation, rtol=0, atol=1e-12)


def test_what_is_neglected_makes_up_for_the_rank() -> None:
    before, after = bases(96, 72, 3.0)
    alignment = align(before, after)
    rotation = before.T @ alignment.basis - torch.eye(72, dtype=torch.float64)
    errors = []
    for rank in (0, 5, 20):
        kept, left = (
            (down @ up) for down, up in (alignment.factors(rank), alignment.neglected(rank))
        )
        assert_close(kept + left, rotation, rtol=0, atol=1e-12)
        # The best approximation of a symmetric matrix at this rank (Eckart and Young).
        best = torch.linalg.svdvals(rotation)[rank]
        assert_close(torch.linalg.matrix_norm(left, 2), best)
        errors.append(float(best))
    assert errors == sorted(errors, reverse=True)


def test_ranks_by_number_and_by_angle() -> None:
    cosines = torch.tensor([0.1, 0.9, 0.97, 0.99, 1.0])
    assert auto_rank(cosines) == 3
    assert fixed_rank(2)(cosines) == 2
    assert fixed_rank(9)(cosines) == 5


@pytest.mark.parametrize(
    ("hidden_size", "rank"),
    [(64, 8), (576, 8), (1024, 16), (2048, 32), (2304, 64), (4096, 64), (8192, 128)],
)
def test_the_default_rank_keeps_to_whole_blocks(hidden_size: int, rank: int) -> None:
    assert default_rank(hidden_size) == rank
