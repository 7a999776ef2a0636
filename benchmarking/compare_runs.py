"""Training runs beside each other: a Markdown table on stdout and a picture of their validation losses.

    python -m benchmarking.compare_runs runs/adamw-* runs/muon-* --picture docs/images/ablations.png

Reads `metrics.jsonl` of each run. Runs whose names differ only in a last `-` and digits, the seed, make one row. The
picture needs the extra `plot`.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("benchmarking.compare_runs")

import argparse
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 9, 5
_NUM_COLOURS = 10  # matplotlib begins again after so many
_SEED = re.compile(r"-\d+$")

Curve = list[tuple[float, float]]
"""(tokens, validation loss) of each validation."""


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and draw the picture where one is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarking.compare_runs", description="Compare the validation losses of training runs."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directories of runs, the baseline first")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the losses over the tokens")
    arguments = parser.parse_args(argv)
    try:
        groups = read_groups(arguments.runs)
        print(table(groups))
        if arguments.picture is not None:
            save_curves(groups, arguments.picture)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


def read_groups(runs: Sequence[Path]) -> dict[str, list[Curve]]:
    """Return the curves of the runs, by name without the seed, in the order given.

    Raises:
        ValueError: a run without a validation.
        OSError: a directory without a metrics.jsonl.
    """
    groups: dict[str, list[Curve]] = {}
    for directory in runs:
        path = directory / "metrics.jsonl"
        records = _read_lines(path)
        curve = [(line["metrics.tokens"], line["metrics.val_loss"]) for line in records if "metrics.val_loss" in line]
        if not curve:
            raise ValueError(f"{path}: expected validation losses, found none (set data.valid)")
        groups.setdefault(_SEED.sub("", directory.name), []).append(curve)
    return groups


def _read_lines(path: Path) -> list[Mapping[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(
            f"{path}: expected a JSON object a line ({error}); a resumed run mends its last line"
        ) from error


def table(groups: Mapping[str, Sequence[Curve]]) -> str:
    """Return a row for each group: tokens, each seed's last validation loss, their mean, and that against the first."""
    limit = _limit(groups)
    num_seeds = max(map(len, groups.values()))
    seeds = [f"run {number + 1}" for number in range(num_seeds)]
    lines = ["| " + " | ".join(["", "tokens", *seeds, "mean", "against the first"]) + " |"]
    lines.append("|" + "---|" * (num_seeds + 4))
    baseline = None
    for name, curves in groups.items():
        losses = [curve[-1][1] for curve in curves]
        mean = statistics.mean(losses)
        baseline = mean if baseline is None else baseline
        cells = ["diverged" if loss > limit else f"{loss:.3f}" for loss in losses] + [""] * (num_seeds - len(losses))
        cells += ["", ""] if max(losses) > limit else [f"{mean:.3f}", f"{mean - baseline:+.3f}"]
        tokens = f"{max(curve[-1][0] for curve in curves):,.0f}"
        lines.append("| " + " | ".join([name, tokens, *cells]) + " |")
    return "\n".join(lines)


def _limit(groups: Mapping[str, Sequence[Curve]]) -> float:
    """Return the last loss from which a run counts as diverged: twice the first run's."""
    return 2 * next(iter(groups.values()))[0][-1][1]


def save_curves(groups: Mapping[str, Sequence[Curve]], picture: Path) -> None:
    """Draw each group in a colour of its own, each of its runs as a line; from the eleventh group on dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, curves) in enumerate(groups.items()):
        colour, dashes = f"C{number}", "-" if number < _NUM_COLOURS else "--"
        for index, curve in enumerate(curves):
            millions, losses = [tokens / 1e6 for tokens, _ in curve], [loss for _, loss in curve]
            axes.plot(millions, losses, dashes, color=colour, label="" if index else name, linewidth=1.4)
    # The first losses, and those of runs that diverged, are far above the others and would leave these no room.
    last = [curve[-1][1] for curves in groups.values() for curve in curves if curve[-1][1] <= _limit(groups)]
    axes.set(
        xlabel="tokens (millions)", ylabel="validation loss (nats per token)", ylim=(min(last) - 0.05, max(last) + 0.8)
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture)
