"""The loop of the engine process: take what is asked, make a step of all texts, tell what came of it.

Checkpoints are loaded by a thread beside the loop, so texts go on meanwhile. The one that is served is where new
requests go; texts that run end on the checkpoint on which they began. Beside these there is at most one more, for
requests that name it: those that name a third wait until the texts of the second have ended, in the order in which they
came.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from transformerlm.serving.checkpoint_loader import CannotOpen, CheckpointLoader, Opened
from transformerlm.serving.engine import Piece, TextRequest
from transformerlm.serving.protocol import FEW_PIECES, MOST_UNTAKEN, Ask, Refused, Settings, Told
from transformerlm.serving.served_model import ServedModel, failed_piece

_MOST_OLD = 4


class EngineLoop:
    """Serves what comes into `inbox`, and tells each step by `tell`."""

    def __init__(self, settings: Settings, inbox: SimpleQueue[object], tell: Callable[[Told], None]) -> None:
        self._inbox, self._tell = inbox, tell
        self._loader = CheckpointLoader(settings, tell=tell, put=inbox.put, may_take_over=self._has_room)
        self._served = self._loader.first()
        self._named: ServedModel | None = None  # the last one that requests have named
        self._old: list[ServedModel] = []  # that were served; only texts that name these begin on them
        self._pending: dict[str, list[TextRequest]] = {}  # until the checkpoint that they name has its turn
        self._loading = ""  # the name that the loader was given
        self._untaken: deque[int] = deque()  # steps on their way to the web process, by their numbers of pieces

    def run(self) -> None:
        """Serve until the process ends."""
        self._tell(Told(serving=self._served.facts, checkpoints=self._loader.names()))
        self._loader.start()
        gc.freeze()  # to look at all that was loaded for garbage takes a tenth of a second, for which texts would wait
        while True:
            self._take_all()
            self._step()
            self._old = [model for model in self._old if not model.is_idle]
            self._open_next()

    def _models(self) -> list[ServedModel]:
        return [self._served, *([] if self._named is None else [self._named]), *self._old]

    def _take_all(self) -> None:
        """Take what has come; wait for it with nothing to do, and while too many steps are on their way."""
        is_idle = all(model.is_idle for model in self._models())
        while True:
            try:
                message = self._inbox.get(block=is_idle or self._is_ahead)
            except Empty:
                return
            is_idle = False
            if isinstance(message, Ask):
                self._take_ask(message)
            elif isinstance(message, Opened):
                self._take_opened(message)
            elif isinstance(message, CannotOpen):
                self._refuse(message)
            elif isinstance(message, Exception):  # of another thread
                raise message

    @property
    def _is_ahead(self) -> bool:
        return len(self._untaken) >= MOST_UNTAKEN or sum(self._untaken) > FEW_PIECES

    def _step(self) -> None:
        for model in self._models():
            if not model.is_idle:
                pieces, report = model.step()
                self._untaken.append(len(pieces))
                self._tell(Told(pieces=pieces, report=report))

    # --- what is asked ---------------------------------------------------------------------------------------------

    def _take_ask(self, ask: Ask) -> None:
        for _ in range(ask.taken):
            self._untaken.popleft()
        for request in ask.submit:
            self._submit(request)
        for request_id in ask.cancel:
            self._cancel(request_id)
        if ask.ping is not None:
            self._tell(Told(pong=ask.ping, is_loading=bool(self._loading)))

    def _submit(self, request: TextRequest) -> None:
        if not request.checkpoint or self._is(self._served, request.checkpoint):
            self._start(self._served, request)
        else:
            self._pending.setdefault(request.checkpoint, []).append(request)
            if len(self._pending) == 1 and self._named is not None and self._is(self._named, request.checkpoint):
                self._begin(self._named)

    def _open_next(self) -> None:
        """Begin what has waited longest: at once if its model is here, else when that of other requests is idle."""
        if self._loading or not self._pending:
            return
        name, may_turn = next(iter(self._pending)), self._named is None or self._named.is_idle
        known = next((model for model in self._models() if self._is(model, name)), None)
        if known is not None:
            if known in self._old and may_turn:  # it was served before, and is needed again
                self._old.remove(known)
                self._named = known
            if known not in self._old or self._has_room():  # old ones that never end would stop following
                self._begin(known)
        elif may_turn:
            self._named = None  # it goes first, so that there is room
            self._loading = name
            self._loader.ask(name)

    def _begin(self, model: ServedModel) -> None:
        """Begin the texts that wait for a model."""
        for request in self._pending.pop(model.facts.checkpoint, []):
            self._start(model, request)

    @staticmethod
    def _is(model: ServedModel, name: str) -> bool:
        """Return whether a model is what a checkpoint's name means now: a run that began anew writes it again."""
        return model.facts.checkpoint == name and not model.is_replaced()

    def _start(self, model: ServedModel, request: TextRequest) -> None:
        try:
            model.start(request)
        except ValueError as error:
            self._tell(Told(refused=[Refused(request_id=request.request_id, reason=str(error))]))
        except Exception as error:  # the batcher takes a request last of all, so it has nothing of this one
            self._tell(Told(pieces=[(request.request_id, failed_piece(error))]))

    def _cancel(self, request_id: str) -> None:
        for model in self._models():
            model.cancel(request_id)
        for requests in self._pending.values():
            for request in [each for each in requests if each.request_id == request_id]:
                requests.remove(request)
                self._tell(Told(pieces=[(request_id, Piece(finish="cancelled"))]))
        self._pending = {name: requests for name, requests in self._pending.items() if requests}

    # --- what was loaded -------------------------------------------------------------------------------------------

    def _take_opened(self, opened: Opened) -> None:
        if opened.is_served:
            self._retire(self._served)
            self._served = opened.model
            self._tell(Told(serving=opened.model.facts))
            if self._named is not None and self._is(self._named, opened.model.facts.checkpoint):
                self._retire(self._named)
                self._named = None
        else:
            self._named, self._loading = opened.model, ""
        self._begin(opened.model)

    def _has_room(self) -> bool:
        """Return whether one more model may be taken over; texts that take long keep those on which they began."""
        return len(self._old) < _MOST_OLD

    def _retire(self, model: ServedModel) -> None:
        """Keep a model until its texts have ended, and of its memory what they need."""
        model.forget_prefixes()
        self._old.append(model)

    def _refuse(self, cannot: CannotOpen) -> None:
        self._loading = ""
        why: dict[str, Any] = {"reason": cannot.reason, "is_checkpoint": True, "is_for_now": cannot.is_for_now}
        requests = self._pending.pop(cannot.name, [])
        refused = [Refused(request_id=request.request_id, **why) for request in requests]
        if refused:
            self._tell(Told(refused=refused))
