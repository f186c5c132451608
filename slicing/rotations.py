"""Rotations between neighbouring places of the residual stream, made nearly free.

Inside the kept space of a place any orthonormal basis will do: it folds into the weights. Chosen by
the polar factor of U_sᵀU_{s+1} (orthogonal Procrustes), the rotation S = U_sᵀU_{s+1} is symmetric,
P·Σ·Pᵀ, with the cosines of the principal angles between the two spaces in Σ. Two d-dimensional
spaces of R^D share at least 2d - D directions, where the cosine is 1, so I - S has rank D - d at
most, and x·S = x + (x·A)·B with A = P_r and B = -(I - Σ_r)·P_rᵀ: exact at r = D - d, and at less
with the directions left alone that turn least.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RANK_TOLERANCE = 0.02  # of a cosine, for `auto_rank`

LEAST_SQUARE = 1e-6  # of a cosine, for the faster decomposition

RankRule = Callable[[Tensor], int]  # from the cosines, rising, to the directions to turn


@dataclass(frozen=True)
class Alignment:
    """A basis aligned with the one before it.

    Attributes:
        basis: U_{s+1}, [hidden_size, width].
        directions: P, [width, width], those that turn most first.
        cosines: Σ, [width], rising.

    """

    basis: Tensor
    directions: Tensor
    cosines: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return A [width, rank] and B [rank, width] of x·S ≈ x + (x·A)·B."""
        return _factors(self.directions[:, :rank], self.cosines[:rank])

    def neglected(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the factors of what a rotation of this rank leaves out."""
        return _factors(self.directions[:, rank:], self.cosines[rank:])


def align(before: Tensor, after: Tensor) -> Alignment:
    """Turn the basis `after` within its space towards `before`.

    Args:
        before: U_s, [hidden_size, width], orthonormal columns.
        after: any orthonormal basis of the next space, [hidden_size, width].

    """
    product = before.T @ after
    squares, right = torch.linalg.eigh(product.T @ product)
    if squares[0] > LEAST_SQUARE:
        # Fifty times as fast on a GPU as a singular value decomposition.
        cosines = squares.sqrt()
        left = product @ right / cosines
    else:
        left, falling, rows = torch.linalg.svd(product)
        left, cosines, right = left.flip(-1), falling.flip(-1), rows.T.flip(-1)
    return Alignment(after @ (right @ left.T), left, cosines.clamp(max=1))


def fixed_rank(rank: int) -> RankRule:
    """Turn `rank` directions, or all that can turn if these are fewer."""

    def rule(cosines: Tensor) -> int:
        return min(rank, len(cosines))

    return rule


def default_rank(hidden_size: int) -> int:
    """Return the directions to turn at each place unless told.

    A 72nd, in whole eights, or in whole 64s where hidden_size is 2304 or more: the matrix products
    of a GPU that the rotation joins are a tenth slower at other widths (docs/speed.md).
    """
    share = hidden_size / 72
    multiple = 64 if share >= 32 else 8
    return max(1, round(share / multiple)) * multiple


def auto_rank(cosines: Tensor) -> int:
    """Turn the directions whose cosine is below 1 by more than `RANK_TOLERANCE`."""
    return int((1 - cosines > RANK_TOLERANCE).sum())


def _factors(directions: Tensor, cosines: Tensor) -> tuple[Tensor, Tensor]:
    return directions, (cosines - 1).unsqueeze(1) * directions.T
