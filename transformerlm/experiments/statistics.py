"""Whether two groups of runs differ: intervals from Student's t, and how many more seeds would tell.

The quantiles of Student's t come from its distribution function by Newton's method. That function is a regularized
incomplete beta function, computed by its continued fraction (DLMF 8.17.22, https://dlmf.nist.gov/8.17#v) with Lentz's
algorithm.
All intervals are of 95 %: if two groups were drawn from one law, 19 of 20 intervals would hold 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

CONFIDENCE = 0.95
POWER = 0.8
LEAST_SEEDS = 3
"""An interval from two seeds has one degree of freedom; it is thirteen standard errors wide and says nothing."""
MOST_SEEDS = 1000

Verdict = Literal["better", "worse", "cannot tell"]


@dataclass(frozen=True)
class Difference:
    """The mean of a second group less that of a first, with its interval and how that was found.

    `variances` are those of the groups (welch), or that of the differences of the pairs (paired). `seeds` counts the
    pairs, or the values of the smaller group.
    """

    mean: float
    low: float
    high: float
    degrees_of_freedom: float
    method: Literal["paired", "welch"]
    variances: tuple[float, ...]
    seeds: int

    @property
    def verdict(self) -> Verdict:
        """Whether the second group has lower losses: the interval leaves no other choice, or nobody can tell."""
        return "better" if self.high < 0 else "worse" if self.low > 0 else "cannot tell"

    def seeds_needed(self) -> int | None:
        """Return the least n of seeds in each group that find such a difference with a chance of `POWER`.

        That is n >= (t(0.975) + t(0.8))^2 variance / mean^2, where `variance` is that of one difference, and t has the
        degrees of freedom that n seeds give (Snedecor and Cochran, Statistical Methods, chapter 6). None is more than
        `MOST_SEEDS`.
        """
        low, high = LEAST_SEEDS - 1, MOST_SEEDS
        if self.mean == 0 or not self._suffices(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._suffices(middle) else (middle, high)
        return high

    def _suffices(self, count: int) -> bool:
        freedom = float(count - 1)
        if self.method == "welch":
            freedom = _satterthwaite(self.variances, [count, count])
        t = t_quantile((1 + CONFIDENCE) / 2, freedom) + t_quantile(POWER, freedom)
        return count * self.mean**2 >= t**2 * sum(self.variances)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare values that belong together pair by pair: the spread of the differences counts, not that of the values.

    Raises:
        ValueError: there are fewer than `LEAST_SEEDS` pairs, or not as many values on both sides.
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    count = _enough(len(differences))
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    margin = t_quantile((1 + CONFIDENCE) / 2, count - 1) * spread / math.sqrt(count)
    return Difference(mean, mean - margin, mean + margin, count - 1, "paired", (spread**2,), count)


def welch_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare two groups whose values do not belong together, and whose spreads may differ (Welch 1947).

    Raises:
        ValueError: a group has fewer than `LEAST_SEEDS` values.
    """
    sizes = [_enough(len(group)) for group in (first, second)]
    variances = [statistics.variance(group) for group in (first, second)]
    mean = statistics.fmean(second) - statistics.fmean(first)
    errors = [variance / size for variance, size in zip(variances, sizes, strict=True)]
    freedom = _satterthwaite(errors, sizes)
    margin = t_quantile((1 + CONFIDENCE) / 2, freedom) * math.sqrt(sum(errors))
    return Difference(mean, mean - margin, mean + margin, freedom, "welch", tuple(variances), min(sizes))


def _enough(count: int) -> int:
    if count < LEAST_SEEDS:
        raise ValueError(f"expected at least {LEAST_SEEDS} seeds, found {count}")
    return count


def _satterthwaite(errors: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the degrees of freedom of a sum of variances (Satterthwaite 1946)."""
    parts = sum(error**2 / (size - 1) for error, size in zip(errors, sizes, strict=True))
    return sum(errors) ** 2 / parts if parts else float(min(sizes) - 1)


# --- Student's t -------------------------------------------------------------------------------------------------

_MOST_TERMS = 1000
_TINY = 1e-300


@lru_cache(maxsize=4096)
def t_quantile(probability: float, degrees_of_freedom: float) -> float:
    """Return the value that Student's t stays below with a probability between 0 and 1, to about twelve digits."""
    if not 0 < probability < 1 or not degrees_of_freedom > 0:
        raise ValueError(f"expected a probability and degrees of freedom, found {probability}, {degrees_of_freedom}")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees_of_freedom)
    # The distribution function is concave here, and the normal law's quantile is below: Newton's steps only go up.
    value = statistics.NormalDist().inv_cdf(probability)
    for _ in range(_MOST_TERMS):
        step = (probability - t_cdf(value, degrees_of_freedom)) / _density(value, degrees_of_freedom)
        value += step
        if step <= 1e-13 * value:
            break
    return value


def _density(value: float, degrees_of_freedom: float) -> float:
    half = degrees_of_freedom / 2
    log_front = math.lgamma(half + 0.5) - math.lgamma(half) - 0.5 * math.log(degrees_of_freedom * math.pi)
    return math.exp(log_front - (half + 0.5) * math.log1p(value * value / degrees_of_freedom))


def t_cdf(value: float, degrees_of_freedom: float) -> float:
    """Return the probability that Student's t is at most `value`."""
    tail = _incomplete_beta(degrees_of_freedom / 2, 0.5, degrees_of_freedom / (degrees_of_freedom + value * value)) / 2
    return 1 - tail if value > 0 else tail


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges fast
        return 1 - _incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / a / _continued_fraction(a, b, x)


def _continued_fraction(a: float, b: float, x: float) -> float:
    """Return 1 + d1/(1 + d2/(1 + ...)) of DLMF 8.17.22, from the front (Lentz 1976)."""
    value, c, d = 1.0, 1.0, 0.0
    for number in range(1, _MOST_TERMS):
        m = number // 2
        if number % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / ((1 + term * d) or _TINY)
        c = (1 + term / c) or _TINY
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value
