import math

import pytest
import torch
from torch.testing import assert_close

from sliceserve.slicing.refit import HELD_OUT, STRENGTHS, Regression


def problem(noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Windows of inputs, targets and a prior that is not far from the truth."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x, truth = normal(24, 10, 12), normal(12, 5)
    return x, x @ truth + noise * normal(24, 10, 5), truth + 0.1 * normal(12, 5)


def fitted(x: torch.Tensor, y: torch.Tensor) -> Regression:
    regression = Regression(x.shape[-1], y.shape[-1], torch.device("cpu"))
    for first in range(0, len(x), 3):
        regression.add(x[first : first + 3], y[first : first + 3], first)
    return regression


def ridge(x: torch.Tensor, y: torch.Tensor, prior: torch.Tensor, strength: float) -> torch.Tensor:
    """The same by least squares on rows for the penalty."""
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    pull = math.sqrt(strength * float((x.T @ x).diagonal().mean()))
    rows = torch.cat([x, pull * torch.eye(x.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(rows, torch.cat([y, pull * prior])).solution


def test_the_fit_is_ridge_regression_at_the_strength_that_is_chosen() -> None:
    x, y, prior = problem(noise=0.5)
    fit = fitted(x, y).fit(prior)
    assert fit.strength in STRENGTHS
    assert_close(fit.weight, ridge(x, y, prior, fit.strength), rtol=0, atol=1e-9)


@pytest.mark.parametrize("noise", [0.01, 1.0])
def test_the_strength_is_chosen_on_windows_that_the_fit_does_not_see(noise: float) -> None:
    x, y, prior = problem(noise)
    held = torch.arange(len(x)) % HELD_OUT == 0

    def error(weight: torch.Tensor) -> float:
        return float((y[held] - x[held] @ weight).square().sum())

    errors = {s: error(ridge(x[~held], y[~held], prior, s)) for s in STRENGTHS}
    fit = fitted(x, y).fit(prior)
    best = min(errors.values())
    assert errors[fit.strength] <= best + 0.02 * (error(prior) - best)
    stronger = [s for s in STRENGTHS if s > fit.strength]
    assert all(errors[s] > best + 0.02 * (error(prior) - best) for s in stronger)
    assert fit.gain == pytest.approx(1 - errors[fit.strength] / error(prior))


def test_a_prior_that_no_fit_beats_is_kept() -> None:
    x, _, truth = problem(noise=0)
    generator = torch.Generator().manual_seed(6)
    noise = torch.randn(24, 10, 5, dtype=torch.float64, generator=generator)
    held = torch.arange(len(x)) % HELD_OUT == 0
    # What the fit sees is misleading.
    y = x @ truth + noise * torch.where(held, 0.1, 30.0)[:, None, None]
    fit = fitted(x, y).fit(truth)
    assert torch.equal(fit.weight, truth)
    assert fit.strength == math.inf
    assert fit.gain == 0


def test_a_prior_without_error_is_not_counted_as_rejected() -> None:
    x, _, truth = problem(noise=0)
    fit = fitted(x, x @ truth).fit(truth)
    assert torch.equal(fit.weight, truth)
    assert math.isnan(fit.strength)


def test_an_input_that_is_always_zero_is_no_obstacle() -> None:
    x, y, prior = problem(noise=0.5)
    x[..., 3] = 0
    assert fitted(x, y).fit(prior).weight.isfinite().all()
