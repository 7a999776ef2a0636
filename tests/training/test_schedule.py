"""The schedules at their corners and between them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from config.schemas import ScheduleConfig
from transformerlm.training.schedule import constant, cosine, learning_rate, timed_learning_rate, wsd

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
    """The rate rises strictly in the warm-up; after it, it never rises and is never below the minimum."""
    rates = [learning_rate(step, name=name, **OPTIONS, decay_steps=20 * (name == "wsd")) for step in range(130)]
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert min(rates[10:]) == 0.1


def test_constant_rises_and_stays() -> None:
    """The rate is half the maximum halfway through the warm-up, and the maximum after it."""
    assert constant(5, learning_rate=2.0, warmup_steps=10) == 1.0
    assert constant(10**9, learning_rate=2.0, warmup_steps=10) == 2.0


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (5, 0.5), (10, 1.0), (90, 1.0), (100, 0.55), (110, 0.1), (200, 0.1)]
)
def test_wsd_stays_until_the_last_steps(step: int, expected: float) -> None:
    """The rate is the maximum up to step 90 of 110, then falls linearly to the minimum."""
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


SHAPES: dict[str, dict[str, Any]] = {
    "cosine": {"name": "cosine"},
    "wsd": {"name": "wsd", "decay_steps": 5},
    "constant": {"name": "constant"},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("max_steps", [5, 7, 100])
def test_every_update_changes_something(shape: str, max_steps: int) -> None:
    """With a decay to 0 the last update has a rate above 0 too; the end of the curve is one step after it."""
    options = {"learning_rate": 1.0, "max_steps": max_steps, **SHAPES[shape]}
    *rates, after = [learning_rate(step, **options) for step in range(1, max_steps + 2)]
    assert min(rates) > 0.0
    assert after == (1.0 if shape == "constant" else 0.0)


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_a_run_of_one_step_trains(name: str) -> None:
    """Halfway through, the schedule is half the way down, or at the peak."""
    rate = learning_rate(1, name=name, learning_rate=1.0, max_steps=1, decay_steps=1 * (name == "wsd"))
    assert rate == pytest.approx({"cosine": 0.5, "wsd": 0.5, "constant": 1.0}[name])


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_a_warm_up_of_the_whole_run_reaches_the_peak(name: str) -> None:
    """The last of all updates has the full rate."""
    rates = [learning_rate(step, name=name, learning_rate=1.0, max_steps=10, warmup_steps=10) for step in range(1, 11)]
    assert rates == pytest.approx([step / 10 for step in range(1, 11)])


@pytest.mark.parametrize("shape", SHAPES)
def test_time_that_is_behind_changes_nothing(shape: str) -> None:
    """While the share of steps is ahead of the share of time, the time does not matter."""
    options = {"learning_rate": 1.0, "max_steps": 100, "warmup_steps": 10, **SHAPES[shape]}
    for step in (1, 10, 50, 96, 100):
        for share in (0.0, step / 200, step / 100):
            for is_share in (False, True):
                timed = timed_learning_rate(step, time_share=share, warmup_is_share=is_share, **options)
                assert timed == learning_rate(step, **options)


@pytest.mark.parametrize("shape", ["cosine", "wsd"])
def test_time_that_is_ahead_brings_the_rate_down(shape: str) -> None:
    """At the end of its time a run of a million steps is at the end of its schedule, however few it has made."""
    options = {"learning_rate": 1.0, "max_steps": 1_000_000, **SHAPES[shape]}
    options |= {"decay_steps": 200_000} if shape == "wsd" else {}
    rates = [timed_learning_rate(step, time_share=step / 50, **options) for step in range(51)]
    assert all(a >= b for a, b in pairwise(rates))
    assert rates[25] == pytest.approx(0.5 if shape == "cosine" else 1.0, abs=1e-3)
    assert rates[-1] == pytest.approx(0.0, abs=1e-5)


def test_a_warm_up_in_steps_is_not_jumped_over() -> None:
    """With the time far ahead, ten steps of warm-up are ten; as a share of the run they follow the time."""
    options = {"name": "cosine", "learning_rate": 1.0, "max_steps": 1000, "warmup_steps": 10}
    in_steps = [timed_learning_rate(step, time_share=step / 50, **options) for step in range(1, 11)]
    assert in_steps[:5] == pytest.approx([step / 10 for step in range(1, 6)], rel=1e-6)
    share = timed_learning_rate(1, time_share=0.02, warmup_is_share=True, **options)
    assert share == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("max_steps", "expected"), [(1, (0, 1)), (2, (1, 1)), (3, (2, 1)), (100, (50, 50)), (1001, (500, 500))]
)
def test_shares_become_steps(max_steps: int, expected: tuple[int, int]) -> None:
    """For any number of steps, two halves are the whole run, and a decay has at least one step."""
    schedule = ScheduleConfig(name="wsd", warmup_steps="50%", decay_steps="50%")
    in_steps = schedule.in_steps(max_steps)
    assert (in_steps["warmup_steps"], in_steps["decay_steps"]) == expected
    assert ScheduleConfig(warmup_steps=7).in_steps(max_steps)["warmup_steps"] == 7


def test_unknown_name_is_refused() -> None:
    """The error lists the known names."""
    with pytest.raises(ValueError, match="cosine, constant or wsd, got 'linear'"):
        learning_rate(1, name="linear", **OPTIONS)
