"""Choosing a backend by name."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from logger import create_logger

ROOT = Path(__file__).parents[2]


def test_console_writes_stream_and_file_alike(tmp_path):
    """The console backend's lines and the file's are the same."""
    stream = io.StringIO()
    with create_logger("console", run_name="a", jsonl_path=tmp_path / "m.jsonl", stream=stream) as logger:
        logger.log_metrics(1, {"loss": 0.5})
    assert stream.getvalue() == (tmp_path / "m.jsonl").read_text() == '{"step": 1, "metrics.loss": 0.5}\n'


@pytest.mark.parametrize(
    ("backend", "has_words", "writes"), [("console", True, False), ("console", False, True), ("json", True, True)]
)
def test_a_terminal_gets_json_where_it_is_asked_for_or_nothing_else_is_read(
    backend, has_words, writes, tmp_path, monkeypatch
):
    """If stderr is on a terminal, too, "console" leaves the lines to the file; "json" always writes them."""
    stream, errors = io.StringIO(), io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(errors, "isatty", lambda: has_words, raising=False)
    monkeypatch.setattr(sys, "stderr", errors)
    with create_logger(backend, run_name="a", jsonl_path=tmp_path / "m.jsonl", stream=stream) as logger:
        logger.log_event("started")
    line = '{"event": "started"}\n'
    assert (stream.getvalue(), (tmp_path / "m.jsonl").read_text()) == (line if writes else "", line)


def test_noop_still_keeps_the_file(tmp_path, capsys):
    """Without a backend the file is written and stdout is not."""
    with create_logger("noop", run_name="a", jsonl_path=tmp_path / "m.jsonl") as logger:
        logger.log_event("started")
    assert (tmp_path / "m.jsonl").read_text() == '{"event": "started"}\n'
    assert capsys.readouterr().out == ""


def test_unknown_backend_is_refused():
    """The error names the key and the choices."""
    with pytest.raises(ValueError, match=r'logging\.backend: expected one or several of "console", .* found "aim"'):
        create_logger("aim", run_name="a")


def test_importing_the_room_is_light():
    """The room imports neither torch nor numpy nor wandb."""
    program = "import sys, logger; print([name for name in ('torch', 'numpy', 'wandb') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
