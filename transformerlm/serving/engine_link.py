"""One engine process, seen from the web process: how it starts, what goes to it and comes from it, how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Self

from transformerlm.serving.protocol import ASK, SETTINGS, TOLD, Ask, Settings, Told

# -P: do not import a folder called `config` from the working directory.
COMMAND = (sys.executable, "-P", "-m", "transformerlm.serving.engine_process")
_READ_BYTES = 1 << 16
_SECONDS_TO_END = 5.0
_SIGKILL = 9  # Windows has no such name


class EngineLink:
    """A running engine process; iterating gives what it tells until it ends.

    Its stderr is ours. It has a session of its own, so that neither Ctrl-C nor a signal to our group reaches it: we
    decide when it ends.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout

    @classmethod
    async def start(cls, settings: Settings, command: Sequence[str] = COMMAND) -> Self:
        """Start the process and send it the settings.

        Raises:
            OSError: it cannot be started.
        """
        pipe = asyncio.subprocess.PIPE
        # A `config.py` on PYTHONPATH would hide ours, as in this process, whose path is in order by now.
        path = {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
        link = cls(
            await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, env=os.environ | path, start_new_session=True
            )
        )
        link._stdin.write(SETTINGS.encode(settings))
        return link

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def send(self, ask: Ask) -> None:
        """Send one line; nothing happens where the process has ended, which the reader notices."""
        if not self._stdin.is_closing():
            self._stdin.write(ASK.encode(ask))

    async def __aiter__(self) -> AsyncIterator[Told]:
        """Yield what the process tells until it ends.

        Raises:
            ValueError: a line is not one of `protocol`.
        """
        rest: list[bytes] = []  # of a line that has not ended; a line of log-probabilities may have megabytes
        while chunk := await self._stdout.read(_READ_BYTES):
            *lines, last = chunk.split(b"\n")
            for line in lines:
                yield TOLD.decode(b"".join([*rest, line]))
                rest = []
            rest.append(last)

    def kill(self) -> None:
        """End the process at once."""
        if self._process.returncode is not None:
            return
        if sys.platform == "win32":
            self._process.kill()
            return
        # Popen's own `kill` first asks whether the process has ended; that takes its exit code away from asyncio.
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    async def close(self) -> None:
        """End the process, which has nothing to save; return when it has ended."""
        self._stdin.close()
        self.kill()
        # In Python 3.11 `wait` also waits for output that nobody reads any more.
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _SECONDS_TO_END)

    async def reason(self) -> str:
        """Return how the process ended, in words, once its output has ended."""
        try:
            code = await asyncio.wait_for(self._process.wait(), _SECONDS_TO_END)
        except TimeoutError:
            self.kill()
            return "the engine closed its output"
        if code == -_SIGKILL:
            return "the engine was killed (SIGKILL); the system does that when memory runs out"
        if code < 0:
            return f"the engine was ended by a signal ({signal.Signals(-code).name})"
        return f"the engine ended with exit code {code}"
