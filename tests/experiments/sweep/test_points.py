"""Axes, and points on them: every combination, or some by chance."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from tests.experiments.sweep.helpers import sweep_config
from transformerlm.experiments.sweep.points import axes_of, by_chance, edges, grid, points_with


def test_a_grid_has_every_combination_once(tmp_path):
    """Axes and variants are multiplied; keys that go together count as one axis."""
    axes = [
        {"key": "optimizer.learning_rate", "values": [1e-3, 1e-2]},
        {"key": "model.d_model, model.num_heads", "values": ["32, 2", "64, 4"]},
    ]
    variants = [{"name": "plain"}, {"name": "silu", "set": ["model.ffn=silu"]}]
    points = list(grid(axes_of(sweep_config(tmp_path, axes=axes, variants=variants))))
    assert len({tuple(point.labels.values()) for point in points}) == len(points) == 8
    assert points[-1].labels == {"variant": "silu", "learning_rate": "0.01", "d_model+num_heads": "64,4"}
    assert points[-1].settings == {
        "model.ffn": "silu",
        "optimizer.learning_rate": "0.01",
        "model.d_model": "64",
        "model.num_heads": "4",
    }


def test_a_range_in_a_grid_is_cut_evenly(tmp_path):
    """On a log scale the values have equal ratios; integers come once each."""
    axes = [
        {"key": "optimizer.learning_rate", "low": 1e-4, "high": 1e-2, "scale": "log", "points": 3},
        {"key": "model.num_layers", "low": 1, "high": 3, "points": 9},
    ]
    rates, layers = axes_of(sweep_config(tmp_path, axes=axes))
    assert [option.label for option in rates.options] == ["0.0001", "0.001", "0.01"]
    assert [option.label for option in layers.options] == ["1", "2", "3"]


def test_a_narrow_range_has_as_many_values_as_were_asked_for(tmp_path):
    """Four digits would make two of these five."""
    axes = [{"key": "optimizer.beta2", "low": 0.9999, "high": 0.99999, "points": 5}]
    (axis,) = axes_of(sweep_config(tmp_path, axes=axes))
    values = [float(option.label) for option in axis.options]
    assert values == pytest.approx([0.9999, 0.9999225, 0.999945, 0.9999675, 0.99999], abs=1e-8)


def test_chance_is_even_on_the_axis_scale_and_stays_inside(tmp_path):
    """Half of the draws are below the middle of the scale; the first draws do not depend on how many there are."""
    axes = [
        {"key": "optimizer.learning_rate", "low": 1e-4, "high": 1e-2, "scale": "log"},
        {"key": "optimizer.weight_decay", "low": 0.0, "high": 1.0},
        {"key": "model.num_layers", "low": 1, "high": 4},
        {"key": "model.ffn", "values": ["swiglu", "silu"]},
    ]
    found = axes_of(sweep_config(tmp_path, axes=axes, method="random", trials=1))
    points = list(by_chance(found, trials=1000, seed=5))
    assert points[:10] == list(by_chance(found, trials=10, seed=5)) != list(by_chance(found, trials=10, seed=6))
    rates = [float(point.labels["learning_rate"]) for point in points]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert 430 < sum(rate < 1e-3 for rate in rates) < 570
    assert 430 < sum(float(point.labels["weight_decay"]) < 0.5 for point in points) < 570
    layers = Counter(point.labels["num_layers"] for point in points)
    assert sorted(layers) == ["1", "2", "3", "4"]
    assert 190 < min(layers.values()) <= max(layers.values()) < 310
    assert 430 < sum(point.labels["ffn"] == "silu" for point in points) < 570
    assert math.isclose(min(rates), 1e-4, rel_tol=0.1)


def test_large_integers_are_drawn_to_their_last_digit(tmp_path):
    """Only other numbers are rounded to four digits."""
    axes = [{"key": "training.max_steps", "low": 10_000, "high": 99_999}]
    points = by_chance(axes_of(sweep_config(tmp_path, axes=axes, method="random", trials=1)), trials=200, seed=1)
    assert len({int(point.labels["max_steps"]) % 10 for point in points}) == 10


def test_the_edges_hold_every_option_and_both_ends(tmp_path):
    """They are what is checked before a search whose points are not known yet."""
    axes = [
        {"key": "optimizer.learning_rate", "low": 1e-4, "high": 1e-2, "scale": "log"},
        {"key": "model.ffn", "values": ["swiglu", "silu"]},
    ]
    found = list(edges(axes_of(sweep_config(tmp_path, axes=axes, method="random", trials=1))))
    assert [(place, option.label) for place, option in found] == [
        (0, "0.0001"),
        (0, "0.01"),
        (1, "swiglu"),
        (1, "silu"),
    ]


def test_the_points_with_an_option_are_all_or_many(tmp_path):
    """All combinations of few options, each other one by chance of many, however many axes there are."""
    few = [{"key": "model.num_heads", "values": [2, 4]}, {"key": "model.d_model", "values": [32, 48, 64]}]
    found = axes_of(sweep_config(tmp_path, axes=few))
    points = list(points_with(found, 0, found[0].options[1]))
    assert {tuple(point.labels.values()) for point in points} == {("4", "32"), ("4", "48"), ("4", "64")}
    keys = ["beta1", "beta2", "weight_decay", "eps", "learning_rate"]
    many = [{"key": f"optimizer.{key}", "values": [0.1, 0.2, 0.3, 0.4, 0.5]} for key in keys]
    found = axes_of(sweep_config(tmp_path, axes=many))
    points = list(points_with(found, 1, found[1].options[2]))
    assert len(points) == 201
    assert points[0].labels == {"beta1": "0.1", "beta2": "0.3", "weight_decay": "0.1", "eps": "0.1"} | {
        "learning_rate": "0.1"
    }
    assert {point.labels["beta2"] for point in points} == {"0.3"}
    for key in {*keys} - {"beta2"}:
        assert len({point.labels[key] for point in points}) == 5


def test_axes_whose_keys_end_alike_keep_their_whole_names(tmp_path):
    """schedule.name and optimizer.name would both be called name."""
    axes = [
        {"key": "schedule.name", "values": ["cosine", "constant"]},
        {"key": "optimizer.name", "values": ["adamw", "muon"]},
    ]
    assert [axis.name for axis in axes_of(sweep_config(tmp_path, axes=axes))] == ["schedule.name", "optimizer.name"]
