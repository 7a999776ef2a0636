"""Weights & Biases, kept at arm's length: everything that may wait for a network happens in one daemon thread.

The run hands over plain records and never waits for W&B but twice, both times bounded: briefly at the start, so that a
wrong key is reported while somebody still looks, and at the end, so that the last lines are uploaded. `wandb` itself is
imported only when this logger is built.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from logger.base import Logger

_log = logging.getLogger(__name__)

# One thing to do with the live run, in the order in which the caller asked for it.
_Task = Callable[[ModuleType, Any], None]


class WandbLogger(Logger):
    """Sends records and artifacts to one W&B run.

    While W&B is slow or still starting, up to `queue_size` records wait; then the oldest are dropped and counted. The
    first exception from W&B is reported once on stderr (by `logging`) and ends its part in the run. `run_id` is chosen
    here unless given, so that a checkpoint can hold it before the network has answered; giving it again continues the
    W&B run. Raises ValueError when the package is missing.
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
        wandb = _import_wandb()
        self._run_id = run_id or secrets.token_hex(4)
        self._close_timeout = close_timeout
        self._queue_size = queue_size
        self._tasks: deque[_Task] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._dropped = 0
        self._started = threading.Event()
        self._ended = threading.Event()
        options: dict[str, Any] = {
            "id": self._run_id,
            "resume": "allow",
            "name": run_name,
            "project": project,
            "entity": entity,
            "config": dict(config or {}),
            "tags": list(tags),
            "settings": _settings(wandb, init_timeout=init_timeout, close_timeout=close_timeout),
        }
        threading.Thread(target=self._work, args=(wandb, options), name="wandb-logger", daemon=True).start()
        if not self._started.wait(init_timeout):
            _log.warning("W&B has not answered within %g s: the run goes on and its lines wait", init_timeout)

    @property
    def run_id(self) -> str:
        """The W&B run id; the same id continues the same W&B run after a resume."""
        return self._run_id

    def write(self, record: Mapping[str, Any]) -> None:
        """Hand one record over and return at once."""
        kept = dict(record)
        self._add(lambda wandb, run: run.log(kept))

    def log_artifact(self, path: str | os.PathLike[str], *, name: str, type: str) -> None:
        """Hand a file or directory over and return at once; one that is gone by then is reported and left out."""
        self._add(lambda wandb, run: _upload(wandb, run, Path(path), name=name, type=type))

    def close(self) -> None:
        """Let W&B finish within `close_timeout` seconds, then leave it behind."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if not self._ended.wait(self._close_timeout):
            _log.warning("W&B has not finished within %g s: its last lines may be missing there", self._close_timeout)
        if self._dropped:
            _log.warning("W&B was too slow: %d records were dropped", self._dropped)

    def _add(self, task: _Task) -> None:
        with self._changed:
            if self._closing or self._ended.is_set():
                return
            if len(self._tasks) >= self._queue_size:
                self._tasks.popleft()
                self._dropped += 1
            self._tasks.append(task)
            self._changed.notify()

    def _work(self, wandb: ModuleType, options: Mapping[str, Any]) -> None:
        """Start the W&B run, do what is asked of it, finish it; the body of the thread."""
        try:
            run = wandb.init(**options)
            run.define_metric("*", step_metric="step")
            self._started.set()
            while (task := self._next()) is not None:
                task(wandb, run)
            run.finish()
        except BaseException as error:  # wandb.init turns some failures into SystemExit or KeyboardInterrupt
            _log.warning("W&B failed, the run goes on without it: %s: %s", type(error).__name__, error)
        finally:
            self._ended.set()
            self._started.set()
            with self._changed:
                self._tasks.clear()

    def _next(self) -> _Task | None:
        with self._changed:
            self._changed.wait_for(lambda: self._tasks or self._closing)
            return self._tasks.popleft() if self._tasks else None


def _import_wandb() -> ModuleType:
    missing = 'wandb is not installed: pip install "transformerlm[wandb]"'
    try:
        import wandb
    except ImportError as error:
        raise ValueError(missing) from error
    # The folder `wandb/` that offline runs leave behind can be imported too, as an empty namespace package.
    if not hasattr(wandb, "init"):
        raise ValueError(missing)
    return wandb


def _settings(wandb: ModuleType, *, init_timeout: float, close_timeout: float) -> dict[str, Any]:
    """Return the settings that bound W&B's own waiting, as far as the installed version knows them."""
    known = getattr(getattr(wandb, "Settings", None), "model_fields", {})
    wanted = {
        "console": "off",  # it would replace sys.stdout from another thread
        "login_timeout": init_timeout,  # the question for a key on a terminal
        "finish_timeout": close_timeout,  # also bounds what wandb does when the interpreter exits
    }
    return {key: value for key, value in wanted.items() if key in known}


def _upload(wandb: ModuleType, run: Any, path: Path, *, name: str, type: str) -> None:
    if not path.exists():
        _log.warning("W&B: %s is gone before it could be uploaded as %s", path, name)
        return
    artifact = wandb.Artifact(name=name, type=type)
    if path.is_dir():
        artifact.add_dir(str(path))
    else:
        artifact.add_file(str(path))
    run.log_artifact(artifact)
