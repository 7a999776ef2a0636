"""The loss curve of a run as a picture: an SVG written here, and a PNG by matplotlib where that is installed.

Both show the same: the loss of each step, its running mean, and the validations, over the steps. The scale of the loss
is logarithmic, so that the end of a run, where little changes, gets as much room as its beginning.
"""

from __future__ import annotations

import html
import importlib.util
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from transformerlm.experiments.history import RunHistory, Series, read_history
from transformerlm.experiments.thinning import with_peaks
from transformerlm.utils.files import write_whole

WIDTH, HEIGHT, MARGIN = 800, 450, 60
STEP_COLOR, MEAN_COLOR, VALID_COLOR = "#b8d0ea", "#2b6cb0", "#d1495b"
Y_NAME, X_NAME = "loss (nats per token)", "step"
_LOSS, _VALID_LOSS = "metrics.loss", "metrics.val_loss"
_FEWEST_FOR_MEAN = 100
_NONE = Series(np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True)
class LossCurve:
    """What a picture shows: the losses of the steps and those of the validations, all of them finite."""

    title: str
    steps: Series
    valid: Series

    @cached_property
    def mean(self) -> Series:
        """The running mean of the steps' losses; without any point where there are too few for one."""
        if len(self.steps.steps) < _FEWEST_FOR_MEAN:
            return _NONE
        return Series(self.steps.steps, running_mean(self.steps.values, len(self.steps.steps) // 50))

    @property
    def lines(self) -> Iterator[tuple[Series, str, str]]:
        """The lines with their colors and words; a line without words explains itself."""
        end = self.mean if len(self.mean.steps) else self.steps
        words = f"training {end.values[-1]:.3f}"
        if end is self.mean:
            yield self.steps, STEP_COLOR, ""
        yield end, MEAN_COLOR, words
        if len(self.valid.steps):
            best = int(np.argmin(self.valid.values))
            lowest = f", lowest {self.valid.values[best]:.3f} at step {self.valid.steps[best]:,}"
            is_last = best == len(self.valid.steps) - 1
            yield self.valid, VALID_COLOR, f"validation {self.valid.values[-1]:.3f}{'' if is_last else lowest}"


def read_loss_curve(run_dir: Path) -> LossCurve:
    """Return the curve of a run by its directory.

    Raises:
        ValueError: the run has fewer than two losses that are finite.
        OSError: its lines cannot be read.
    """
    return curve_of(read_history(run_dir, keys={_LOSS, _VALID_LOSS}))


def curve_of(history: RunHistory) -> LossCurve:
    """Return the curve of a run.

    Raises:
        ValueError: the run has fewer than two losses that are finite.
    """
    steps, valid = (_finite(history.series.get(key, _NONE)) for key in (_LOSS, _VALID_LOSS))
    if len(steps.steps) < 2:
        raise ValueError(f"{history.directory}: expected at least two steps with a loss, found {len(steps.steps)}")
    return LossCurve(history.name, steps, valid)


def save_loss_curve(run_dir: Path, picture: Path) -> Path:
    """Draw the losses of a run; return the picture's path, which ends in `.svg` where matplotlib is not installed.

    Raises:
        ValueError: the run has fewer than two losses.
        OSError: its lines cannot be read, or the picture cannot be written.
    """
    curve = read_loss_curve(run_dir)
    if picture.suffix == ".svg" or not can_draw_png():
        return save_svg(curve, picture.with_suffix(".svg"))
    return save_png(curve, picture.with_suffix(".png"))


def can_draw_png() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


# --- points ------------------------------------------------------------------------------------------------------


def _finite(series: Series) -> Series:
    keep = np.isfinite(series.values)
    return Series(series.steps[keep], series.values[keep])


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Return the mean of about `width` values around each of (n,).

    Towards the beginning, which is steep, it is of fewer on both sides; towards the end, of fewer that come after.
    """
    count = len(values)
    places = np.arange(count)
    before = np.minimum(width // 2, places)
    after = np.minimum(before, count - 1 - places)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    mean: np.ndarray = (sums[places + after + 1] - sums[places - before]) / (before + after + 1)
    return mean


# --- axes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axes:
    """Where a point of a curve is in the picture: steps from 0, losses on a logarithmic scale if all are positive."""

    last: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, curve: LossCurve) -> Axes:
        """Return axes on which all points of a curve are inside the frame."""
        lines = [series for series, _, _ in curve.lines]
        values = np.concatenate([series.values for series in lines])
        room = 1.03 if values.min() > 0 else 1.0
        lowest, highest = float(values.min()) / room, float(values.max()) * room
        if lowest == highest:
            lowest, highest = lowest - 1.0, highest + 1.0
        return cls(max(float(series.steps[-1]) for series in lines), lowest, highest)

    @property
    def is_log(self) -> bool:
        """Whether the scale of the loss is logarithmic."""
        return self.lowest > 0

    def place(self, step: float, loss: float) -> tuple[float, float]:
        """Return a point in the picture, in pixels from its upper left corner."""
        x = MARGIN + step / max(self.last, 1.0) * (WIDTH - 2 * MARGIN)
        lowest, highest, here = (math.log(one) if self.is_log else one for one in (self.lowest, self.highest, loss))
        return x, HEIGHT - MARGIN - (here - lowest) / (highest - lowest) * (HEIGHT - 2 * MARGIN)

    def x_ticks(self) -> list[float]:
        """Return round numbers of steps."""
        return [tick for tick in round_numbers(0.0, self.last, 6) if tick == int(tick)]

    def y_ticks(self) -> list[float]:
        """Return round losses; where the highest is many times the lowest, powers of ten, and 2 and 5 times those."""
        if not self.is_log or self.highest < 8 * self.lowest:
            return round_numbers(self.lowest, self.highest, 6)
        first, last = math.floor(math.log10(self.lowest)), math.ceil(math.log10(self.highest))
        digits = (1, 2, 5) if last - first < 4 else (1,)
        powers = range(first, last + 1, math.ceil((last - first) / 12))
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        return [tick for tick in ticks if self.lowest <= tick <= self.highest]


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """Return at most about `most` multiples of 1, 2 or 5 times a power of ten between two numbers."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * (1 - 1e-9))
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


# --- pictures ----------------------------------------------------------------------------------------------------


def save_png(curve: LossCurve, picture: Path) -> Path:
    """Draw a curve with matplotlib, whose import takes a second or two; raise OSError."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    axes_of = Axes.of(curve)
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100)
    left, bottom = MARGIN / WIDTH, MARGIN / HEIGHT
    figure.subplots_adjust(left=left, right=1 - left, bottom=bottom, top=1 - bottom)
    axes = figure.add_subplot()
    axes.set_yscale("log" if axes_of.is_log else "linear")
    for series, color, words in curve.lines:
        points = with_peaks(series, WIDTH)
        marker = "o" if color == VALID_COLOR and len(points.steps) <= 50 else ""
        axes.plot(points.steps, points.values, color=color, label=words or None, marker=marker, markersize=4)
    axes.set(xlabel=X_NAME, ylabel=Y_NAME, xlim=(0, axes_of.last), ylim=(axes_of.lowest, axes_of.highest))
    axes.set_title(curve.title.replace("$", r"\$"), loc="left")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks(axes_of.y_ticks(), [f"{tick:g}" for tick in axes_of.y_ticks()])
    axes.set_xticks(axes_of.x_ticks(), [f"{tick:,.0f}" for tick in axes_of.x_ticks()])
    axes.grid(alpha=0.3)
    axes.legend()
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a title may have letters that the font lacks
        figure.savefig(data)
    write_whole(picture, data.getvalue())
    return picture


def save_svg(curve: LossCurve, picture: Path) -> Path:
    """Write a curve as SVG, which needs no library and no time; raise OSError."""
    axes = Axes.of(curve)
    body = [*_frame(axes), _text(MARGIN, MARGIN - 28, curve.title, anchor="start", size=15)]
    for number, (series, color, words) in enumerate(curve.lines):
        body.append(_line(axes, with_peaks(series, WIDTH), color))
        if color == VALID_COLOR and len(series.steps) <= 50:
            places = (axes.place(*point) for point in zip(series.steps, series.values, strict=True))
            body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
        if words:
            body.append(_text(WIDTH - MARGIN, MARGIN - 46 + 18 * number, words, color=color, anchor="end"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif">'
    background = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    write_whole(picture, "\n".join([head, background, *body, "</svg>\n"]))
    return picture


def _frame(axes: Axes) -> Iterator[str]:
    """Yield the grid with its numbers, and the names of the axes."""
    top, bottom, left, right = MARGIN, HEIGHT - MARGIN, MARGIN, WIDTH - MARGIN
    for tick in axes.y_ticks():
        y = axes.place(0.0, tick)[1]
        yield f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#ddd"/>'
        yield _text(left - 8, y + 4, f"{tick:g}", anchor="end")
    for tick in axes.x_ticks():
        x = axes.place(tick, axes.highest)[0]
        yield f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="#eee"/>'
        yield _text(x, bottom + 20, f"{tick:,.0f}")
    yield _text(WIDTH / 2, HEIGHT - 15, X_NAME)
    yield _text(left, top - 10, Y_NAME, anchor="start")


def _line(axes: Axes, series: Series, color: str) -> str:
    places = (axes.place(*point) for point in zip(series.steps, series.values, strict=True))
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>'


def _text(x: float, y: float, words: str, *, color: str = "#333", anchor: str = "middle", size: int = 13) -> str:
    place = f'x="{x:.0f}" y="{y:.0f}" fill="{color}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {place}>{html.escape(words)}</text>"
