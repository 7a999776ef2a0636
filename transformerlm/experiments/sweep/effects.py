"""A picture of a sweep: the validation loss over each axis, and each setting as a line across all axes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from transformerlm.experiments.sweep.results import Row

_PANEL_INCHES = (3.4, 3.2)
_PER_ROW = 3


def draw_effects(rows: Sequence[Row], path: Path) -> None:
    """Draw the finished settings to a file whose suffix says the format.

    A dot is one setting, the mean over its seeds; the line is the mean over all settings with that value. Numbers that
    span more than a factor of ten are on a log axis.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: fewer than two settings have finished.
    """
    from matplotlib.figure import Figure

    done = [row for row in rows if row.state == "finished" and row.mean < float("inf")]
    if len(done) < 2:
        raise ValueError("expected at least two finished settings to draw, found fewer")
    axes = [axis for axis in done[0].labels if len({row.labels[axis] for row in done}) > 1]
    columns = min(len(axes), _PER_ROW)
    lines = -(-len(axes) // columns) + (len(axes) > 1)
    figure = Figure(figsize=(_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * lines), layout="constrained")
    for place, axis in enumerate(axes):
        _effect(figure.add_subplot(lines, columns, place + 1), done, axis)
    if len(axes) > 1:
        _parallel(figure.add_subplot(lines, 1, lines), done, axes)
    figure.savefig(path, dpi=120)


def _places(rows: Sequence[Row], axis: str) -> tuple[dict[str, float], bool]:
    """Return where each label of an axis is drawn, and whether the labels are words."""
    labels = list(dict.fromkeys(row.labels[axis] for row in rows))
    try:
        return {label: float(label) for label in sorted(labels, key=float)}, False
    except ValueError:
        return {label: float(place) for place, label in enumerate(sorted(labels))}, True


def _effect(panel: Any, rows: Sequence[Row], axis: str) -> None:
    places, are_words = _places(rows, axis)
    panel.plot([places[row.labels[axis]] for row in rows], [row.mean for row in rows], "o", alpha=0.5, markersize=4)
    means = [fmean(row.mean for row in rows if row.labels[axis] == label) for label in places]
    panel.plot(list(places.values()), means, "-", color="0.3")
    panel.set(xlabel=axis, ylabel="validation loss")
    if are_words:
        panel.set_xticks(list(places.values()), list(places), rotation=20, ha="right")
    elif min(places.values()) > 0 and max(places.values()) > 10 * min(places.values()):
        panel.set_xscale("log")


def _parallel(panel: Any, rows: Sequence[Row], axes: Sequence[str]) -> None:
    """Draw each setting as a line from axis to axis, by the rank of its value; the best are darkest."""
    ranks = {axis: {label: rank for rank, label in enumerate(_places(rows, axis)[0])} for axis in axes}
    for place, row in reversed(list(enumerate(rows))):
        heights = [ranks[axis][row.labels[axis]] / max(1, len(ranks[axis]) - 1) for axis in axes]
        shade = place / max(1, len(rows) - 1)
        panel.plot(range(len(axes)), heights, color=(0.1 + 0.75 * shade,) * 3, linewidth=2.5 - 2 * shade)
    for column, axis in enumerate(axes):
        for label, rank in ranks[axis].items():
            panel.annotate(label, (column, rank / max(1, len(ranks[axis]) - 1)), fontsize=7, color="tab:blue")
    panel.set_xticks(range(len(axes)), axes)
    panel.set_yticks([])
    panel.set_title("each setting is a line; the darker, the lower its loss", fontsize=9)
