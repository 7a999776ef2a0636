"""`transformerlm-runs show`: the facts of one run."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.runs_show")

import json
import sys
from collections.abc import Sequence

from cli.run_words import rows_of
from cli.terminal import plain, ruled
from cli.utils import Command
from cli.utils import main as run_command
from config.runs_show import RunsShowConfig

# What --help shows.
SHORT = ("run", "output.format")
EXAMPLES = (
    ("one run in words", "runs/first"),
    ("the settings that are not defaults, for a script", "runs/first --output.format=json"),
)
_CURVE_WIDTH = 60


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(
        Command("transformerlm-runs show", RunsShowConfig, show, first_word="run", short=SHORT, examples=EXAMPLES), argv
    )


def show(config: RunsShowConfig) -> None:
    """Print the facts: a JSON line, or words for people."""
    from transformerlm.experiments.facts import facts_of
    from transformerlm.experiments.run_directories import check_is_run
    from transformerlm.experiments.sparkline import blocks_for, sparkline

    check_is_run(config.run)
    facts = facts_of(config.run)
    if config.output.format == "json" or (config.output.format == "auto" and not sys.stdout.isatty()):
        print(json.dumps(facts, allow_nan=False))
        return
    print(ruled(plain(facts["directory"])))
    curve = [float("nan") if loss is None else loss for loss in facts["curve"]]
    for number, (title, text) in enumerate(rows_of(facts)):
        print(f"{title:<14}{plain(text)}")
        if number == 0 and curve:
            print(f"{'':<14}{sparkline(curve, width=_CURVE_WIDTH, blocks=blocks_for(sys.stdout.encoding))}")
