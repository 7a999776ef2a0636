"""The law and its objective, against numbers made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.experiments.scaling.laws import KNOWN, drawn
from transformerlm.experiments.scaling.law import ScalingLaw, huber, objective


def test_a_law_is_the_sum_of_its_terms() -> None:
    """A number made by hand; without A the parameters do not matter, not even unknown ones."""
    law = ScalingLaw(E=2.0, A=100.0, B=27.0, alpha=0.5, beta=1 / 3)
    assert law.loss(1e4, 1e3) == pytest.approx(2 + 100 / 100 + 27 / 10)
    of_tokens = ScalingLaw(E=2.0, B=27.0, beta=1 / 3)
    assert of_tokens.loss(float("nan"), 1e3) == pytest.approx(2 + 27 / 10)


def test_laws_of_a_bootstrap_give_a_row_each() -> None:
    """Constants (resamples, 1) and runs (n,) give losses (resamples, n)."""
    law = ScalingLaw(E=np.array([[1.0], [2.0]]), A=np.array([[10.0], [20.0]]), alpha=np.array([[1.0], [1.0]]))
    np.testing.assert_allclose(law.loss(np.array([5.0, 10.0, 20.0]), 1.0), [[3, 2, 1.5], [6, 4, 3]])


def test_huber_is_a_square_near_zero_and_a_line_beyond() -> None:
    """Both halves meet at delta, with one slope."""
    errors = np.array([-0.5, 0.0, 0.5, 1.0, 3.0])
    np.testing.assert_allclose(huber(errors, 1.0), [0.125, 0, 0.125, 0.5, 2.5])


def test_the_objective_is_a_sum_over_runs() -> None:
    """It is 0 for the law that made the losses, and twice as many runs count twice."""
    points = drawn(noise=0.01)
    numbers = (points.parameters, points.tokens, points.losses)
    once = objective(KNOWN, *numbers)
    assert once > 0
    assert objective(KNOWN, *(np.tile(one, 2) for one in numbers)) == pytest.approx(2 * once)
    assert objective(KNOWN, *numbers[:2], KNOWN.loss(*numbers[:2])) == pytest.approx(0, abs=1e-30)
