"""The log file: whole lines only, and each step once after a resume."""

from __future__ import annotations

import errno
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logger import JsonlLogger, create_logger, file_logger, truncate_after_step


def _steps(path):
    return [json.loads(line).get("step") for line in path.read_bytes().splitlines()]


def _write(path, steps):
    with JsonlLogger(path) as logger:
        for step in steps:
            logger.log_metrics(step, {"loss": 1.0})


def test_lines_are_in_the_file_when_the_call_returns(tmp_path):
    """A reader sees each line at once, before the logger is closed; missing folders are made."""
    path = tmp_path / "runs" / "a" / "metrics.jsonl"
    logger = JsonlLogger(path)
    logger.log_metrics(1, {"loss": float("nan")})
    assert path.read_text() == '{"step": 1, "metrics.loss": "nan"}\n'
    logger.close()


def test_reopening_appends(tmp_path):
    """A second logger on the same path continues after the last line."""
    path = tmp_path / "metrics.jsonl"
    _write(path, [1, 2])
    _write(path, [3])
    assert _steps(path) == [1, 2, 3]


@pytest.mark.parametrize("torn", [b'{"step": 3, "met', b"x" * 200_000])
def test_torn_last_line_is_cut_on_opening(tmp_path, torn):
    """The rest of a killed run's last line does not join the next one."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    _write(path, [3])
    assert _steps(path) == [1, 2, 3]


def test_a_file_of_one_torn_line_starts_anew(tmp_path):
    """A file without any newline holds no record."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"st')
    _write(path, [1])
    assert _steps(path) == [1]


def test_short_write_is_finished_and_a_failed_one_taken_back(tmp_path):
    """A partial write is continued; one that a full disk refuses is withdrawn, raised, and written later."""
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    real = logger._file

    class Slow:
        full = False

        def __getattr__(self, name):
            return getattr(real, name)

        def write(self, data):
            if self.full and len(data) < 20:
                raise OSError(28, "No space left on device")
            return real.write(data[:10])

    logger._file = slow = Slow()
    logger.log_metrics(1, {"loss": 1.0})
    slow.full = True
    with pytest.raises(OSError, match="No space left"):
        logger.log_metrics(2, {"loss": 1.0})
    slow.full = False
    logger.log_metrics(3, {"loss": 1.0})
    logger.close()
    assert _steps(path) == [1, 2, 3]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_what_waits_for_a_full_disk_is_bounded(tmp_path, monkeypatch):
    """Of the lines that a full disk refuses, the oldest are dropped, and only whole lines."""
    monkeypatch.setattr(file_logger, "MAX_WAITING_BYTES", 100)
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    with open("/dev/full", "ab", buffering=0) as full:
        file, logger._file = logger._file, full
        logger._has_the_name = lambda: True
        for step in range(9):
            with pytest.raises(OSError, match="No space left"):
                logger.log_metrics(step, {"loss": 1.0})
    logger._file = file
    logger.log_metrics(9, {"loss": 1.0})
    logger.close()
    assert _steps(tmp_path / "metrics.jsonl") == [7, 8, 9]


def test_sync_flushes_the_file_to_the_disk(tmp_path, monkeypatch):
    """`sync` reaches the file through a MultiLogger, so that a checkpoint never knows more than the log."""
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    with create_logger("noop", run_name="a", jsonl_path=tmp_path / "metrics.jsonl") as logger:
        logger.log_metrics(1, {"loss": 1.0})
        logger.sync()
        assert flushed == [logger.loggers[0]._file.fileno()]


