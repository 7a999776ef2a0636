"""Weights & Biases, kept at arm's length: `wandb` runs in a process of its own, which can be abandoned.

In our own process, W&B without a network would delay the interpreter's exit for as long as it likes (measured: 90 s),
replace `sys.stdout` and `sys.excepthook`, and share the interpreter lock. Here the run passes on plain records and
waits twice, each time for a limited time: at the start, so that a wrong key is reported while somebody is still
looking, and at the end.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from config.extras import require_extra
from logger.base import Logger

_log = logging.getLogger(__name__)
_MOST_CHARACTERS = 128  # in the name of an artifact


class WandbLogger(Logger):
    """Sends records and artifacts to one W&B run.

    While W&B is slow or still starting, up to `queue_size` records wait; beyond that the oldest are dropped and
    counted. The first failure of W&B is reported once on stderr (by `logging`) and ends its part in the run. `run_id`
    is chosen here unless given, so that a checkpoint can hold it before the network has answered; passing it again
    continues the W&B run. Raises ValueError if the package is missing.
    """

    def __init__(
        self,
        *,
        run_name: str,
        project: str | None = None,
        entity: str | None = None,
        run_id: str | None = None,
        config: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        init_timeout: float = 5.0,
        close_timeout: float = 10.0,
        queue_size: int = 10_000,
    ) -> None:
        require_extra("wandb")
        self._run_id = run_id or secrets.token_hex(4)
        self._close_timeout = close_timeout
        self._queue_size = queue_size
        self._dropped = 0
        self._closing = False
        self._changed = threading.Condition()
        self._answered = threading.Event()
        self._ended = threading.Event()
        options = {
            "id": self._run_id,
            "resume": "allow",
            "name": run_name,
            "project": project,
            "entity": entity,
            "config": dict(config or {}),
            "tags": list(tags),
        }
        self._lines: deque[bytes] = deque()
        self._process = _start_process()
        first = {"init": options, "settings": _settings(init_timeout), "finish_limit": 6 * close_timeout}
        threading.Thread(target=self._send, args=(_encode(first),), name="wandb-send", daemon=True).start()
        threading.Thread(target=self._listen, name="wandb-listen", daemon=True).start()
        if not self._answered.wait(init_timeout):
            _log.warning("W&B has not answered within %g s: the run goes on and its lines wait", init_timeout)

    @property
    def run_id(self) -> str:
        """The W&B run id; the same id continues the same W&B run after a resume."""
        return self._run_id

    def write(self, record: Mapping[str, Any]) -> None:
        """Pass one record on and return at once."""
        self._add({"log": dict(record)})

    def log_artifact(self, path: str | os.PathLike[str], *, name: str, type: str) -> None:
        """Pass a file or directory on and return at once; one that no longer exists by then is reported and skipped.

        Characters of `name` that W&B refuses become dashes, and the beginning of a long name is cut off.
        """
        name = re.sub(r"[^a-zA-Z0-9_.-]", "-", name)[-_MOST_CHARACTERS:]
        self._add({"artifact": {"path": str(Path(path).resolve()), "name": name, "type": type}})

    def close(self) -> None:
        """Let W&B finish within `close_timeout` seconds, then end its process."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if not self._ended.wait(self._close_timeout):
            _log.warning("W&B has not finished within %g s: its last lines are missing there", self._close_timeout)
            _kill(self._process)
        self._process.wait()
        if self._dropped:
            _log.warning("W&B was too slow: %d records were dropped", self._dropped)

    def _add(self, request: Mapping[str, Any]) -> None:
        with self._changed:
            if self._closing or self._ended.is_set():
                return
            if len(self._lines) >= self._queue_size:
                self._lines.popleft()
                self._dropped += 1
            self._lines.append(_encode(request))
            self._changed.notify()

    def _send(self, first: bytes) -> None:
        """Write the queue to the process, which may be slow; the body of a thread."""
        assert self._process.stdin is not None
        line: bytes | None = first
        try:
            while line is not None:
                self._process.stdin.write(line)
                self._process.stdin.flush()
                line = self._next()
            self._process.stdin.close()
        except OSError:  # the process has ended: `_listen` says why
            return

    def _next(self) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._closing)
            return self._lines.popleft() if self._lines else None

    def _listen(self) -> None:
        """Report what the process answers until it ends; the body of a thread."""
        assert self._process.stdout is not None
        failed = False
        for line in self._process.stdout:
            answer = json.loads(line)
            if "failed" in answer:
                failed = True
                _log.warning("W&B failed, the run goes on without it: %s", answer["failed"])
            elif "note" in answer:
                _log.warning("W&B: %s", answer["note"])
            self._answered.set()
        if not failed and not self._closing:
            _log.warning("W&B failed, the run goes on without it: its process ended unexpectedly")
        self._ended.set()
        self._answered.set()


def _start_process() -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("wandb_process.py")
    return subprocess.Popen(
        [sys.executable, "-P", str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Ctrl-C is for the run, which then finishes W&B properly.
        start_new_session=True,
    )


def _settings(init_timeout: float) -> dict[str, Any]:
    """Return W&B settings; the process omits those that its version does not know."""
    return {
        "console": "off",
        "login_timeout": init_timeout,  # the question for a key on a terminal
        "x_stats_pid": os.getpid(),  # measure the run, not the process that reports it
        "program": sys.argv[0],
    }


def _kill(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        process.kill()
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)  # the session it leads, W&B's own helper included
    except ProcessLookupError:
        return


def _encode(request: Mapping[str, Any]) -> bytes:
    return json.dumps(request, default=str).encode() + b"\n"
