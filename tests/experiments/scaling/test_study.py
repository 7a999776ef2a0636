"""What is found out from points: both ways to count parameters, optima with intervals and edges, and JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from config.scaling import FitConfig
from tests.experiments.scaling.laws import KNOWN, drawn, points_of
from transformerlm.experiments.scaling.law import ScalingLaw
from transformerlm.experiments.scaling.optimum import Cost
from transformerlm.experiments.scaling.study import (
    best_measured,
    law_record,
    optimum_of,
    predict_run,
    rollout_record,
    study_points,
)

FIT = FitConfig(resamples=30)


def test_both_ways_to_count_parameters_are_fitted() -> None:
    """The one that is asked for is the law, the other stands beside it; unknown ones are refused."""
    points = drawn(noise=0.001)
    points = replace(points, body=points.parameters / 2)
    whole, body = (
        study_points(points, FIT),
        study_points(points, FitConfig(resamples=0, parameters="without_embeddings")),
    )
    assert whole.other is not None
    assert float(whole.other.law.A) == pytest.approx(float(body.fit.law.A))
    assert float(whole.other.law.A) == pytest.approx(float(whole.fit.law.A) / 2**KNOWN.alpha, rel=0.05)
    with pytest.raises(ValueError, match="without_embeddings"):
        study_points(drawn(), FitConfig(parameters="without_embeddings"))
    with pytest.raises(ValueError, match="expected fewer than the 25 runs, found 25"):
        study_points(drawn(), FitConfig(drop_highest=25))


def test_an_optimum_says_where_its_edges_are() -> None:
    """Inside of the runs there is none; far above, both N and D are outside, and the interval holds the size."""
    study = study_points(drawn(noise=0.01), FIT)
    assert study.flops is not None
    assert (study.flops.scale, study.flops.power) == (pytest.approx(6), pytest.approx(1))
    inside = optimum_of(study, study.flops, 6 * 1e7 * 2e8)
    far = optimum_of(study, study.flops, 1e21)
    assert inside is not None
    assert far is not None
    assert inside.edges == []
    assert far.edges == ["parameters above", "tokens above"]
    for found in (inside, far):
        low, high = found.parameter_intervals[0.8]
        assert low < found.parameters < high
    narrow, wide = ((one.parameter_intervals[0.8][1] / one.parameter_intervals[0.8][0]) for one in (inside, far))
    assert narrow < wide


def test_laws_without_an_optimum_count_at_both_ends_of_its_interval() -> None:
    """A bootstrap in which many laws say that tokens do not help could want any size: the interval has no end."""
    study = study_points(drawn(), FitConfig(resamples=0))
    betas = np.where(np.arange(30) % 2, 0.38, -0.1)[:, None]
    each = {name: np.full((30, 1), getattr(KNOWN, name)) for name in ("E", "A", "B", "alpha")}
    fit = replace(study.fit, resampled=ScalingLaw(**each, beta=betas))
    found = optimum_of(replace(study, fit=fit), Cost("FLOPs"), 1e18)
    assert found is not None
    assert found.parameter_intervals[0.8] == (0.0, float("inf"))


def test_a_prediction_says_how_far_beyond_the_runs_it_is() -> None:
    """In units of the most expensive run; more than ten times is far."""
    study = study_points(drawn(), FIT)
    most = study.fit.points.flops.max()
    near, far = (predict_run(study, parameters=5e7, tokens=factor * most / 6 / 5e7) for factor in (2.0, 50.0))
    assert (near.far, far.far) == (pytest.approx(2), pytest.approx(50))
    assert (near.is_far, far.is_far) == (False, True)
    assert near.loss == pytest.approx(float(KNOWN.loss(5e7, near.tokens)))


def test_the_best_of_a_budget_may_be_at_its_edge() -> None:
    """Of five sizes at equal FLOPs the lowest loss counts; with the smallest or largest, it is said."""
    sizes = np.geomspace(1e6, 1e7, 5)
    losses = {"in the middle": [3, 2, 1.5, 2, 3], "above": [3.0, 2.5, 2.2, 2.1, 2.0], "below": [1.0, 2, 3, 4, 5]}
    found = [best_measured(points_of(sizes, 1e15 / 6 / sizes, one))[0] for one in losses.values()]
    assert [one["edge"] for one in found] == [None, "above", "below"]
    assert found[0]["parameters"] == pytest.approx(sizes[2])
    assert best_measured(drawn(2, 6)) == []


def test_all_of_it_is_json() -> None:
    """Numbers that JSON has none for are not in it."""
    study = study_points(drawn(noise=0.01), FIT)
    law = json.loads(json.dumps(law_record(study.fit, "all"), allow_nan=False))
    assert law["intervals"]["alpha"].keys() == {"80", "95"}
    assert law["starts_that_agree"] <= law["starts"] == 81
    assert json.loads(json.dumps(rollout_record(study.rollout), allow_nan=False))["done"]
    assert rollout_record("too few") == {"done": False, "why": "too few"}
