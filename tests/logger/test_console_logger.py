"""The console logger: JSON lines on a stream, and a quiet end when the reader leaves."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from logger import ConsoleLogger

ROOT = Path(__file__).parents[2]


class CountingStream(io.StringIO):
    """Counts flushes."""

    flushes = 0

    def flush(self):
        self.flushes += 1
        super().flush()


def test_one_flushed_line_a_record():
    """Every record is a JSON line on the given stream, flushed as it is written."""
    stream = CountingStream()
    with ConsoleLogger(stream) as logger:
        logger.log_metrics(1, {"loss": 2.5})
        assert stream.flushes == 1
        logger.log_event("resumed", step=1)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert lines == [{"step": 1, "metrics.loss": 2.5}, {"event": "resumed", "step": 1}]
    assert not stream.closed


def test_stdout_is_the_default(capsys):
    """Without a stream the lines go to stdout and nothing to stderr."""
    ConsoleLogger().log_event("started")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ('{"event": "started"}\n', "")


def test_broken_pipe_silences_the_logger_once():
    """After a closed pipe nothing is raised and nothing more is written."""
    calls = []

    class Broken(io.StringIO):
        def write(self, text):
            calls.append(text)
            raise BrokenPipeError

    logger = ConsoleLogger(Broken())
    logger.log_event("a")
    logger.log_event("b")
    assert len(calls) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_run_goes_on_when_head_has_seen_enough(tmp_path):
    """`| head -1` gets its line, and the run ends normally, with its last step in the log file and a clean stderr."""
    program = tmp_path / "run.py"
    program.write_text(
        "import sys\nfrom logger import create_logger\n"
        "with create_logger('console', run_name='x', jsonl_path=sys.argv[1]) as logger:\n"
        "    for step in range(20000): logger.log_metrics(step, {'loss': 1.0})\n"
        "sys.stderr.write('ended')\n"
    )
    command = f"set -o pipefail; PYTHONPATH={ROOT} {sys.executable} {program} {tmp_path}/metrics.jsonl | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=600)
    assert done.stdout == '{"step": 0, "metrics.loss": 1.0}\n'
    assert (done.returncode, done.stderr) == (0, "ended")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 20000


@pytest.mark.skipif(sys.platform == "win32", reason="waits for a pipe")
def test_a_stuck_reader_is_given_up(caplog):
    """With patience, a reader that takes nothing costs that time once; then the logger says so and is silent."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        logger = ConsoleLogger(stream, patience=0.05)
        for step in range(3000):
            logger.log_metrics(step, {"loss": 1.0})
    taken = b""
    while part := os.read(reading, 1 << 16):
        taken += part
    os.close(reading)
    steps = [json.loads(line)["step"] for line in taken.decode().splitlines()]
    assert steps == list(range(len(steps)))
    assert 0 < len(steps) < 3000
    (message,) = [record.getMessage() for record in caplog.records]
    assert "stdout has taken nothing for 0.05 s" in message


@pytest.mark.skipif(sys.platform == "win32", reason="waits for a pipe")
def test_a_slow_reader_misses_nothing():
    """With patience, a reader that keeps reading gets every line, long ones too."""
    reading, writing = os.pipe()
    taken: list[bytes] = []
    reader = threading.Thread(target=lambda: taken.extend(iter(lambda: os.read(reading, 1000), b"")))
    reader.start()
    with os.fdopen(writing, "w") as stream:
        logger = ConsoleLogger(stream, patience=30.0)
        for step in range(50):
            logger.log_record({"step": step, "text": "é" * 10_000})
    reader.join()
    os.close(reading)
    assert [json.loads(line)["step"] for line in b"".join(taken).decode().splitlines()] == list(range(50))
