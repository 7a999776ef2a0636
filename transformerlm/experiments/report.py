"""A run, or several, as one HTML file that needs no server, no network and no other file.

Its content policy lets the two scripts and the style in it run, by their sha256, and nothing else: no text of a run can
become code, and nothing is fetched. The data is a block of JSON that scripts read and browsers do not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from transformerlm.experiments import page
from transformerlm.experiments.history import RunHistory
from transformerlm.experiments.report_data import report_data
from transformerlm.experiments.settings import named_defaults
from transformerlm.experiments.verdict import verdict
from transformerlm.utils.bundle import bundled
from transformerlm.utils.files import write_whole
from transformerlm.utils.one_page import fill, json_block, policy

_MARK = b'<meta name="generator" content="transformerlm-runs report">'
_HEAD_BYTES = 4096


def write_report(
    runs: Sequence[RunHistory], output: Path, *, title: str | None = None, now: datetime | None = None
) -> int:
    """Write the report of one or more runs, and return its bytes; a report that is at `output` is replaced.

    `now` is what the report says of when it was made.

    Raises:
        ValueError: there is no run, or at `output` is something else.
        OSError: it cannot be written, or a run cannot be read any more.
    """
    if not runs:
        raise ValueError("expected at least one run, found none")
    check_output(output)
    text = report_html(runs, title=title, now=now or datetime.now(UTC))
    write_whole(output, text)
    return len(text.encode())


def check_output(output: Path) -> None:
    """Refuse a place where something is that would be lost.

    Raises:
        ValueError: it is a directory, or a file that is no report.
    """
    if output.is_dir():
        raise ValueError(f"{output}: expected the name of a file, found a directory")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"{output}: expected a file in a directory that is there, found none at {output.parent}")
    if not output.exists():
        return
    with open(output, "rb") as stream:
        if _MARK not in stream.read(_HEAD_BYTES):
            raise ValueError(
                f"{output}: expected a new name or an older report, found another file; it was left as it is"
            )


def report_html(runs: Sequence[RunHistory], *, title: str | None, now: datetime) -> str:
    """Return the whole file."""
    data = report_data(runs)
    content = {
        "title": title or (data[0]["name"] if len(data) == 1 else f"{len(data)} runs"),
        "made": now.strftime("made on %Y-%m-%d %H:%M UTC"),
        "verdict": verdict(runs, data),
        "defaults": named_defaults(),
        "runs": data,
    }
    style = page.read(page.UPLOT_CSS) + page.read("page.css")
    uplot, script = page.read(page.UPLOT_JS), bundled("report.js", page.read)
    filled = {
        "policy": policy(scripts=[uplot, script], style=style),
        "style": style,
        "runs": page.read("runs.html"),
        "data": json_block(content),
        "uplot": uplot,
        "script": script,
    }
    return fill(page.read("report.html"), filled)
