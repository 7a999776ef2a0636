"""Which law a set of runs can bear: one of N and D, one of D or N alone, or none.

Six runs within one decade give a beta of 0.65 and no hint that it means nothing, as has been published. So a law that
the runs cannot bear is refused, and the reason says which runs are missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from transformerlm.experiments.scaling.fit import Kind
from transformerlm.experiments.scaling.points import Points

Array = np.ndarray
FEWEST_RUNS = 12
FEWEST_OF_ONE = 5  # for a law with three constants
FEWEST_OF_BOTH = 3  # of sizes, and of token counts
DECADE = 10.0
_SAME_SIZE = 1.02
_LEAST_SPREAD = 2.0
_LEVEL = 0.999  # a grid from 1e6 to 1e7 spans a decade, rounded steps or not


@dataclass(frozen=True)
class Choice:
    """The law to fit, the points it is for, and why it is not the law of N and D; "" if it is."""

    kind: Kind
    points: Points
    reason: str = ""


def choose_law(points: Points, wanted: Literal["auto", "both", "tokens", "parameters"] = "auto") -> Choice:
    """Return the law that points can bear; "auto" is the law of both variables if it can be, else one of one variable.

    A law of one variable is fitted to runs that share the other: the largest such set of at least 5 runs.

    Raises:
        ValueError: the points cannot bear the law that is wanted, or with "auto" none.
    """
    reason = why_not_both(points)
    if wanted == "both" and reason:
        raise ValueError(f"no law of both sizes and tokens: {reason}")
    if wanted == "both" or (wanted == "auto" and not reason):
        return Choice("both", points)
    kinds: list[Kind] = ["tokens", "parameters"] if wanted == "auto" else [wanted]
    sets = [(kind, _largest_set(points, kind)) for kind in kinds]
    able = [(kind, chosen) for kind, chosen in sets if chosen is not None]
    if not able:
        because = f"{reason}; " if wanted == "auto" else ""
        raise ValueError(f"no scaling law: {because}{' and '.join(map(_why_not_one, kinds))}")
    kind, chosen = max(able, key=lambda one: len(one[1]))
    return Choice(kind, points.where(chosen), reason)


def why_not_both(points: Points) -> str:
    """Return why points cannot bear the law of N and D; "" if they can."""
    numbered = _numbered(points.parameters), _numbered(points.tokens)
    if (found := len(set(zip(*numbered, strict=True)))) < FEWEST_RUNS:
        return f"it needs {FEWEST_RUNS} finished runs that differ in size or tokens, found {found}"
    for word, values, numbers in zip(
        ("sizes", "token counts"), (points.parameters, points.tokens), numbered, strict=True
    ):
        if _span(values) < DECADE * _LEVEL:
            return f"its {word} must span a factor of {DECADE:g}, found {_span(values):.3g}"
        if (found := len(set(numbers))) < FEWEST_OF_BOTH:
            return f"its {word} must be {FEWEST_OF_BOTH} at least, found {found}: two say nothing of an exponent"
    spread = _spread(np.log(points.parameters), np.log(points.tokens))
    if spread < _LEAST_SPREAD:
        return (
            "sizes and tokens grow together, so it cannot say which of them lowers the loss: for a size, the tokens "
            f"must differ by a factor of {_LEAST_SPREAD:g}, found {spread:.3g}"
        )
    return ""


def _numbered(values: Array) -> list[int]:
    """Return a number for each value, the same for those that are equal but for 2 %."""
    begins: list[float] = []
    for value in np.unique(values).tolist():
        if not begins or value > begins[-1] * _SAME_SIZE:
            begins.append(value)
    return [int(place) for place in np.searchsorted(begins, values, side="right")]


def _span(values: Array) -> float:
    return float(values.max() / values.min())


def _spread(x: Array, y: Array) -> float:
    """Return the factor that the second variable spans beside its straight line over the first one."""
    slope, level = np.polyfit(x, y, 1)
    beside = y - slope * x - level
    return float(np.exp(beside.max() - beside.min()))


def _largest_set(points: Points, kind: Kind) -> Array | None:
    """Return the places of the most points that share the other variable, with a decade of this one; None: too few."""
    own, other = points.parameters, points.tokens
    if kind == "tokens":
        own, other = other, own
    best: Array | None = None
    for value in np.unique(other):
        chosen = np.flatnonzero((other >= value) & (other <= value * _SAME_SIZE))
        enough = len(np.unique(own[chosen])) >= FEWEST_OF_ONE and _span(own[chosen]) >= DECADE * _LEVEL
        if enough and (best is None or len(chosen) > len(best)):
            best = chosen
    return best


def _why_not_one(kind: Kind) -> str:
    own, other = ("token counts", "size") if kind == "tokens" else ("sizes", "token count")
    return f"one of {own} alone needs {FEWEST_OF_ONE} of them over a factor of {DECADE:g}, all with one {other}"
