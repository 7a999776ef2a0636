"""The process of one part: `python -m benchmarking.gpu.child '{"module": ..., ...}'`.

It leads a process group of its own, and ends with all its children when the suite ends: the suite holds the other end
of stdin, which closes however the suite ends.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
from pathlib import Path

from benchmarking.gpu.task import Task

_BEFORE_THE_LIMIT = 3.0


def main(request: str) -> None:
    """Run the part; an exception ends the process with its traceback."""
    asked = json.loads(request)
    threading.Thread(target=_end_with_the_suite, daemon=True).start()
    task = Task(
        part=asked["part"],
        device=asked["device"],
        tiny=asked["tiny"],
        out=Path(asked["out"]),
        scratch=Path(asked["scratch"]),
        seconds=asked["seconds"],
        text=tuple(map(Path, asked["text"])),
    )
    # A part that is about to be stopped says where it has got to.
    faulthandler.dump_traceback_later(max(0.1, task.seconds - _BEFORE_THE_LIMIT))
    module, _, function = asked["module"].partition(":")
    getattr(importlib.import_module(module), function or "run")(task)


def _end_with_the_suite() -> None:
    while os.read(0, 1):
        pass
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)  # Windows has no process groups


if __name__ == "__main__":
    main(sys.argv[1])
