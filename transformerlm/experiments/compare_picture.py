"""The validation losses of runs in one picture, a colour for each group."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from transformerlm.experiments.compare import UNITS, Comparison
from transformerlm.experiments.history import Axis

WIDTH, HEIGHT = 9, 5
_NUM_COLOURS = 10  # matplotlib repeats its colours after this many
_SCALES: dict[Axis, tuple[float, str]] = {
    "steps": (1, "steps"),
    "tokens": (1e6, "tokens (millions)"),
    "flops": (1e15, "FLOPs (10^15)"),
    "seconds": (60, "minutes of training"),
}


def save_curves(comparison: Comparison, picture: Path) -> None:
    """Draw each group in a colour of its own, with a line for each run; lines are dashed from the eleventh group on.

    The picture needs matplotlib. Its format is that of its suffix.

    Raises:
        ValueError: a suffix that matplotlib does not know.
    """
    from matplotlib.figure import Figure

    at = comparison.at
    axis: Axis = "tokens" if at == "end" or at == "lowest" else at
    scale, label = _SCALES[axis]
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    lasts = []
    for number, result in enumerate(comparison.results):
        colour, dashes, name = f"C{number}", "-" if number < _NUM_COLOURS else "--", result.group.name
        for run in result.group.runs:
            series = run.series.get(comparison.measure)
            places = None if series is None else run.axis(axis, series.steps)
            if series is None or places is None:
                continue
            axes.plot(places / scale, series.values, dashes, color=colour, label=name, linewidth=1.4)
            name = ""  # one line of a group is in the legend
            if run.directory not in comparison.diverged:
                lasts.append(float(series.values[-1]))
    # The first losses, and those of runs that diverged, are far above the others, which would have no room.
    room = {"ylim": (float(np.min(lasts)) - 0.05, float(np.max(lasts)) + 0.8)} if lasts else {}
    axes.set(xlabel=label, ylabel=f"validation loss ({UNITS[comparison.measure]})", **room)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture)
