"""The time of a quickstart is filled: with steps of the right size, and with validations that take little of it."""

from __future__ import annotations

import pytest

from cli import budget
from cli.budget import Size, Speed, plan_budget

SIZES = [Size(64 * 2**n, 4, 4, parameters=10**6 * 4**n, flops_per_token=6 * 10**6 * 4**n) for n in range(4)]
MIDDLE = SIZES[1].flops_per_token


def plan(seconds, *, tokens_per_second, validation=3.0):
    """Plan for a machine that trains the second size at this speed, and validates it this many times faster."""
    speed = Speed(MIDDLE, 1 / tokens_per_second, 1 / (validation * tokens_per_second))
    return plan_budget(seconds, speed=speed, sizes=SIZES, tokens_per_step=4096)


@pytest.mark.parametrize("tokens_per_second", [10.0, 500.0, 8_000.0, 60_000.0, 2_000_000.0])
@pytest.mark.parametrize("seconds", [5.0, 20.0, 90.0, 3600.0])
def test_steps_fill_the_time_and_validations_take_a_tenth_at_most(seconds, tokens_per_second):
    """Whatever the machine's speed, the steps fill the time, and all validations together take little of it."""
    found = plan(seconds, tokens_per_second=tokens_per_second)
    slower = found.size.flops_per_token / MIDDLE
    training = found.steps * 4096 * slower / tokens_per_second
    if found.steps > 3:
        assert 0.9 * seconds < training < 1.25 * seconds
    validations = found.steps // found.eval_interval
    if validations > 2:
        assert validations * found.eval_tokens * slower / (3 * tokens_per_second) < 0.1 * seconds
    assert 1 <= found.eval_interval <= found.steps
    assert 1 <= found.sample_interval <= found.steps


def test_more_time_or_a_faster_machine_makes_a_larger_model():
    """The size grows with what can be trained, and sees enough tokens, unless it is the smallest."""
    sizes = [plan(90.0, tokens_per_second=speed).size for speed in (100.0, 5e3, 2e4, 1e7)]
    assert [size.parameters for size in sizes] == sorted(size.parameters for size in sizes)
    assert (sizes[0], sizes[-1]) == (SIZES[0], SIZES[-1])
    assert plan(1800.0, tokens_per_second=5e3).size.parameters > plan(90.0, tokens_per_second=5e3).size.parameters
    found = plan(90.0, tokens_per_second=2e4)
    assert found.steps * 4096 >= budget.TOKENS_PER_PARAMETER * found.size.parameters


def test_a_slow_machine_validates_less_often_before_it_validates_on_too_little():
    """If ten validations of the fewest tokens are too many, there are fewer of them."""
    found = plan(20.0, tokens_per_second=300.0)
    assert found.eval_tokens == budget.MIN_EVAL_TOKENS
    assert found.steps / found.eval_interval < budget.NUM_VALIDATIONS - 1
