"""The directory of a sweep: who works in it, and which run is being trained.

    .lock                the sweep that works here, at most one
    queue/NAME.toml      a run's configuration, and which data it is of; whoever trains it holds a lock on this file
    logs/NAME.txt        what the run said on stderr, over all its starts
    NAME/                the run itself

There is no list of what is done: a run's own lines say that. The lock on `queue/NAME.toml` passes to the process that
trains, and ends with it. So a sweep that was killed leaves no claim, and a training that outlived it is waited for.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from transformerlm.experiments.sweep.plan import SweepRun
from transformerlm.utils.lock import DirectoryLock, try_lock

_LAST_LINES, _LAST_BYTES = 12, 8192
_HOLDER = re.compile(r"process (\d+)(?: on (.*))?")


class SweepDirectory:
    """The files of a sweep."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def hold(self) -> DirectoryLock:
        """Return the lock that one sweep holds while it works here."""
        work = "the only sweep here, found {holder} at work in it"
        return DirectoryLock(self.root, work=work, instead="choose another dir")

    def run_dir(self, run: SweepRun) -> Path:
        """Return the directory of a run."""
        return self.root / run.name

    def config_path(self, run: SweepRun) -> Path:
        """Return the TOML file with which a run is trained."""
        return self.root / "queue" / f"{run.name}.toml"

    def log_path(self, run: SweepRun) -> Path:
        """Return the file of what a run says on stderr."""
        return self.root / "logs" / f"{run.name}.txt"

    def claim(self, run: SweepRun) -> IO[str] | None:
        """Write the run's TOML file and return it open and locked; None while a process trains the run.

        The file is never replaced, because its lock would not be that of the new one.
        """
        path = self.config_path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8", newline="\n")
        if not try_lock(file, path):
            file.close()
            return None
        text = run.toml
        file.seek(0)
        if file.read() != text:
            file.seek(0)
            file.truncate()
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        return file

    def is_free(self, run: SweepRun) -> bool:
        """Return whether nobody trains a run: neither from this queue nor by a command of its own."""
        return not _is_locked(self.config_path(run)) and not self.is_held(run)

    def is_held(self, run: SweepRun) -> bool:
        """Return whether a training holds a run's directory; one that begins has only the claim yet."""
        return _is_locked(self.run_dir(run) / ".lock")

    def process_of(self, run: SweepRun) -> int | None:
        """Return the number of the process of this machine that holds a run's directory, by what it wrote there."""
        path = self.run_dir(run) / ".lock"
        with suppress(OSError, UnicodeDecodeError):
            if _is_locked(path) and (found := _HOLDER.fullmatch(path.read_text(encoding="utf-8"))):
                return int(found[1]) if found[2] in (None, platform.node()) else None
        return None

    def open_log(self, run: SweepRun) -> IO[bytes]:
        """Return the file for what a run says, opened to add to it."""
        path = self.log_path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab")

    def last_words(self, run: SweepRun) -> list[str]:
        """Return the last lines that a run said on stderr."""
        try:
            with self.log_path(run).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_BYTES))
                lines = file.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return []
        return [line.rstrip() for line in lines if line.strip()][-_LAST_LINES:]

    def write_queue(self, runs: Sequence[SweepRun]) -> None:
        """Write the TOML files of all runs; one that is being trained has its own."""
        for run in runs:
            if file := self.claim(run):
                file.close()


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r+", encoding="utf-8") as file:
            return not try_lock(file, path, shared=True)
    except FileNotFoundError:
        return False
