"""`transformerlm-runs report`: runs as one HTML file."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.runs_report")

import json
import sys
from collections.abc import Sequence

from cli.terminal import note, working
from cli.utils import Command
from cli.utils import main as run_command
from config.runs_report import RunsReportConfig

# What --help shows.
SHORT = ("runs", "output", "title")
EXAMPLES = (
    ("a run, as it is now", "runs/first"),
    ("two runs beside each other, in a file to send to somebody", "runs/first runs/second --output first-second.html"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    command = Command(
        "transformerlm-runs report", RunsReportConfig, report, words="runs", short=SHORT, examples=EXAMPLES
    )
    run_command(command, argv)


def report(config: RunsReportConfig) -> None:
    """Write the report, and say where it is: for people on stderr, and a JSON line on stdout that is no terminal."""
    from transformerlm.experiments.history import read_history
    from transformerlm.experiments.report import check_output, write_report
    from transformerlm.experiments.run_directories import check_is_run

    for path in config.runs:
        check_is_run(path)
    check_output(config.output)
    with working("reading the runs"):
        histories = [read_history(path.resolve(), name=path.resolve().name) for path in config.runs]
        size = write_report(histories, config.output, title=config.title)
    runs = f"{len(histories)} run{'s' * (len(histories) > 1)}"
    note(f"{config.output}: {runs}, {size / 1000:,.0f} kB; open it in a browser")
    if not sys.stdout.isatty():
        facts = {"event": "report_written", "path": str(config.output), "runs": len(histories), "bytes": size}
        print(json.dumps(facts))
