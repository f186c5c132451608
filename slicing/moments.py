"""Second moments of the residual stream and their principal bases, in float64.

Float32 throughout costs 0.4 to 1.8 perplexity on Llama-2-7B (SliceGPT, table 4). Sums and
eigenvectors are float64; products of some thousand rows may be float32 (`benchmarks/moments.py`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

DAMPING = 0.01
ROWS_PER_PRODUCT = 4096
BLOCKS = 4


def product_rows(x: Tensor) -> Iterator[Tensor]:
    """Give the rows of x, [..., columns], for products to be summed: some thousand at a time.

    In float64, or in float32 on a CPU, which is faster in it, if x is not float64.
    """
    wide = x.device.type != "cpu" or x.dtype == torch.float64
    for rows in torch.split(x.reshape(-1, x.shape[-1]), ROWS_PER_PRODUCT):
        yield rows.to(torch.float64 if wide else torch.float32)


class SecondMoment:
    """The uncentred second moment C = Σ xxᵀ of rows x, accumulated in float64."""

    def __init__(self, hidden_size: int, device: torch.device, exact: bool = False) -> None:
        """Start at zero; `exact` takes products in float64 on a CPU too, for a rank that is so."""
        self._exact = exact
        self._lower = torch.zeros(hidden_size, hidden_size, dtype=torch.float64, device=device)
        self._columns = -(-hidden_size // BLOCKS)

    def add(self, x: Tensor) -> None:
        """Add the rows of x, [..., hidden_size]."""
        size = len(self._lower)
        for rows in product_rows(x.double() if self._exact else x):
            # C is symmetric: blocks of columns from the diagonal down are five eighths of it.
            for start in range(0, size, self._columns):
                block = slice(start, min(start + self._columns, size))
                self._lower[start:, block] += rows[:, start:].T @ rows[:, block]

    @property
    def sum(self) -> Tensor:
        """C, [hidden_size, hidden_size]."""
        lower = self._lower.tril(-1)
        return lower + lower.T + self._lower.diagonal().diag()


def principal_basis(moment: Tensor, width: int, centred: bool) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors of the `width` largest eigenvalues of a damped second moment.

    The damping, 1 % of the mean diagonal, is the published implementation's; it leaves the
    eigenvectors as they are and helps the decomposition when calibration rows are few.

    Args:
        moment: C, [hidden_size, hidden_size], float64.
        width: columns to keep.
        centred: whether the rows have mean 0 (before a LayerNorm); the direction (1, …, 1) is then
            empty and is kept last, also when other directions are empty too.

    Returns:
        U, [hidden_size, width], float64, orthonormal columns, and all eigenvalues without the
        damping, [hidden_size], falling.

    """
    damped = moment.clone()
    damping = DAMPING * moment.diagonal().mean()
    damped.diagonal().add_(damping)
    if centred:
        damped.sub_(damping / len(damped))
    values, vectors = torch.linalg.eigh(damped)
    # Off the empty direction (1, …, 1) the damping shifts every eigenvalue alike.
    spectrum = (values - damping).clamp(min=0).flip(-1)
    return vectors.flip(-1)[:, :width].contiguous(), spectrum


def numerical_rank(spectrum: Tensor) -> int:
    """Count the eigenvalues that are not zero in float64 (the tolerance of `matrix_rank`)."""
    tolerance = spectrum.max() * len(spectrum) * torch.finfo(torch.float64).eps
    return int((spectrum > tolerance).sum())
