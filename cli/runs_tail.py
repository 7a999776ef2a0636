"""`transformerlm-runs tail`: the last lines of a run, and those that follow until it ends."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from cli.entry import run

    run("cli.runs_tail")

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from cli.entry import STOP_CODES
from cli.run_words import words_of
from cli.terminal import LIVE, clock, is_live, note
from cli.utils import Command
from cli.utils import main as run_command
from config.runs_tail import RunsTailConfig

# What --help shows.
SHORT = ("run", "lines", "follow", "output.format")
EXAMPLES = (
    ("follow a run until it ends", "runs/first"),
    ("its last 50 lines, as they are", "runs/first --lines=50 --follow=false --output.format=json"),
)
LOOK_SECONDS = 0.5
_CURVE_WIDTH = 30


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script."""
    run_command(
        Command("transformerlm-runs tail", RunsTailConfig, tail, first_word="run", short=SHORT, examples=EXAMPLES), argv
    )


def tail(config: RunsTailConfig) -> int:
    """Show the lines and return the exit code; Ctrl-C ends it without a word."""
    try:
        _follow(config)
    except KeyboardInterrupt:
        return STOP_CODES["SIGINT"]
    finally:
        LIVE.show(None)
    return 0


def _follow(config: RunsTailConfig) -> None:
    from transformerlm.experiments.following import FollowedRun

    is_json = config.output.format == "json" or (config.output.format == "auto" and not sys.stdout.isatty())
    lines = FollowedRun(config.run, last_lines=config.lines)
    has_ended = lines.has_ended()  # asked before the lines are read: what was written before its end is among them
    if has_ended or not config.follow:
        _show(lines.new()[-config.lines :] if config.lines else [], lines, is_json=is_json)
    else:
        is_first = True
        while True:
            new = lines.new()
            _show(
                new[len(new) - config.lines :] if is_first and len(new) > config.lines else new, lines, is_json=is_json
            )
            is_first = False
            if has_ended:
                break
            if is_live():
                LIVE.show(_Live(lines))
            time.sleep(LOOK_SECONDS)
            has_ended = lines.has_ended()
    if config.follow:
        LIVE.show(None)
        note(f"{config.run}: {lines.state()}")


def _show(new: Sequence[tuple[str, dict[str, Any]]], lines: Any, *, is_json: bool) -> None:
    """Write lines as they are, or in words above the live line of a terminal."""
    for text, record in new:
        if is_json:
            print(text, flush=True)
        elif is_live() and sys.stdout.isatty():
            note(words_of(record, max_steps=lines.max_steps))
        else:
            print(words_of(record, max_steps=lines.max_steps), flush=True)


class _Live:
    """The words of the live line: the curve, the step, the rate, the remaining time."""

    def __init__(self, lines: Any) -> None:
        self._lines = lines

    def __call__(self) -> str:
        return "  ".join(self._parts())

    def _parts(self) -> Iterator[str]:
        from transformerlm.experiments.sparkline import blocks_for, sparkline

        lines = self._lines
        yield sparkline(lines.losses, width=_CURVE_WIDTH, blocks=blocks_for(sys.stderr.encoding))
        yield f"step {lines.step:,}" + (f"/{lines.max_steps:,}" if lines.max_steps is not None else "")
        if lines.tokens_per_second:
            yield f"{lines.tokens_per_second:,.0f} tokens/s"
        eta = lines.eta_seconds()
        if eta is not None:
            yield f"ETA {clock(eta)}"
