"""Writes what a process does to the files below TORTURE_WATCH into its own stdout, between its own lines.

Python imports this by itself when its directory is on PYTHONPATH. Lines begin with `@`; because they go to the same
descriptor as the lines of the process, their order is the order in which things happened. A write is noticed when the
file's time, size or number has changed at the next operation that Python makes, whoever wrote it.

With TORTURE_CLOCK set, the wall clock jumps by up to a year at each reading.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time

WATCH = os.path.abspath(os.environ.get("TORTURE_WATCH") or "/nonexistent")
known: dict[str, tuple[int, int, int]] = {}
busy = False
fsync, walk, lstat, write = os.fsync, os.walk, os.lstat, os.write


def tell(*event: str) -> None:
    """Write an event to stdout, past Python's buffers."""
    write(1, f"@{json.dumps(event)}\n".encode())


def notice() -> None:
    """Tell which files and directories below WATCH are new or have changed since the last look."""
    for folder, directories, files in walk(WATCH):
        for name in (*directories, *files):
            path = os.path.join(folder, name)
            try:
                facts = lstat(path)
            except OSError:
                continue
            now = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
            before = known.get(path)
            if before is None or before[0] != now[0]:
                tell("create", path)
            if name in files and not os.path.islink(path) and before != now:
                tell("write", path)
            known[path] = now


def watched(event: str, arguments: tuple[object, ...]) -> None:
    """Tell what Python is about to do to files."""
    global busy
    if busy or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
        return
    busy = True
    try:
        paths = [os.path.abspath(os.fsdecode(path)) for path in arguments[:2] if isinstance(path, str | os.PathLike)]
        if not any(path.startswith(WATCH) for path in paths):
            return
        notice()
        if event == "os.rename":
            tell("rename", *paths)
            moved = {
                path: facts for path, facts in known.items() if path == paths[0] or path.startswith(paths[0] + "/")
            }
            for path, facts in moved.items():
                del known[path]
                known[paths[1] + path[len(paths[0]) :]] = facts
        elif event in ("os.remove", "os.rmdir"):
            tell("remove", paths[0])
            known.pop(paths[0], None)
    finally:
        busy = False


def synced(descriptor: int) -> None:
    """Flush a descriptor, and tell of it when that is done."""
    global busy
    busy = True
    try:
        notice()
        fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor if isinstance(descriptor, int) else descriptor.fileno()}")
        if path.startswith(WATCH):
            tell("sync", path)
    finally:
        busy = False


if "TORTURE_WATCH" in os.environ:
    os.fsync = synced
    sys.addaudithook(watched)
if "TORTURE_CLOCK" in os.environ:
    read_clock, jumps = time.time, random.Random(0)
    time.time = lambda: read_clock() + jumps.uniform(-3e7, 3e7)
