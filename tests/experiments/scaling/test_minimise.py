"""The way to the minimum: the terms are right, and the end is a minimum of the plain objective."""

from __future__ import annotations

import numpy as np
import pytest

from transformerlm.experiments.scaling.minimise import Sample, minimise, predicted

RNG = np.random.default_rng(5)
INPUTS = RNG.uniform(-2, 2, (40, 2))
TRUE = np.array([[0.5, 0.2, 0.4, 0.3, 0.45]])
LOSSES = predicted(TRUE, INPUTS)[0][0] + RNG.normal(0, 0.01, 40)


def plain(params: np.ndarray, delta: float) -> float:
    """Return the objective as the formula has it, for one row of parameters."""
    e, a, b, alpha, beta = params
    x, z = INPUTS.T
    errors = np.abs(np.log(np.exp(e) + np.exp(a - alpha * x) + np.exp(b - beta * z)) - LOSSES)
    return float(np.where(errors <= delta, errors**2 / 2, delta * (errors - delta / 2)).sum())


@pytest.mark.parametrize("delta", [1e-3, 1.0])
def test_the_end_is_a_minimum_of_the_formula(delta: float) -> None:
    """No small change of any parameter lowers the objective, whether errors count by size or by square."""
    sample = Sample(inputs=INPUTS, log_losses=LOSSES, weights=np.ones((1, 40)), delta=delta)
    starts = TRUE + RNG.normal(0, 0.3, (8, 5))
    params, objectives = minimise(starts, sample)
    best = params[np.argmin(objectives)]
    assert plain(best, delta) == pytest.approx(objectives.min(), rel=1e-10)
    for step in [*np.eye(5), *RNG.normal(size=(20, 5))]:
        for size in (1e-3, -1e-3, 1e-2, -1e-2):
            assert plain(best + size * step, delta) >= objectives.min() * (1 - 1e-9)


def test_shares_are_the_derivatives_by_the_heights() -> None:
    """They sum to one, and agree with differences of the formula."""
    value, shares = predicted(TRUE, INPUTS)
    np.testing.assert_allclose(shares.sum(axis=2), 1)
    for place in range(3):
        moved = TRUE.copy()
        moved[0, place] += 1e-6
        np.testing.assert_allclose((predicted(moved, INPUTS)[0] - value)[0] / 1e-6, shares[0, :, place], atol=1e-6)


def test_weights_are_repetitions() -> None:
    """A run of weight 2 counts as two runs, and one of weight 0 not at all."""
    weights = np.ones((1, 40))
    weights[0, :10], weights[0, 10:20] = 2, 0
    rows = [*range(10), *range(10), *range(20, 40)]
    weighted = Sample(inputs=INPUTS, log_losses=LOSSES, weights=weights, delta=1.0)
    repeated = Sample(inputs=INPUTS[rows], log_losses=LOSSES[rows], weights=np.ones((1, 40)), delta=1.0)
    np.testing.assert_allclose(minimise(TRUE, weighted)[0], minimise(TRUE, repeated)[0], rtol=1e-6)


def test_a_start_far_away_stays_finite() -> None:
    """A term that underflows to nothing has no slope, and the equations can be solved all the same."""
    sample = Sample(inputs=INPUTS, log_losses=LOSSES, weights=np.ones((1, 40)))
    params, objectives = minimise(np.array([[700.0, -900.0, -900.0, 0.0, 50.0]]), sample)
    assert np.isfinite(params).all()
    assert np.isfinite(objectives).all()
