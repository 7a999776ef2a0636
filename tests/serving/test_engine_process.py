"""The engine process as its parent sees it: lines in, lines out, and an end that leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serving.helpers import LONG, engine_settings, request
from transformerlm.serving.engine_link import COMMAND
from transformerlm.serving.protocol import ASK, SETTINGS, TOLD, Ask, Told


def settings_of(checkpoint: Path, **changes: Any) -> bytes:
    """Return the first line."""
    return SETTINGS.encode(engine_settings(checkpoint, threads=1, slots=2, **changes))


@contextmanager
def engine(first: bytes) -> Iterator[subprocess.Popen[bytes]]:
    """Give a process that has been sent its settings."""
    pipe = subprocess.PIPE
    with subprocess.Popen(COMMAND, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        try:
            process.stdin.write(first)
            process.stdin.flush()
            yield process
        finally:
            process.kill()


def next_line(process: subprocess.Popen[bytes]) -> Told:
    """Return the next line that the process tells."""
    assert process.stdout is not None
    return TOLD.decode(process.stdout.readline())


def is_gone(pid: int) -> bool:
    """Return whether a process has ended, or waits only to be counted by whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_a_text_comes_a_line_a_step_and_signals_are_left_to_the_parent(run):
    """All texts of a step are in one line; INT, TERM and HUP do not end the process, but the end of its input does."""
    with engine(settings_of(run)) as process:
        assert process.stdin is not None
        served = next_line(process)
        assert served.serving is not None
        assert served.serving.checkpoint == "step-00000002"
        assert served.checkpoints == ["step-00000002", "step-00000001"]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(number)
        process.stdin.write(ASK.encode(Ask(submit=[request("a"), request("b", seed=2)])))
        process.stdin.flush()
        steps: list[Told] = []
        while {name for step in steps for name, piece in step.pieces if piece.finish} != {"a", "b"}:
            steps.append(next_line(process))
            process.stdin.write(ASK.encode(Ask(taken=1)))
            process.stdin.flush()
        assert any(len(step.pieces) == 2 for step in steps)
        assert all(step.report is not None for step in steps)
        assert sum(step.report.generated_tokens for step in steps if step.report) == 16
        process.stdin.write(ASK.encode(Ask(submit=[request("long", max_tokens=10**6, ignore_eos=True)])))
        process.stdin.flush()
        next_line(process)
        process.stdin.close()  # in the middle of a text
        assert process.wait(LONG) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_it_ends_when_its_parent_is_killed(run):
    """SIGKILL of the parent, which can tell nobody anything, leaves no engine behind."""
    code = (
        "import subprocess, sys, time\n"
        "from transformerlm.serving.engine_link import COMMAND\n"
        "engine = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)\n"
        f"engine.stdin.write({settings_of(run)!r})\n"
        "engine.stdin.flush()\n"
        "engine.stdout.readline()\n"
        "print(engine.pid, flush=True)\n"
        "time.sleep(3600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        try:
            pid = int(parent.stdout.readline())
            assert not is_gone(pid)
        finally:
            parent.kill()
    end = time.monotonic() + LONG
    while not is_gone(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert is_gone(pid)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("none", {}, "no such checkpoint or run directory"),
        pytest.param("run", {"device": "cuda:99"}, "device: 'cuda:99' is not available", marks=pytest.mark.slow),
    ],
)
def test_a_start_that_fails_says_why_in_one_line(name, changes, reason, run, tmp_path):
    """The last line has the reason for the user; stderr has no traceback."""
    with engine(settings_of(run if name == "run" else tmp_path / name, **changes)) as process:
        told = next_line(process)
        assert told.failed is not None
        assert reason in told.failed
        assert "\n" not in told.failed
        assert process.wait(LONG) == 1
        assert process.stderr is not None
        assert process.stderr.read() == b""


@pytest.mark.slow
def test_a_line_that_is_not_of_the_protocol_ends_it(run):
    """A parent of another version is an error that is said, not guessed around."""
    with engine(settings_of(run)) as process:
        assert process.stdin is not None
        next_line(process)
        process.stdin.write(b'{"sumbit": []}\n')
        process.stdin.flush()
        failed = next_line(process).failed
        assert failed is not None
        assert "sumbit" in failed
        assert process.wait(LONG) == 1
