"""The engine: a process that makes texts for the web process, its parent. `engine_client` is its other end.

It reads `protocol` lines from stdin and writes them to stdout; what anything in it prints goes to stderr. It ends when
its stdin does, so it never outlives its parent, however that ended. Signals to end are for the parent, which
decides what becomes of the texts.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from queue import SimpleQueue
from typing import BinaryIO

from transformerlm.serving.protocol import ASK, SETTINGS, TOLD, Settings, Told
from transformerlm.utils.strings import in_words
from transformerlm.utils.threads import wait_politely


def main() -> None:
    """Serve the requests on stdin until it ends."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    settings = SETTINGS.decode(sys.stdin.buffer.readline())
    inbox: SimpleQueue[object] = SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, inbox), name="engine-stdin", daemon=True).start()
    wait_politely()  # before torch is imported
    try:
        _serve(settings, inbox, answers)
    except BrokenPipeError:  # nobody reads any more
        os._exit(0)
    except Exception as error:
        if not (isinstance(error, ValueError | OSError) or _is_of_memory(error)):  # for the user; others are for us
            traceback.print_exc()
        _write(answers, Told(failed=_in_one_line(error)))
        os._exit(1)


def _read(lines: BinaryIO, inbox: SimpleQueue[object]) -> None:
    """Pass on what is asked; when nobody can ask any more, end the process, whatever it does at the time."""
    for line in lines:
        try:
            inbox.put(ASK.decode(line))
        except ValueError as error:
            inbox.put(error)
    os._exit(0)


def _serve(settings: Settings, inbox: SimpleQueue[object], answers: BinaryIO) -> None:
    import torch

    from transformerlm.serving.engine_loop import EngineLoop

    threads = 1 if settings.threads is None and settings.follow != "none" else settings.threads
    if threads is not None:
        torch.set_num_threads(threads)
    EngineLoop(settings, inbox, lambda told: _write(answers, told)).run()


def _write(answers: BinaryIO, told: Told) -> None:
    answers.write(TOLD.encode(told))
    answers.flush()


def _in_one_line(error: Exception) -> str:
    """Return an error as a user reads it, in one line."""
    text = in_words(error)
    if _is_of_memory(error):
        return f"the engine has too little memory: {text}; fewer engine.slots or another precision need less"
    return text if isinstance(error, ValueError | OSError) else f"the engine failed: {type(error).__name__}: {text}"


def _is_of_memory(error: Exception) -> bool:
    """Return whether there was too little memory; torch says so in a RuntimeError, on a CPU in its text alone."""
    return isinstance(error, MemoryError) or ("memory" in str(error) and isinstance(error, RuntimeError))


if __name__ == "__main__":
    main()
