"""The rollout: cheap runs must predict the expensive ones."""

from __future__ import annotations

import numpy as np
import pytest

from tests.experiments.scaling.laws import drawn, points_of
from transformerlm.experiments.scaling.fit import fit_law
from transformerlm.experiments.scaling.rollout import Rollout, roll_out
from transformerlm.experiments.scaling.study import rollout_record


def test_a_true_law_predicts_the_largest_budget() -> None:
    """Without noise the error is nothing; the runs held out are the most expensive ones, a tenth at least."""
    found = roll_out(fit_law(drawn()), resamples=5, seed=0)
    assert isinstance(found, Rollout)
    assert np.abs(found.errors).max() < 1e-6
    assert found.points.flops.min() > found.fit.points.flops.max()
    assert len(found.points) + len(found.fit.points) == 25
    assert len(found.points) >= 3


def test_what_breaks_the_law_at_the_end_is_seen() -> None:
    """Losses that stop falling at the largest budget are above what was predicted for them."""
    points = drawn(noise=0.003)
    is_large = points.flops >= np.sort(points.flops)[-3]
    losses = np.where(is_large, points.losses * 1.1, points.losses)
    found = roll_out(fit_law(points_of(points.parameters, points.tokens, losses)), resamples=40, seed=0)
    assert isinstance(found, Rollout)
    assert found.errors == pytest.approx(1 / 1.1 - 1, abs=0.02)
    assert found.inside == 0


def test_too_few_runs_are_said_not_fitted() -> None:
    """Where the cheaper runs cannot bear the law, the reason is the answer."""
    found = roll_out(fit_law(drawn(4, 3, span=10)), resamples=5, seed=0)
    assert isinstance(found, str)
    assert "without the largest budget" in found


def test_seeds_of_one_size_are_one_run() -> None:
    """Three token counts bear no law with three constants, however often each was trained."""
    tokens = np.repeat([1e6, 2e6, 4e6, 8e6, 1e7], 2)
    points = points_of(np.full(10, 1e6), tokens, 2 + 300 * tokens**-0.4)
    found = roll_out(fit_law(points, "tokens"), resamples=0, seed=0)
    assert found == "without the largest budget, only 3 runs that differ are left, expected 4"


def test_without_a_bootstrap_there_are_errors_and_no_intervals() -> None:
    """One law would be an interval of no width, outside of which every run is."""
    found = roll_out(fit_law(drawn(noise=0.003)), resamples=0, seed=0)
    assert isinstance(found, Rollout)
    assert (found.low, found.high, found.inside) == (None, None, None)
    record = rollout_record(found)
    assert abs(record["mean_error"]) < 0.02
    assert record["in_80_percent_interval"] is None
    assert {run["interval_80"] for run in record["runs"]} == {None}
