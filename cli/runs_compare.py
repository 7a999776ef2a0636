"""`transformerlm-runs compare`: training runs side by side, and whether a difference is more than luck."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.runs_compare")

import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cli.tables import table_lines
from cli.terminal import note, plain, working
from cli.utils import Command
from cli.utils import main as run_command
from config.extras import how_to_install
from config.runs_compare import RunsCompareConfig

if TYPE_CHECKING:
    from transformerlm.experiments.compare import Comparison
    from transformerlm.experiments.compare_tables import Table

# What --help shows.
SHORT = ("runs", "at", "place", "picture", "output.format")
EXAMPLES = (
    ("two runs after as many tokens", "runs/first runs/second"),
    ("at equal cost, as a table for a document", "runs/first runs/second --at=flops --output.format=markdown"),
    ("where each ended, with a picture", "runs/first runs/second --at=end --picture=compared.png"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    command = Command(
        "transformerlm-runs compare", RunsCompareConfig, compare, words="runs", short=SHORT, examples=EXAMPLES
    )
    run_command(command, argv)


def compare(config: RunsCompareConfig) -> None:
    """Print the comparison, and draw the picture if asked to."""
    with working("reading"):
        from transformerlm.experiments.compare import compare_runs
        from transformerlm.experiments.compare_tables import records
        from transformerlm.experiments.history import read_history
        from transformerlm.experiments.run_directories import check_is_run

        for path in config.runs:
            check_is_run(path)
        runs = [read_history(path, name=path.resolve().name) for path in config.runs]
        comparison = compare_runs(runs, at=config.at, place=config.place)
    for line in comparison.notes:
        note(plain(line))
    form = config.output.format
    if form == "json" or (form == "auto" and not sys.stdout.isatty()):
        for record in records(comparison):
            print(json.dumps(record, allow_nan=False))
    else:
        print("\n".join(lines_of(comparison, is_markdown=form == "markdown")))
    sys.stdout.flush()
    if config.picture is not None:
        _draw(comparison, config)


def lines_of(comparison: Comparison, *, is_markdown: bool) -> Iterator[str]:
    """Yield the tables of a comparison: losses, differences, what else is equal, and the settings."""
    from transformerlm.experiments import compare_tables as tables

    parts = [
        (tables.title(comparison), tables.loss_table(comparison)),
        ("", tables.verdict_table(comparison)),
        ("mean loss at other equal places", tables.elsewhere_table(comparison)),
        ("settings that differ", tables.settings_table(comparison)),
    ]
    is_first = True
    for title, table in parts:
        if not table[1]:
            continue
        yield from [] if is_first else [""]
        yield from [f"{title[0].upper()}{title[1:]}:", ""] if title else []
        yield tables.markdown(table) if is_markdown else "\n".join(_text(table))
        is_first = False


def _text(table: Table) -> list[str]:
    heads, rows = table
    last = len(heads) - 1
    is_words = not heads[last]
    return table_lines(heads, [[plain(cell) for cell in row] for row in rows], left=[0, *[last] * is_words])


def _draw(comparison: Comparison, config: RunsCompareConfig) -> None:
    from transformerlm.experiments.compare_picture import save_curves

    assert config.picture is not None
    try:
        save_curves(comparison, config.picture)
    except ImportError as error:
        note(f"no picture: {error}; {how_to_install('plot')}")
    else:
        note(f"{config.picture}: written")
