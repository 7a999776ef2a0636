"""Intervals hold what they promise, and Student's t has the values of published tables."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from transformerlm.experiments.statistics import (
    Difference,
    paired_difference,
    t_cdf,
    t_quantile,
    welch_difference,
)

# NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2: upper critical values of Student's t.
PUBLISHED = {
    1: {0.90: 3.078, 0.95: 6.314, 0.975: 12.706, 0.99: 31.821, 0.995: 63.657},
    2: {0.90: 1.886, 0.95: 2.920, 0.975: 4.303, 0.99: 6.965, 0.995: 9.925},
    3: {0.90: 1.638, 0.95: 2.353, 0.975: 3.182, 0.99: 4.541, 0.995: 5.841},
    4: {0.90: 1.533, 0.95: 2.132, 0.975: 2.776, 0.99: 3.747, 0.995: 4.604},
    5: {0.90: 1.476, 0.95: 2.015, 0.975: 2.571, 0.99: 3.365, 0.995: 4.032},
    10: {0.90: 1.372, 0.95: 1.812, 0.975: 2.228, 0.99: 2.764, 0.995: 3.169},
    30: {0.90: 1.310, 0.95: 1.697, 0.975: 2.042, 0.99: 2.457, 0.995: 2.750},
    100: {0.90: 1.290, 0.95: 1.660, 0.975: 1.984, 0.99: 2.364, 0.995: 2.626},
}


@pytest.mark.parametrize("freedom", PUBLISHED)
def test_quantiles_are_those_of_the_table(freedom):
    """All published digits agree, on both sides of the middle."""
    for probability, value in PUBLISHED[freedom].items():
        assert t_quantile(probability, freedom) == pytest.approx(value, abs=6e-4)
        assert t_quantile(1 - probability, freedom) == pytest.approx(-value, abs=6e-4)


def test_quantiles_with_a_closed_form():
    """One degree of freedom is Cauchy's law, two have a root, and very many are the normal law."""
    for probability in (0.6, 0.8, 0.975, 0.9999):
        assert t_quantile(probability, 1) == pytest.approx(math.tan(math.pi * (probability - 0.5)), rel=1e-10)
        root = (2 * probability - 1) * math.sqrt(2 / (4 * probability * (1 - probability)))
        assert t_quantile(probability, 2) == pytest.approx(root, rel=1e-10)
        normal = statistics.NormalDist().inv_cdf(probability)
        assert t_quantile(probability, 1e7) == pytest.approx(normal, rel=1e-5)


@pytest.mark.parametrize("freedom", [0.5, 1.7, 2.36, 4, 17.2, 400])
def test_a_quantile_undoes_the_distribution(freedom):
    """Degrees of freedom need not be whole: Welch's are not."""
    for probability in (0.01, 0.3, 0.5, 0.9, 0.975):
        assert t_cdf(t_quantile(probability, freedom), freedom) == pytest.approx(probability, abs=1e-11)


@pytest.mark.parametrize("arguments", [(0.0, 2), (1.0, 2), (float("nan"), 2), (0.5, 0)])
def test_there_is_no_quantile_outside(arguments):
    """A probability is between 0 and 1."""
    with pytest.raises(ValueError, match="expected a probability"):
        t_quantile(*arguments)


def test_an_example_by_hand():
    """Three pairs whose differences are -0.1, -0.2, -0.3: mean -0.2, spread 0.1, margin 4.303 * 0.1 / sqrt(3)."""
    found = paired_difference([1.0, 2.0, 3.0], [0.9, 1.8, 2.7])
    assert (found.mean, found.degrees_of_freedom, found.method) == (pytest.approx(-0.2), 2, "paired")
    assert (found.low, found.high) == (pytest.approx(-0.4484, abs=1e-4), pytest.approx(0.0484, abs=1e-4))
    assert found.verdict == "cannot tell"
    assert found.seeds_needed() == 5  # 4: (3.182 + 0.978)^2 / 4 = 4.33 > 4;  5: (2.776 + 0.941)^2 / 4 = 3.45
    # Welch: variances 1 and 0.81, so errors 1/3 and 0.27
    other = welch_difference([1.0, 2.0, 3.0], [0.9, 1.8, 2.7])
    assert other.degrees_of_freedom == pytest.approx((1 / 3 + 0.27) ** 2 / ((1 / 9 + 0.27**2) / 2))
    assert other.high - other.mean == pytest.approx(
        t_quantile(0.975, other.degrees_of_freedom) * math.sqrt(1 / 3 + 0.27)
    )


@pytest.mark.parametrize("spread_of_second", [1.0, 5.0])
@pytest.mark.parametrize("compare", [paired_difference, welch_difference])
def test_three_seeds_of_one_law_rarely_differ(compare, spread_of_second):
    """The interval holds 0 in 90 to 98 % of 1,000 experiments; Welch's does with unequal spreads, too."""
    generator = random.Random(spread_of_second)
    held = 0
    for _ in range(1000):
        common = [generator.gauss(4.0, 0.1) if compare is paired_difference else 4.0 for _ in range(3)]
        first = [value + generator.gauss(0, 0.01) for value in common]
        second = [value + generator.gauss(0, 0.01 * spread_of_second) for value in common]
        held += compare(first, second).verdict == "cannot tell"
    assert 900 <= held <= 980


@pytest.mark.parametrize("compare", [paired_difference, welch_difference])
def test_as_many_seeds_as_it_says_would_tell(compare):
    """With the number of seeds for a known difference and spread, about 4 of 5 experiments find it."""
    spread, step = 0.01, 0.01
    exact = [spread * value for value in (-1.0, 0.0, 1.0)]  # a standard deviation of one spread
    wanted = (
        compare([0.0] * 3, [step + value for value in exact])
        if compare is paired_difference
        else compare(exact, [step + value for value in exact])
    ).seeds_needed()
    generator, found = random.Random(1), 0
    for _ in range(400):
        first = [generator.gauss(0, spread) if compare is welch_difference else 0.0 for _ in range(wanted)]
        second = [step + generator.gauss(0, spread) for _ in range(wanted)]
        found += compare(first, second).verdict == "worse"
    assert 300 <= found <= 350


def test_equal_values_need_no_more():
    """Without any spread the interval is a point; without a difference no number of seeds would find one."""
    assert paired_difference([1.0] * 3, [1.5] * 3) == Difference(0.5, 0.5, 0.5, 2, "paired", (0.0,), 3)
    same = welch_difference([1.0] * 3, [1.0] * 3)
    assert (same.low, same.high, same.verdict, same.seeds_needed()) == (0, 0, "cannot tell", None)
    far = welch_difference([0.0, 1.0, 2.0], [0.001, 1.001, 2.001])
    assert far.seeds_needed() is None  # more than anybody trains


@pytest.mark.parametrize("compare", [paired_difference, welch_difference])
def test_two_seeds_are_too_few(compare):
    """They are refused; a group of one has no spread at all."""
    with pytest.raises(ValueError, match="expected at least 3 seeds, found 2"):
        compare([1.0, 2.0], [1.0, 2.0])
