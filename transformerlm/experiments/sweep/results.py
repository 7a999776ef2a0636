"""What came of a sweep: a row for each of its settings, the best first, and the best one's configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from config.io import dump_toml
from transformerlm.experiments.compare import Comparison, compare_runs
from transformerlm.experiments.history import read_history
from transformerlm.experiments.sweep.plan import SweepRun
from transformerlm.experiments.sweep.scheduler import Outcome

_MOST_COMPARED = 10  # further behind, nobody doubts who is better
_ORDER = {"finished": 0, "stopped": 1, "failed": 2}


@dataclass(frozen=True, kw_only=True)
class Row:
    """The runs of one setting.

    `losses` are the lowest validation losses of its runs by seed, in nats a token; `mean` is over them, and `spread` is
    their standard deviation, None with fewer than two. `rank` is what rows are sorted by: see `Outcome.rank`.
    `state` is that of the run that got least far, `step` its last step, or the rung that it stopped at.
    """

    group: str
    labels: Mapping[str, str]
    losses: Mapping[int, float]
    mean: float
    rank: float
    spread: float | None
    bits_per_byte: float
    state: Literal["finished", "stopped", "failed"]
    step: int
    flops: float

    def record(self) -> dict[str, Any]:
        """Return the row as JSON can hold it."""
        return {
            "settings": dict(self.labels),
            "state": self.state,
            "step": self.step,
            "val_loss": finite(self.mean),
            "val_loss_spread": finite(self.spread),
            "val_bits_per_byte": finite(self.bits_per_byte),
            "val_loss_by_seed": {str(seed): finite(loss) for seed, loss in self.losses.items()},
            "flops": finite(self.flops),
            "runs": self.group,
        }


def finite(value: float | None) -> float | None:
    """Return a number as JSON can hold it: None for one that is not finite."""
    return value if value is not None and math.isfinite(value) else None


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """Return a row for each setting: the finished ones by their mean rank, the stopped ones, the failed ones."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.task.run.group, []).append(outcome)
    rows = [_row(group, members) for group, members in groups.items()]
    return sorted(rows, key=lambda row: (_ORDER[row.state], -row.step if row.state == "stopped" else 0, row.rank))


def _row(group: str, outcomes: Sequence[Outcome]) -> Row:
    last = max(outcomes, key=lambda one: (_ORDER[one.state], -one.step))
    by_seed = sorted(outcomes, key=lambda one: one.task.run.seed)
    losses = {one.task.run.seed: one.best_val_loss for one in by_seed}
    known = [loss for loss in losses.values() if math.isfinite(loss)]
    run = last.task.run
    return Row(
        group=group,
        labels=run.point.labels,
        losses=losses,
        mean=fmean(losses.values()),
        rank=fmean(one.rank for one in outcomes),
        spread=stdev(known) if len(known) > 1 else None,
        bits_per_byte=fmean(one.best_bits_per_byte for one in outcomes),
        state=last.state,
        step=(last.task.until or last.step) if last.state == "stopped" else last.step,
        flops=last.flops,
    )


def best_of(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> SweepRun | None:
    """Return the first run of the best setting of which all runs have finished; None if there is none."""
    if not rows or rows[0].state != "finished" or not math.isfinite(rows[0].mean):
        return None
    return min((one.task.run for one in outcomes if one.task.run.group == rows[0].group), key=lambda run: run.seed)


def on_the_edge(rows: Sequence[Row], best: SweepRun) -> list[str]:
    """Return the axes of numbers on which the best setting is the lowest or the highest that was tried, in words."""
    words = []
    for axis, label in best.point.labels.items():
        try:
            values = {float(row.labels[axis]) for row in rows}
        except ValueError:  # words have no order
            continue
        if len(values) > 1 and float(label) in (min(values), max(values)):
            side = "lowest" if float(label) == min(values) else "highest"
            words.append(f"{axis} = {label} is the {side} that was tried; a better one may be beyond it")
    return words


def best_toml(run: SweepRun, *, runs_dir: Path, name: str) -> str:
    """Return the configuration of a run as the TOML file of a run of its own, in `runs_dir/name`."""
    logging = run.config.logging.model_copy(update={"run_name": name})
    return dump_toml(run.config.model_copy(update={"runs_dir": runs_dir, "logging": logging}))


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the cells of the rows, for people."""
    axes = list(rows[0].labels) if rows else []
    heads = [*axes, "val loss", "+-", "bits/byte", "seeds", "steps", ""]
    return heads, [[*(row.labels.get(axis, "") for axis in axes), *_cells(row)] for row in rows]


def compared(rows: Sequence[Row], outcomes: Sequence[Outcome], root: Path) -> Comparison | None:
    """Return the best setting beside the next ones, each run at its lowest validation, as the rows have it.

    None with fewer than two settings that finished.

    Raises:
        OSError: the lines of a run cannot be read.
    """
    best = [row.group for row in rows if row.state == "finished" and math.isfinite(row.mean)][:_MOST_COMPARED]
    if len(best) < 2:
        return None
    by_seed = sorted((one.task.run for one in outcomes), key=lambda run: run.seed)
    names = [run.name for group in best for run in by_seed if run.group == group]
    return compare_runs([read_history(root / name, name=name) for name in names], at="lowest")


def _cells(row: Row) -> list[str]:
    loss = f"{row.mean:.4f}" if math.isfinite(row.mean) else "-"
    spread = f"{row.spread:.4f}" if row.spread is not None else "-"
    bits = f"{row.bits_per_byte:.4f}" if math.isfinite(row.bits_per_byte) else "-"
    state = {"finished": "", "stopped": "stopped early", "failed": "failed"}[row.state]
    return [loss, spread, bits, str(len(row.losses)), f"{row.step:,}", state]
