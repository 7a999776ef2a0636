"""The directory of a sweep: claims, holders and last words."""

from __future__ import annotations

import os
import platform

from config.io import load_config
from config.train import TrainConfig
from tests.experiments.sweep.helpers import planned
from transformerlm.experiments.sweep.queue import SweepDirectory
from transformerlm.utils.lock import DirectoryLock


def test_a_claim_writes_the_run_and_holds_it(tmp_path):
    """The file is the run's configuration; a second claim fails until the first is closed, in whatever process."""
    run, directory = planned(tmp_path)[0], SweepDirectory(tmp_path / "sweep")
    claim = directory.claim(run)
    assert load_config(TrainConfig, directory.config_path(run)) == run.config
    assert directory.claim(run) is None
    assert not directory.is_free(run)
    claim.close()
    assert directory.is_free(run)


def test_a_file_that_a_kill_left_half_written_is_repaired(tmp_path):
    """In its place, since a file that replaced it would have a lock of its own."""
    run, directory = planned(tmp_path)[0], SweepDirectory(tmp_path / "sweep")
    directory.write_queue([run])
    path = directory.config_path(run)
    whole, inode = path.read_text(), path.stat().st_ino
    path.write_text(whole[:50])
    directory.write_queue([run])
    assert (path.read_text(), path.stat().st_ino) == (whole, inode)


def test_the_process_that_trains_a_run_is_known(tmp_path):
    """By the lock of the run's directory while it is held, and only on the machine that it is on."""
    run, directory = planned(tmp_path)[0], SweepDirectory(tmp_path / "sweep")
    lock = directory.run_dir(run) / ".lock"
    with DirectoryLock(directory.run_dir(run)):
        assert directory.process_of(run) == os.getpid()
        for text, expected in ((f"process 7 on {platform.node()}", 7), ("process 7 on elsewhere", None), ("?", None)):
            lock.write_text(text)
            assert directory.process_of(run) == expected
        assert not directory.is_free(run)
    directory.run_dir(run).mkdir(parents=True, exist_ok=True)
    lock.write_text(f"process {os.getpid()}")  # of a process that was killed
    assert directory.process_of(run) is None
    assert directory.is_free(run)


def test_the_last_words_are_the_last_lines(tmp_path):
    """Of a long log only its end is read, and bytes that are not text do no harm."""
    run, directory = planned(tmp_path)[0], SweepDirectory(tmp_path / "sweep")
    assert directory.last_words(run) == []
    with directory.open_log(run) as log:
        log.write(b"x" * 100_000 + b"\n\xff\n\n" + b"".join(b"line %d\n" % number for number in range(20)))
    assert directory.last_words(run) == [f"line {number}" for number in range(8, 20)]
