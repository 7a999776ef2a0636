"""Progress for people: a live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from cli.progress import Progress, StageProgress
from cli.terminal import LIVE


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


@pytest.fixture
def now(monkeypatch):
    """Return the time in a list; it does not move until a test sets it."""
    time = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: time[0])
    monkeypatch.setattr("cli.terminal.LiveLine._tick", lambda self: None)  # tests draw themselves
    LIVE._drawn_at = 0.0  # another test's clock
    yield time
    LIVE.show(None)
    LIVE._ticker = None


def plain(monkeypatch) -> io.StringIO:
    """Let stderr be a stream that is no terminal; not as a fixture, as pytest changes stderr before each test."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    return sys.stderr


def terminal(monkeypatch) -> Terminal:
    """Let stderr be a terminal."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    return sys.stderr


def last_line(stream: Terminal) -> str:
    """Return the last line of the screen."""
    return stream.getvalue().rpartition("\n")[2].rpartition("\r\x1b[K")[2]


def test_the_eta_is_never_beyond_the_limit(monkeypatch, now):
    """The ETA of a job with a time limit is at most what the limit leaves."""
    stream = plain(monkeypatch)
    progress = Progress(1_000_000, limit=60.0)
    for now[0] in (120.0, 150.0, 170.0):
        progress(10, {})
    etas = [line.rpartition("  ")[2] for line in stream.getvalue().splitlines()]
    assert etas == ["ETA 0:40", "ETA 0:10", "ETA 0:00"]


def test_the_eta_counts_the_work_that_is_not_units(monkeypatch, now):
    """If the validations to come are as much work as the steps, half of the steps in 10 s leave 30 s."""
    stream = plain(monkeypatch)
    progress = Progress(10, work_left=lambda done: 10 - done + 10)
    now[0] += 10
    progress(5)
    assert stream.getvalue() == "step 5/10  ETA 0:30\n"


def test_elsewhere_than_on_a_terminal_lines_are_few(monkeypatch, now):
    """Lines come at most every 10 s, for each validation and at the end; moves and activities show nothing."""
    stream = plain(monkeypatch)
    progress = Progress(100)
    for step in range(1, 101):
        now[0] += 1.0
        progress.doing("validating 1/2")
        progress.move(step, {"loss": 9.0})
        progress(step, {"loss": 2.5, "tokens_per_second": 1234.0} | ({"val_loss": 3.0} if step == 5 else {}))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 5/100  loss 2.500  val loss 3.000  1,234 tokens/s  ETA 1:35"
    assert lines[-1] == "step 100/100  loss 2.500  1,234 tokens/s  1:40"
    assert [line.split()[1] for line in lines] == [f"{step}/100" for step in (5, *range(15, 100, 10), 100)]
    progress(100)
    assert stream.getvalue().splitlines() == lines


def test_a_live_line_moves_with_each_step_and_names_what_takes_time(monkeypatch, now):
    """Numbers that a step does not name stay, with the name of what is done besides steps."""
    stream = terminal(monkeypatch)
    progress = Progress(10)
    now[0] += 1
    progress(1, {"loss": 2.5, "tokens_per_second": 1234.0})
    now[0] += 1
    progress.move(2, {"loss": 2.25})
    assert last_line(stream) == "step 2/10  loss 2.250  1,234 tokens/s  ETA 0:08"
    now[0] += 0.3
    progress.doing("validating 3/16")
    assert last_line(stream).endswith("  validating 3/16")
    now[0] += 1
    progress(3, {"loss": 2.0, "val_loss": 3.0})
    assert "\nstep 3/10  loss 2.000  1,234 tokens/s  ETA" in stream.getvalue()
    assert "validating" not in last_line(stream)
    assert stream.getvalue().count("\n") == 1


def test_the_eta_runs_down_while_nothing_is_done(monkeypatch, now):
    """A long step does not stop the clock."""
    stream = terminal(monkeypatch)
    progress = Progress(10)
    now[0] += 5
    progress.move(5)
    etas = []
    for _ in range(3):
        LIVE.write_above("")
        etas.append(last_line(stream))
        now[0] += 1
    assert etas == [f"step 5/10  ETA 0:0{left}" for left in (5, 4, 3)]


def test_the_end_is_a_line_and_nothing_live_stays(monkeypatch, now):
    """The last unit ends the live line; what is done after it is shown by its name alone, until it ends."""
    stream = terminal(monkeypatch)
    progress = Progress(2)
    now[0] += 2
    progress(2, {"loss": 1.0})
    assert stream.getvalue().endswith("step 2/2  loss 1.000  0:02\n")
    progress(2)
    assert LIVE.words is None
    now[0] += 1
    progress.doing("saving")
    assert last_line(stream) == "saving"
    progress.close()
    assert last_line(stream) == ""


def test_stages_have_their_units(capsys):
    """Bytes are shown as megabytes with a rate; other units by their word."""
    progress = StageProgress({"count": "B", "merge": "merge"})
    progress("count", 2_000_000, 2_000_000)
    progress("merge", 7, 7)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("2.0/2.0 MB  ")
    assert lines[1].startswith("merge 7/7  ")


def test_of_a_pipe_nothing_is_shown(capsys):
    """Nobody knows how long it is, so no part of it is the end."""
    progress = StageProgress({"count": "B"})
    progress("count", 0, 0)
    progress("count", 2_000_000, 0)
    assert capsys.readouterr().err == ""
