"""The best size for a budget, against a search over sizes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.experiments.scaling.laws import KNOWN
from transformerlm.experiments.scaling.law import ScalingLaw
from transformerlm.experiments.scaling.optimum import Cost, best_size, budget_of_tokens, edge_of, measured_cost

COSTS = (Cost("FLOPs"), Cost("seconds", 3e-9, 0.7))


@pytest.mark.parametrize("cost", COSTS, ids=["6ND", "measured"])
def test_no_other_size_is_better(cost: Cost) -> None:
    """Of all sizes that cost the same, a fine search finds the same one."""
    budget = float(cost.of(1e8, 2e9))
    parameters, tokens = best_size(KNOWN, cost, budget)
    assert cost.of(parameters, tokens) == pytest.approx(budget)
    sizes = np.geomspace(1e5, 1e11, 200_001)
    losses = KNOWN.loss(sizes, budget / (cost.scale * sizes**cost.power))
    assert parameters == pytest.approx(sizes[np.argmin(losses)], rel=1e-4)


def test_the_size_grows_with_the_power_a() -> None:
    """For C = 6 N D a hundred times the budget is 100^(beta / (alpha + beta)) times the size."""
    small, large = (best_size(KNOWN, COSTS[0], budget)[0] for budget in (1e18, 1e20))
    assert large / small == pytest.approx(100 ** (0.38 / 0.71))


@pytest.mark.parametrize("cost", COSTS, ids=["6ND", "measured"])
def test_tokens_lead_to_the_budget_that_takes_them(cost: Cost) -> None:
    """The budget of a number of tokens has that many at its best size."""
    assert best_size(KNOWN, cost, budget_of_tokens(KNOWN, cost, 3e9))[1] == pytest.approx(3e9)


def test_a_law_that_tokens_do_not_lower_has_no_optimum() -> None:
    """It is NaN, for that law of a bootstrap alone."""
    laws = ScalingLaw(
        E=np.ones((2, 1)),
        A=np.full((2, 1), 400.0),
        B=np.full((2, 1), 1500.0),
        alpha=np.array([[0.33], [0.33]]),
        beta=np.array([[0.38], [-0.1]]),
    )
    parameters, tokens = best_size(laws, COSTS[0], 1e18)
    assert np.isfinite(parameters).tolist() == [[True], [False]]
    assert parameters[0, 0] == pytest.approx(float(best_size(KNOWN, COSTS[0], 1e18)[0]))
    assert np.isnan(tokens[1, 0])


def test_a_cost_is_measured_from_runs() -> None:
    """The power law of the costs comes back; costs that are no law of the size are none."""
    sizes = np.geomspace(1e5, 1e8, 6)
    cost = measured_cost("seconds", sizes, 3e-9 * sizes**0.7)
    assert cost is not None
    assert (cost.scale, cost.power) == (pytest.approx(3e-9), pytest.approx(0.7))
    wild = sizes.copy()
    wild[3] *= 1000
    assert measured_cost("seconds", sizes, wild) is None
    assert measured_cost("seconds", sizes[:1], sizes[:1]) is None
    assert measured_cost("seconds", sizes, np.full(6, np.nan)) is None


def test_an_edge_is_outside_and_at_the_ends() -> None:
    """Only what has something measured on both sides is inside."""
    measured = np.array([3.0, 1.0, 2.0])
    assert [edge_of(value, measured) for value in (0.5, 1.0, 1.5, 3.0, 9.0)] == [
        "below",
        "below",
        None,
        "above",
        "above",
    ]
