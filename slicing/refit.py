"""Ridge regression towards the dense model's signals, pulled towards the weights there are.

A sliced sublayer's output is refitted so that the stream comes to where the dense stream is, within
the kept basis: min ‖Y - XW‖² + λ·m·‖W - W₀‖², with X what the writer reads in the sliced model, Y
what is missing to the dense stream, W₀ the weights without a refit and m the mean of diag(XᵀX).
λ = ∞ gives W₀. λ is chosen on windows that the fit does not see.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sliceserve.slicing.moments import product_rows

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
HELD_OUT = 8  # one window in so many
# Of the gain on held-out windows, what is given up for a stronger pull: other text gains by it.
FORGONE = 0.02
ROUNDING = 1e-6


@dataclass(frozen=True)
class Fit:
    """What a regression gives.

    Attributes:
        weight: W, [inputs, outputs], float64.
        strength: λ; infinite where no fit was better than W₀ on held-out windows, nan where W₀
            left no error there.
        gain: the share of the held-out squared error of W₀ that the fit takes away.

    """

    weight: Tensor
    strength: float
    gain: float


class Regression:
    """The sums of one ridge regression, those of held-out windows apart."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> list[Tensor]:
            return [torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2)]

        self._gram, self._cross = zeros(inputs, inputs), zeros(inputs, outputs)
        self._energy = [0.0, 0.0]

    def add(self, x: Tensor, y: Tensor, first: int) -> None:
        """Add windows.

        Args:
            x: what the linear reads, [windows, positions, inputs].
            y: what it should write, [windows, positions, outputs].
            first: the number of the first of these windows; decides which are held out.

        """
        for number in range(len(x)):
            part = int((first + number) % HELD_OUT == 0)
            for rows, targets in zip(product_rows(x[number]), product_rows(y[number]), strict=True):
                self._gram[part] += rows.T @ rows
                self._cross[part] += rows.T @ targets
                self._energy[part] += targets.square().sum().item()

    def fit(self, prior: Tensor) -> Fit:
        """Solve for W near `prior`, W₀ [inputs, outputs] in float64."""
        unfitted = self._error(prior)
        errors = {
            strength: self._error(_solve(self._gram[0], self._cross[0], prior, strength))
            for strength in STRENGTHS
        }
        best = min(errors.values())
        # What is left of the rounding of the products is no error.
        if unfitted < ROUNDING * self._energy[1]:
            return Fit(prior, float("nan"), 0.0)
        if not best < unfitted:
            return Fit(prior, float("inf"), 0.0)
        enough = best + FORGONE * (unfitted - best)
        strength = max(strength for strength, error in errors.items() if error <= enough)
        gram, cross = self._gram[0] + self._gram[1], self._cross[0] + self._cross[1]
        weight = _solve(gram, cross, prior, strength)
        return Fit(weight, strength, 1 - errors[strength] / unfitted)

    def _error(self, weight: Tensor) -> float:
        """Return the squared error on held-out windows."""
        product = self._gram[1] @ weight - 2 * self._cross[1]
        return self._energy[1] + float((weight * product).sum())


def _solve(gram: Tensor, cross: Tensor, prior: Tensor, strength: float) -> Tensor:
    ridge = gram.clone()
    ridge.diagonal().add_((strength * gram.diagonal().mean()).clamp(min=1e-300))
    factor = torch.linalg.cholesky(ridge)
    return prior + torch.cholesky_solve(cross - gram @ prior, factor)
