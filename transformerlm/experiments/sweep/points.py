"""The settings that a sweep tries: every combination of its axes, or some by chance."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from config.sweep import AxisConfig, SweepConfig, as_text, parsed_setting

VARIANT = "variant"
_DIGITS = 4  # of a value from a range: more say nothing, and names stay short
_MOST_TRIED = 200  # points, to find a valid one with some option


@dataclass(frozen=True)
class Option:
    """One value on an axis: how people name it, and what it sets."""

    label: str
    settings: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One thing that is varied, by its options or, without any, by a range of one key's numbers."""

    name: str
    options: tuple[Option, ...] = ()
    key: str = ""
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    is_integer: bool = False

    def at(self, share: float) -> Option:
        """Return the option at a share of the way from the first to the last, from 0 to 1."""
        if self.options:
            return self.options[min(int(share * len(self.options)), len(self.options) - 1)]
        return self.option(self._number(share, self.low, self.high))

    def drawn(self, share: float) -> Option:
        """Return the option that a number from 0 to 1 draws; all integers of a range have an equal part of these."""
        if self.options or not self.is_integer:
            return self.at(share)
        value = self._number(share, self.low - 0.5, self.high + 0.5)
        return self.option(min(max(value, self.low), self.high))

    def _number(self, share: float, low: float, high: float) -> float:
        if self.is_log:
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        return low + share * (high - low)

    def option(self, value: float) -> Option:
        """Return the option of a number in the range: an integer, or of four digits, and more in a narrow range."""
        size, width = max(abs(self.low), abs(self.high)), self.high - self.low
        digits = _DIGITS + (max(0, math.ceil(math.log10(size / width))) if width > 0 else 0)
        number = round(value) if self.is_integer else float(f"{value:.{digits}g}")
        text = repr(min(max(number, self.low), self.high)) if not self.is_integer else str(number)
        return Option(text, {self.key: text})


@dataclass(frozen=True)
class Point:
    """One choice on each axis: labels by the names of the axes, and settings by keys."""

    labels: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, axes: Sequence[Axis], options: Sequence[Option]) -> Point:
        """Return the point with one option on each axis."""
        labels = {axis.name: option.label for axis, option in zip(axes, options, strict=True)}
        return cls(labels, {key: text for option in options for key, text in option.settings.items()})


def axes_of(config: SweepConfig) -> list[Axis]:
    """Return the axes of a sweep; its variants are the first."""
    variants = tuple(Option(one.name, dict(map(parsed_setting, one.set))) for one in config.variants)
    first = [Axis(name=VARIANT, options=variants)] if variants else []
    return [*first, *(_axis(axis, name) for axis, name in zip(config.axes, _names(config.axes), strict=True))]


def _names(axes: Sequence[AxisConfig]) -> list[str]:
    """Return the short names of axes: the last parts of their keys, or the whole keys where two end alike."""
    short = ["+".join(key.rpartition(".")[2] for key in axis.keys) for axis in axes]
    return [name if short.count(name) == 1 else "+".join(axis.keys) for name, axis in zip(short, axes, strict=True)]


def _axis(axis: AxisConfig, name: str) -> Axis:
    if axis.low is not None and axis.high is not None:
        is_log = axis.scale == "log"
        whole = Axis(name=name, key=axis.key, low=axis.low, high=axis.high, is_log=is_log, is_integer=axis.is_integer)
        return whole if axis.points is None else Axis(name=name, options=_spread(whole, axis.points))
    labels = [as_text(value).replace(" ", "") for value in axis.values]
    return Axis(name=name, options=tuple(map(Option, labels, axis.settings())))


def _spread(axis: Axis, points: int) -> tuple[Option, ...]:
    """Return options at equal distances; integers may be fewer, each once."""
    options = (axis.at(place / (points - 1)) for place in range(points))
    return tuple({option.label: option for option in options}.values())


def grid(axes: Sequence[Axis]) -> Iterator[Point]:
    """Yield every combination, the last axis changing first."""
    return (Point.of(axes, options) for options in itertools.product(*(axis.options for axis in axes)))


def by_chance(axes: Sequence[Axis], *, trials: int, seed: int) -> Iterator[Point]:
    """Yield points that are drawn evenly, each axis by itself; the first n are the same for any number of trials."""
    rng = random.Random(seed)
    return (Point.of(axes, [axis.drawn(rng.random()) for axis in axes]) for _ in range(trials))


def edges(axes: Sequence[Axis]) -> Iterator[tuple[int, Option]]:
    """Yield the options that must be valid, with the place of their axis: all of each, and both ends of a range."""
    ends = (axis.options or (axis.at(0.0), axis.at(1.0)) for axis in axes)
    return ((place, option) for place, options in enumerate(ends) for option in options)


def points_with(axes: Sequence[Axis], place: int, option: Option) -> Iterator[Point]:
    """Yield points with an option on an axis, of which one must be valid.

    First comes that with the first options of the others, then every combination or, of too many, some by chance.
    """
    some = [replace(axis, options=(option,)) if at == place else axis for at, axis in enumerate(axes)]
    yield Point.of(some, [axis.at(0.0) for axis in some])
    if all(axis.options for axis in some) and math.prod(len(axis.options) for axis in some) <= _MOST_TRIED:
        yield from grid(some)
    else:
        yield from by_chance(some, trials=_MOST_TRIED, seed=0)
