"""The schedules at their corners and between them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from transformerlm.training.schedule import constant, cosine, learning_rate, wsd

OPTIONS: dict[str, Any] = {"learning_rate": 1.0, "min_learning_rate": 0.1, "warmup_steps": 10, "max_steps": 110}


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (1, 0.1), (5, 0.5), (10, 1.0), (60, 0.55), (110, 0.1), (111, 0.1), (10_000, 0.1)],
)
def test_cosine_passes_through_its_corners(step: int, expected: float) -> None:
    """0 at step 0, the maximum at the end of the warm-up, the mean halfway, the minimum from max_steps on."""
    assert cosine(step, **OPTIONS) == pytest.approx(expected)


def test_cosine_is_the_formula_between() -> None:
    """At every step of the fall it is min + (1 + cos(pi t)) / 2 (max - min)."""
    for step in range(10, 111):
        expected = 0.1 + 0.5 * (1 + math.cos(math.pi * (step - 10) / 100)) * 0.9
        assert cosine(step, **OPTIONS) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_decaying_schedules_rise_then_never_rise_again(name: str) -> None:
    """Strictly up during the warm-up, never up after, and never below the minimum after it."""
    rates = [learning_rate(step, name=name, **OPTIONS, decay_steps=20 * (name == "wsd")) for step in range(130)]
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert min(rates[10:]) == 0.1


def test_constant_rises_and_stays() -> None:
    """Half the rate halfway through the warm-up, then the rate for ever."""
    assert constant(5, learning_rate=2.0, warmup_steps=10) == 1.0
    assert constant(10**9, learning_rate=2.0, warmup_steps=10) == 2.0


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (5, 0.5), (10, 1.0), (90, 1.0), (100, 0.55), (110, 0.1), (200, 0.1)]
)
def test_wsd_stays_until_the_last_steps(step: int, expected: float) -> None:
    """Up to 90 of 110 steps the maximum, then linearly to the minimum over the last 20."""
    assert wsd(step, **OPTIONS, decay_steps=20) == pytest.approx(expected)


def test_wsd_refuses_a_decay_that_does_not_fit() -> None:
    """Warm-up and decay together may not be longer than the training."""
    with pytest.raises(ValueError, match=r"warmup_steps \(10\) \+ decay_steps \(101\) exceed max_steps \(110\)"):
        wsd(1, **OPTIONS, decay_steps=101)


@pytest.mark.parametrize("name", ["cosine", "constant", "wsd"])
def test_without_warm_up_the_first_update_is_full(name: str) -> None:
    """No warm-up divides by zero, and with one the first update (step 1) already changes something."""
    options = {**OPTIONS, "decay_steps": 0}
    first = learning_rate(1, name=name, **{**options, "warmup_steps": 0})
    assert first == pytest.approx(1.0, rel=1e-3)
    assert learning_rate(1, name=name, **options) == pytest.approx(0.1)


def test_warm_up_that_fills_the_training_ends_at_the_minimum() -> None:
    """warmup_steps == max_steps is defined: up to the last step, which has the minimum."""
    options = {**OPTIONS, "warmup_steps": 10, "max_steps": 10}
    assert [cosine(step, **options) for step in (9, 10)] == pytest.approx([0.9, 0.1])


def test_unknown_name_is_refused() -> None:
    """The error lists the names there are."""
    with pytest.raises(ValueError, match="cosine, constant or wsd, got 'linear'"):
        learning_rate(1, name="linear", **OPTIONS)
