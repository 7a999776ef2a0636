"""A directory has one holder at a time, and none once the holder is dead."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from transformerlm.utils.lock import DirectoryLock

HOLD = """
import sys, time
from pathlib import Path
from transformerlm.utils.lock import DirectoryLock
with DirectoryLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_holder_is_refused_and_told_who_holds_it(tmp_path):
    """While one process holds the directory, another is refused with its number; afterwards it may enter."""
    with (
        DirectoryLock(tmp_path / "run"),
        pytest.raises(FileExistsError, match=f"found process {os.getpid()}"),
        DirectoryLock(tmp_path / "run"),
    ):
        pass
    with DirectoryLock(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def test_an_empty_directory_is_removed_again(tmp_path):
    """A run that is refused before it writes anything leaves nothing."""
    with pytest.raises(ValueError, match="refused"), DirectoryLock(tmp_path / "run"):
        raise ValueError("refused")
    assert not (tmp_path / "run").exists()


def test_a_dead_holder_does_not_block(tmp_path):
    """A killed process leaves its file, but not its lock."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(FileExistsError, match=f"found process {holder.pid}"), DirectoryLock(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    assert (tmp_path / ".lock").exists()
    with DirectoryLock(tmp_path):
        pass
