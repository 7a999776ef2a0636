"""The thread that loads checkpoints beside the engine's loop: those to take over, and those that requests name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Literal, cast

from config.errors import ConfigError
from transformerlm.checkpoints.directory import list_checkpoints
from transformerlm.checkpoints.validation import CheckpointError, CheckpointUnreadableError
from transformerlm.serving.engine import ModelFacts
from transformerlm.serving.following import CheckpointNotNowError, Following, checkpoints_of
from transformerlm.serving.protocol import Settings, Skipped, Told
from transformerlm.serving.served_model import ServedModel


@dataclass(frozen=True)
class Opened:
    """A checkpoint was loaded: to be served from now on, or since a request names it."""

    model: ServedModel
    is_served: bool


@dataclass(frozen=True)
class CannotOpen:
    """A checkpoint that a request names cannot be used."""

    name: str
    reason: str
    is_for_now: bool = False
    """Whether it may be used another time."""


class CheckpointLoader:
    """Loads the first checkpoint, and then, in a thread, more of the same run.

    Args:
        settings: those of the process.
        tell: is told, by any thread, which names there are and which checkpoints are skipped.
        put: takes each `Opened` and `CannotOpen`, and an exception that ends the thread.
        may_take_over: says whether there is room for one more model beside those whose texts have not ended.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        tell: Callable[[Told], None],
        put: Callable[[object], None],
        may_take_over: Callable[[], bool],
    ) -> None:
        self._settings, self._tell, self._put, self._may_take_over = settings, tell, put, may_take_over
        self._path = Path(settings.checkpoint)
        self._asked: SimpleQueue[str] = SimpleQueue()
        self._served: ServedModel | None = None
        self._like = settings.earlier  # its tokenizer and context are those for which requests are prepared
        self._root: Path | None = None
        self._following: Following[ServedModel] | None = None
        self._names: list[str] = []

    def first(self) -> ServedModel:
        """Return the model to begin with; where a run is followed that has no checkpoint yet, wait for one.

        Raises:
            ValueError: it cannot be served.
        """
        if self._settings.follow == "none":
            self._served = ServedModel(self._path, self._settings, prefix_cache_bytes=self._cache_bytes)
            if self._like is not None:
                _check_same_texts(self._like, self._served.facts)
            self._like = self._served.facts
            directory = Path(self._served.facts.path)
            self._root = directory.parent if directory in list_checkpoints(directory.parent) else None
        else:
            self._served = self._wait_for_first()
        self._names = self.names()
        return self._served

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="engine-loader", daemon=True).start()

    def ask(self, name: str) -> None:
        """Load one of `names` beside the one that is served."""
        self._asked.put(name)

    def names(self) -> list[str]:
        """Return the names of the checkpoints that can be asked for now, newest first."""
        assert self._served is not None
        served = self._served.facts.checkpoint
        found = [] if self._root is None else [directory.name for directory in list_checkpoints(self._root)]
        return found if served in found else [served, *found]

    @property
    def _cache_bytes(self) -> int:
        return self._settings.prefix_cache_mb * 10**6

    def _wait_for_first(self) -> ServedModel:
        self._root = checkpoints_of(self._path)
        if not self._root.parent.is_dir():
            raise ValueError(
                f"{self._root.parent}: no such run directory; name the one that transformerlm-train writes"
            )
        which = cast(Literal["newest", "best"], self._settings.follow)
        self._following = Following(self._root, which, load=self._load_to_serve, skip=self._skip)
        waits = False
        while (model := self._following.look()) is None:
            if not waits:
                first = "its first checkpoint" if self._like is None else "a checkpoint that can be served"
                self._tell(Told(note=f"{self._root.parent}: waiting for {first}"))
            waits = True
            time.sleep(self._settings.interval)
        return model

    def _skip(self, name: str, reason: str) -> None:
        self._tell(Told(skipped=[Skipped(checkpoint=name, reason=reason)]))

    # --- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            next_look = time.monotonic() + self._settings.interval
            while True:
                try:
                    self._open_named(self._asked.get(timeout=max(0.0, next_look - time.monotonic())))
                except Empty:
                    try:
                        self._look()
                    except OSError as error:  # a directory that is gone for a moment, as over a network
                        self._tell(Told(note=f"the run's checkpoints cannot be listed: {error}"))
                    next_look = time.monotonic() + self._settings.interval
        except Exception as error:
            self._put(error)

    def _look(self) -> None:
        model = self._following.look() if self._following is not None and self._may_take_over() else None
        if model is not None:
            self._served = model
            self._put(Opened(model, is_served=True))
        names = self.names()
        if names != self._names:
            self._names = names
            self._tell(Told(checkpoints=names))

    def _open_named(self, name: str) -> None:
        # Looked up, never joined: a name that is not in the list names no file.
        try:
            found = [] if self._root is None else [one for one in list_checkpoints(self._root) if one.name == name]
        except OSError as error:
            self._put(CannotOpen(name, f"the run's checkpoints cannot be listed: {error}", is_for_now=True))
            return
        if not found:
            self._put(CannotOpen(name, f"{name}: the run keeps this checkpoint no longer"))
            return
        try:
            model = self._load(found[0], prefix_cache_bytes=self._cache_bytes // 4)
        except CheckpointError as error:
            self._put(CannotOpen(name, str(error), is_for_now=isinstance(error, CheckpointNotNowError)))
        else:
            self._put(Opened(model, is_served=False))

    def _load_to_serve(self, directory: Path) -> ServedModel:
        model = self._load(directory, prefix_cache_bytes=self._cache_bytes)
        self._like = model.facts
        return model

    def _load(self, directory: Path, *, prefix_cache_bytes: int) -> ServedModel:
        """Return a checkpoint's model.

        Raises:
            CheckpointError: it is not there, damaged, or of another tokenizer or context than the requests.
            CheckpointNotNowError: it cannot be read, or there is too little memory for it.
        """
        try:
            model = ServedModel(directory, self._settings, prefix_cache_bytes=prefix_cache_bytes, earlier=self._served)
        except CheckpointError:
            raise
        except ConfigError as error:
            raise CheckpointError(f"{directory}: cannot be read: {error}") from None
        except CheckpointUnreadableError as error:
            raise CheckpointNotNowError(str(error)) from None
        except OSError as error:
            raise CheckpointNotNowError(f"{directory}: cannot be read: {error}") from None
        except Exception as error:  # whatever is wrong with one checkpoint must not end the texts of another
            if self._served is None:
                raise
            what = str(error) or type(error).__name__
            # Too little memory is a MemoryError, and with torch a RuntimeError, as most that passes by itself is.
            kind = CheckpointNotNowError if isinstance(error, MemoryError | RuntimeError) else CheckpointError
            raise kind(f"{directory}: cannot be loaded beside the one that is served: {what}") from None
        if self._like is not None:
            _check_same_texts(self._like, model.facts)
        return model


def _check_same_texts(served: ModelFacts, other: ModelFacts) -> None:
    """Refuse a checkpoint whose ids or context are not those for which the web process prepares requests.

    Raises:
        CheckpointError: says what differs.
    """
    name = other.checkpoint
    if other.tokenizer_sums != served.tokenizer_sums:
        raise CheckpointError(
            f"{name}: expected the tokenizer of {served.checkpoint}, found another; start the server anew with it"
        )
    if other.chat != served.chat:
        raise CheckpointError(
            f"{name}: expected the chat format of {served.checkpoint}, found another; start the server anew with it"
        )
    if other.context_length != served.context_length:
        raise CheckpointError(
            f"{name}: expected context_length {served.context_length}, as {served.checkpoint} has, found "
            f"{other.context_length}; start the server anew with it"
        )