def test_truncate_keeps_what_was_reached(tmp_path):
    """Step lines and events of later steps are removed and counted; lines without a step stay."""
    path = tmp_path / "metrics.jsonl"
    with JsonlLogger(path) as logger:
        logger.log_event("started")
        for step in (1, 2, 3):
            logger.log_metrics(step, {"loss": 1.0})
            logger.log_event("checkpoint_saved", step=step)
    with path.open("ab") as file:
        file.write(b'\x00\x00\n[1]\n{"step": 1')
    assert truncate_after_step(path, 2) == 5
    assert _steps(path) == [None, 1, 1, 2, 2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_leaves_a_good_file_untouched(tmp_path):
    """If there is nothing to remove, the file is not replaced; a missing file is not an error."""
    path = tmp_path / "metrics.jsonl"
    assert truncate_after_step(path, 5) == 0
    assert not path.exists()
    _write(path, [1, 2])
    inode = path.stat().st_ino
    assert truncate_after_step(path, 2) == 0
    assert path.stat().st_ino == inode
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_truncation_on_a_full_disk_leaves_the_file_and_nothing_else(tmp_path, monkeypatch):
    """The new file is written beside it; what there is of that goes again."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        truncate_after_step(path, 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert _steps(path) == [1, 2]


def test_open_logger_follows_the_renamed_file(tmp_path):
    """A logger that was opened before the truncation writes to the new file, not to the one that lost its name."""
    path = tmp_path / "metrics.jsonl"
    with JsonlLogger(path) as logger:
        for step in (1, 2, 3):
            logger.log_metrics(step, {})
        truncate_after_step(path, 1)
        logger.log_metrics(2, {})
    assert _steps(path) == [1, 2]


def test_a_file_that_cannot_be_opened_for_a_moment_loses_no_line(tmp_path, monkeypatch):
    """As with too many open files after a rollback: the line waits for the next one."""
    path = tmp_path / "metrics.jsonl"
    with JsonlLogger(path) as logger:
        for step in (1, 2):
            logger.log_metrics(step, {})
        truncate_after_step(path, 1)
        with monkeypatch.context() as patch:
            patch.setattr(JsonlLogger, "_open", lambda self: (tmp_path / "nowhere" / "at all").open("rb"))
            with pytest.raises(OSError, match="nowhere"):
                logger.log_metrics(2, {})
        logger.log_metrics(3, {})
    assert _steps(path) == [1, 2, 3]


def test_open_logger_leaves_a_file_that_still_has_another_name(tmp_path):
    """A file that is replaced while it is open keeps a link on NFS, under a name of the client's."""
    path = tmp_path / "metrics.jsonl"
    with JsonlLogger(path) as logger:
        logger.log_metrics(1, {})
        logger.log_metrics(2, {})
        os.link(path, tmp_path / ".nfs0001")
        truncate_after_step(path, 1)
        logger.log_metrics(2, {})
    assert _steps(path) == [1, 2]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
@pytest.mark.parametrize("end", ["sync", "close"])
def test_lines_that_wait_are_written_before_a_checkpoint_and_at_the_end(end, tmp_path):
    """Nobody may log another line after there is room again."""
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    with open("/dev/full", "ab", buffering=0) as full:
        file, logger._file = logger._file, full
        logger._has_the_name = lambda: True
        with pytest.raises(OSError, match="No space left"):
            logger.log_metrics(1, {"loss": 1.0})
    logger._file = file
    getattr(logger, end)()
    assert _steps(tmp_path / "metrics.jsonl") == [1]
    logger.close()


def test_unwritable_path_is_an_os_error(tmp_path):
    """A path that cannot be opened is reported when the logger is built."""
    (tmp_path / "metrics").write_text("a file where a folder is needed")
    with pytest.raises(OSError, match="metrics"):
        JsonlLogger(tmp_path / "metrics" / "below")


@given(
    st.integers(0, 12),
    st.integers(1, 5),
    st.integers(0, 30),
)
def test_each_step_stands_once_after_any_kill(tmp_path_factory, killed_after, every, torn_bytes):
    """Whenever a run is killed, truncating to its last checkpoint and continuing gives every step exactly once."""
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    _write(path, range(1, killed_after + 1))
    with path.open("ab") as file:
        file.write(b'{"step": 99, "metrics.loss": 1'[:torn_bytes])
    checkpoint = killed_after // every * every
    truncate_after_step(path, checkpoint)
    _write(path, range(checkpoint + 1, 13))
    assert _steps(path) == list(range(1, 13))
