"""Long curves with few points, such that no peak is lost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from transformerlm.experiments.history import Series

MOST_POINTS = 2000
_NEAR = 1e-4  # of a curve's height: less than a pixel


@dataclass(frozen=True)
class Thinned:
    """Some points of a curve, and the means of the stretches between them, which are what to smooth; None: all points.

    `means` has one point a stretch, at its middle step; what is not finite is not in them.
    """

    points: Series
    means: Series | None


def thinned(series: Series, most: int = MOST_POINTS) -> Thinned:
    """Return at most `most` points of a curve, its means counted, of which each is a point of the curve itself.

    The curve is cut into stretches of about as many points each. Of each stretch stay its lowest and its highest value,
    and of one that has values that are not finite, the first of these. The first and the last point stay.
    """
    count = len(series.steps)
    if count <= most:
        return Thinned(series, None)
    finite = np.isfinite(series.values)
    edges = _edges(count, (most - 2) // (3 if finite.all() else 4))
    begins = edges[:-1]
    number = np.add.reduceat(finite.astype(np.int64), begins)
    total = np.add.reduceat(np.where(finite, series.values, 0.0), begins)
    has = number > 0
    middles = series.steps[(begins + edges[1:]) // 2][has]
    means = Series(middles, total[has] / number[has])
    return Thinned(_without_straight(_peaks(series, edges)), means)


def with_peaks(series: Series, most: int) -> Series:
    """Return about `most` points at most: the lowest and the highest of each stretch, so that every spike is seen."""
    count = len(series.steps)
    return series if count <= most else _peaks(series, _edges(count, most // 2))


def _edges(count: int, stretches: int) -> np.ndarray:
    """Return where stretches of about as many points each begin, and after them the number of points."""
    return np.linspace(0, count, stretches + 1).astype(np.int64)


def _peaks(series: Series, edges: np.ndarray) -> Series:
    """Return the first and the last point, and of each stretch the lowest, the highest and the first not finite one."""
    finite = np.isfinite(series.values)
    low = np.where(finite, series.values, np.inf)
    high = np.where(finite, series.values, -np.inf)
    kept = {0, len(series.steps) - 1}
    for begin, end in pairwise(edges.tolist()):
        kept |= {begin + int(low[begin:end].argmin()), begin + int(high[begin:end].argmax())}
        if not finite[begin:end].all():
            kept.add(begin + int(finite[begin:end].argmin()))
    places = np.array(sorted(kept), dtype=np.int64)
    return Series(series.steps[places], series.values[places])


def _without_straight(series: Series) -> Series:
    """Return a curve without the points through which a straight line between others goes, to a hundredth of a percent.

    From the last point that stays, the slopes of lines that pass all points since then near enough are a range, which
    each point narrows (the swinging door of Bristol 1990).
    """
    steps, values = series.steps.tolist(), series.values.tolist()
    finite = series.values[np.isfinite(series.values)]
    near = _NEAR * float(np.ptp(finite)) if len(finite) else 0.0
    kept, anchor, low, high = [0], 0, -math.inf, math.inf
    for at in range(1, len(steps)):
        width, height = steps[at] - steps[anchor], values[at] - values[anchor]
        if not low <= height / width <= high:
            anchor = at - 1
            kept.append(anchor)
            width, height = steps[at] - steps[anchor], values[at] - values[anchor]
            low, high = -math.inf, math.inf
        if not math.isfinite(height):  # it stays, and no line goes through it
            kept.append(at)
            anchor = at
            continue
        low, high = max(low, (height - near) / width), min(high, (height + near) / width)
    places = np.unique([*kept, len(steps) - 1])
    return Series(series.steps[places], series.values[places])


def few_places(steps: np.ndarray, tokens: np.ndarray, most: int = MOST_POINTS // 2) -> np.ndarray:
    """Return at which indexes of a clock, (n,) steps and (n,) tokens, to keep it: evenly, and where tokens bend."""
    if len(steps) <= most:
        return np.arange(len(steps))
    even = np.linspace(0, len(steps) - 1, most).astype(np.int64)
    rates = np.diff(tokens) / np.diff(steps)
    bends = np.flatnonzero(np.diff(rates)) + 1
    return np.union1d(even, bends) if len(bends) < most else even
