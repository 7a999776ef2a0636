"""What came of a sweep: a row for each of its settings, the best first, and the best one's configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from config.io import dump_toml
from transformerlm.experiments.sweep.plan import SweepRun
from transformerlm.experiments.sweep.scheduler import Outcome

_ORDER = {"finished": 0, "stopped": 1, "failed": 2}


@dataclass(frozen=True, kw_only=True)
class Row:
    """The runs of one setting.

    `losses` are the lowest validation losses of its runs by seed, in nats a token; `mean` is over them, and `spread` is
    their standard deviation, None with fewer than two. `state` is that of the run that got least far, `step` the last
    step of it.
    """

    group: str
    labels: Mapping[str, str]
    losses: Mapping[int, float]
    mean: float
    spread: float | None
    bits_per_byte: float
    state: Literal["finished", "stopped", "failed"]
    step: int
    flops: int

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
            "flops": self.flops,
            "runs": self.group,
        }


def finite(value: float | None) -> float | None:
    """Return a number as JSON can hold it: None for one that is not finite."""
    return value if value is not None and math.isfinite(value) else None


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """Return a row for each setting: the finished ones by their mean loss, the stopped ones, the failed ones."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.task.run.group, []).append(outcome)
    rows = [_row(group, members) for group, members in groups.items()]
    return sorted(rows, key=lambda row: (_ORDER[row.state], -row.step if row.state == "stopped" else 0, row.mean))


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
        spread=stdev(known) if len(known) > 1 else None,
        bits_per_byte=fmean(one.best_bits_per_byte for one in outcomes),
        state=last.state,
        step=last.step,
        flops=last.step * run.tokens_per_step * run.flops_per_token,
    )


def best_of(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> SweepRun | None:
    """Return the first run of the best setting of which all runs have finished; None if there is none."""
    if not rows or rows[0].state != "finished" or not math.isfinite(rows[0].mean):
        return None
    return next(one.task.run for one in outcomes if one.task.run.group == rows[0].group)


def best_toml(run: SweepRun, *, runs_dir: Path, name: str) -> str:
    """Return the configuration of a run as the TOML file of a run of its own, in `runs_dir/name`."""
    logging = run.config.logging.model_copy(update={"run_name": name})
    return dump_toml(run.config.model_copy(update={"runs_dir": runs_dir, "logging": logging}))


def table(rows: Sequence[Row]) -> list[str]:
    """Return the rows as lines for people."""
    axes = list(rows[0].labels) if rows else []
    head = [*axes, "val loss", "+-", "bits/byte", "seeds", "steps", ""]
    body = [[*(row.labels.get(axis, "") for axis in axes), *_cells(row)] for row in rows]
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *body]
    ]


def _cells(row: Row) -> list[str]:
    loss = f"{row.mean:.4f}" if math.isfinite(row.mean) else "-"
    spread = f"{row.spread:.4f}" if row.spread is not None else "-"
    bits = f"{row.bits_per_byte:.4f}" if math.isfinite(row.bits_per_byte) else "-"
    state = {"finished": "", "stopped": "stopped early", "failed": "failed"}[row.state]
    return [loss, spread, bits, str(len(row.losses)), f"{row.step:,}", state]
