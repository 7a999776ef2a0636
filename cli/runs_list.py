"""`transformerlm-runs list`: one row a run, read while they train."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.runs_list")

import json
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from cli.tables import columns_of, columns_that_fit, real, short_bytes, short_number, short_time, shortened, table_lines
from cli.terminal import note, plain
from cli.utils import Command
from cli.utils import main as run_command
from config.errors import ConfigError
from config.runs_list import RunsListConfig, split_filter
from config.suggest import closest, hint

Row = dict[str, Any]
# What --help shows.
SHORT = ("runs_dir", "filter", "sort", "reverse", "output.format")
EXAMPLES = (
    ("all runs, the one that changed last first", ""),
    ("the best one first, of those with a width of 512", "--sort=best_val_loss --filter='model.d_model=512'"),
    ("the names of those that train now", "--filter=state=running --output.format=json"),
)
_HEADS = (
    "name", "state", "step", "of", "val loss", "bits/byte", "tokens", "tokens/s", "params", "age", "size", "loss"
)  # fmt: skip
_LEAST_NAME = 12
# Where a terminal is narrow, these go first; then names are shortened.
_LESS_NEEDED = tuple(map(_HEADS.index, ("size", "params", "tokens", "tokens/s", "loss", "age", "of", "bits/byte")))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    command = Command(
        "transformerlm-runs list", RunsListConfig, list_runs, first_word="runs_dir", short=SHORT, examples=EXAMPLES
    )
    run_command(command, argv)


def list_runs(config: RunsListConfig) -> None:
    """Print the runs: JSON lines, or a table for people."""
    from transformerlm.experiments.listing import Listing, Settings, filtered, sorted_rows

    if not config.runs_dir.is_dir():
        raise ValueError(f"runs_dir: expected a directory of runs, found no directory {config.runs_dir}")
    listing = Listing(config.runs_dir)
    rows, settings = listing.rows(), Settings(listing.settings_of)
    conditions = [split_filter(one) for one in config.filter]
    _refuse_unknown(config, rows, settings)
    chosen = sorted_rows(filtered(rows, conditions, settings), config.sort, settings, reverse=config.reverse)
    listing.keep()
    if config.output.format == "json" or (config.output.format == "auto" and not sys.stdout.isatty()):
        for row in chosen:
            print(json.dumps(row, allow_nan=False))
        return
    if not chosen:
        note(f"{config.runs_dir}: no runs" if not rows else f"none of {len(rows)} runs is like that")
        return
    print("\n".join(_table(chosen)))


def _refuse_unknown(config: RunsListConfig, rows: Sequence[Row], settings: Any) -> None:
    """Refuse a key that neither the table nor the settings of any run have, unless there is no run."""
    from transformerlm.experiments.listing import SHORT_NAMES, known_keys

    wanted = [("filter", split_filter(one)[0]) for one in config.filter] + [("sort", config.sort)]
    if not rows or all(key in SHORT_NAMES or key in rows[0] for _, key in wanted):
        return
    from config.keys import iter_keys  # to import the settings takes as long as a list
    from config.train import TrainConfig

    cheap = {*SHORT_NAMES, *(key.name for key in iter_keys(TrainConfig)), *rows[0]}
    if all(key in cheap for _, key in wanted):
        return
    known = sorted(known_keys(rows, settings) | cheap)
    meant = {key: closest(key, known, cutoff=0.8) for _, key in wanted}
    problems = [
        f"{option}: {key} is not a key of the table or of a run's settings"
        + (f" (did you mean {' or '.join(meant[key])}?)" if meant[key] else hint(key, known, sections=False))
        for option, key in wanted
        if key not in known
    ]
    if problems:
        raise ConfigError([f"transformerlm-runs list: {problem}" for problem in problems])


def _table(rows: Sequence[Row]) -> list[str]:
    cells = [_cells(row) for row in rows]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    kept = columns_that_fit(_HEADS, cells, width=width, drop=_LESS_NEEDED)
    others = sum(max(columns_of(one[number]) for one in (_HEADS, *cells)) + 2 for number in kept if number)
    cells = [[shortened(name, max(_LEAST_NAME, width - others)), *row] for name, *row in cells]
    left = [kept.index(number) for number in (0, 1, len(_HEADS) - 1) if number in kept]
    return table_lines([_HEADS[one] for one in kept], [[row[one] for one in kept] for row in cells], left=left)


def _cells(row: Row) -> list[str]:
    from transformerlm.experiments.sparkline import blocks_for, sparkline

    return [
        plain(row["name"]),
        row["state"],
        f"{row['step']:,}",
        "" if row["max_steps"] is None else f"{row['max_steps']:,}",
        real(row["best_val_loss"]),
        real(row["best_val_bits_per_byte"]),
        short_number(row["tokens"]),
        short_number(row["tokens_per_second"]),
        short_number(row["parameters"]),
        short_time(row["age_seconds"]),
        short_bytes(row["disk_bytes"]),
        sparkline(list(map(float, row["curve"])), width=16, blocks=blocks_for(sys.stdout.encoding)),
    ]
