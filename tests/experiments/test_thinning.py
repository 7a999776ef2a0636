"""Long curves with few points: bounds, peaks, ends, values that are not finite, means."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformerlm.experiments.history import Series
from transformerlm.experiments.thinning import few_places, thinned, with_peaks

VALUES = st.floats(allow_nan=True, allow_infinity=True, width=32)


def series_of(values) -> Series:
    """Return a curve with these values at every third step."""
    return Series(np.arange(1, 3 * len(values) + 1, 3), np.array(values, dtype=np.float64))


def test_a_short_curve_stays_whole():
    """As many points as there may be are not thinned, and need no means."""
    series = series_of(range(50))
    found = thinned(series, 50)
    assert found.points is series
    assert found.means is None


@settings(deadline=None, max_examples=40)
@given(st.lists(VALUES, min_size=40, max_size=400), st.integers(16, 39))
def test_points_are_the_curves_own_and_few(values, most):
    """Each point is one of the curve, both ends stay, so do its highest and lowest, and no more than asked for."""
    series = series_of(values)
    found = thinned(series, most)
    own = dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))
    for step, value in zip(found.points.steps.tolist(), found.points.values.tolist(), strict=True):
        np.testing.assert_equal(value, own[step])
    assert (np.diff(found.points.steps) > 0).all()
    assert found.points.steps[[0, -1]].tolist() == series.steps[[0, -1]].tolist()
    assert len(found.points.steps) + len(found.means.steps) <= most
    finite = series.values[np.isfinite(series.values)]
    if len(finite):
        kept = found.points.values[np.isfinite(found.points.values)]
        near = 2e-4 * np.ptp(finite)
        assert kept.max() >= finite.max() - near
        assert kept.min() <= finite.min() + near
    assert np.isfinite(series.values).all() == np.isfinite(found.points.values).all()


def test_means_are_those_of_the_stretches():
    """Of noise around a line, the means are near the line, while the points are far from it."""
    generator = np.random.default_rng(0)
    values = np.linspace(5, 3, 20_000) + generator.choice([-1.0, 1.0], 20_000)
    found = thinned(series_of(values), 200)
    expected = np.interp(found.means.steps, [1, 60_000], [5, 3])
    assert np.abs(found.means.values - expected).max() < 0.4
    assert np.abs(found.points.values - np.interp(found.points.steps, [1, 60_000], [5, 3])).min() > 0.8


def test_a_straight_curve_needs_no_points_between():
    """A learning rate that falls on a line is two points, and a kink is a third one."""
    straight = thinned(series_of(np.linspace(1, 0, 5000)), 100).points
    bent = thinned(series_of(np.concatenate([np.linspace(0, 1, 2500), np.linspace(1, 0, 2500)])), 100).points
    assert len(straight.steps) == 2
    assert 3 <= len(bent.steps) <= 6
    assert bent.values.max() == 1


@pytest.mark.parametrize("count", [10, 5000])
def test_a_clock_keeps_where_tokens_bend(count):
    """Between the places that stay, tokens at all steps follow by proportion, also around skipped steps."""
    steps = np.arange(1, count + 1)
    tokens = 64.0 * (steps - (steps > count // 3) - (steps > count // 2))
    places = few_places(steps, tokens, 100)
    assert len(places) <= 110
    np.testing.assert_allclose(np.interp(steps, steps[places], tokens[places]), tokens)


@pytest.mark.parametrize("count", [2, 799, 800, 801, 12_345])
def test_few_points_have_ends_and_extremes_in_order(count):
    """Few points are all kept; of many, the first, the last, the lowest and the highest are."""
    values = np.random.default_rng(count).normal(size=count)
    found = with_peaks(Series(np.arange(count) * 3, values), 800)
    assert len(found.steps) == min(count, len(found.steps)) <= 802
    assert set(zip(found.steps.tolist(), found.values.tolist(), strict=True)) <= set(
        zip((np.arange(count) * 3).tolist(), values.tolist(), strict=True)
    )
    assert (np.diff(found.steps) > 0).all()
    assert (found.steps[0], found.steps[-1]) == (0, 3 * (count - 1))
    assert (found.values.min(), found.values.max()) == (values.min(), values.max())
    assert len(found.steps) == count or count > 800
