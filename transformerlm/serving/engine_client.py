"""The web process's end of the engine: its queue, its streams, and an engine process that is restarted when it fails.

Texts beyond the slots wait here, not in the engine. So they survive it: when it dies, those that it had begun end with
`EngineGone`, and those that waited go to the next one. They end, too, if that one dies before it has loaded the model.

A process that does not answer, or that makes no token for `timeouts.stalled` while it has work, is killed. What
the engine itself does is in `engine_process`; nothing here needs torch.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from config.schemas import duration_seconds
from config.serve import ServeConfig
from transformerlm.serving.engine import (
    EngineGone,
    EngineStatus,
    ModelFacts,
    Piece,
    QueueFull,
    RequestRefused,
    State,
    StepReport,
    TextRequest,
    UnknownCheckpoint,
)
from transformerlm.serving.engine_link import COMMAND, EngineLink
from transformerlm.serving.protocol import Ask, Refused, Settings, Told

_log = logging.getLogger(__name__)

# A process that dies sooner than this after it was ready counts as one that dies again and again.
_STEADY_SECONDS = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_LONGEST_RETRY = 60


class EngineClient:
    """An `Engine` in a process of its own; all methods are called on the thread of one event loop.

    `checkpoint` is what `ServeConfig.checkpoint` names: a run, `RUN/best`, or a checkpoint's directory. `on_event` gets
    one dict for each event: `reloaded`, `checkpoint_skipped` and `engine_restarted`. `command` starts the process.
    """

    def __init__(self, config: ServeConfig, checkpoint: Path, *, command: Sequence[str] = COMMAND) -> None:
        self.on_event: Callable[[dict[str, Any]], None] = lambda event: None
        self._config, self._checkpoint, self._command = config, checkpoint, command
        self._stalled_seconds = duration_seconds(config.timeouts.stalled)
        self._state: State = "loading"
        self._is_draining, self._is_closed = False, False
        self._facts: ModelFacts | None = None
        self._names: list[str] = []
        self._queue: dict[str, Text] = {}  # waiting here, the oldest first
        self._queued_tokens = 0
        self._sent: dict[str, Text] = {}  # each has a slot of the engine
        self._link: EngineLink | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._started: asyncio.Future[None] | None = None
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._watchers: list[Callable[[StepReport], None]] = []
        self._restarts, self._reloads = 0, 0
        self._last_token: float | None = None
        self._quiet = 0.0  # seconds without a sign that the engine works
        self._mean_seconds = 1.0  # of a text, from slot to end
        self._failed: str | None = None  # the last words of the process

    # --- what the routes use ---------------------------------------------------------------------------------------

    @property
    def status(self) -> EngineStatus:
        """How the engine does now."""
        age = None if self._last_token is None else time.monotonic() - self._last_token
        return EngineStatus(
            state="draining" if self._is_closed or (self._is_draining and self._state != "dead") else self._state,
            facts=self._facts,
            running=len(self._sent),
            waiting=len(self._queue),
            slots=self._config.engine.slots,
            last_token_age_s=age,
            restarts=self._restarts,
            reloads=self._reloads,
        )

    def submit(self, requests: Sequence[TextRequest]) -> list[Text]:
        """Take all of these requests or none; return their streams, in order.

        Raises:
            QueueFull: there is no room for all of them.
            EngineGone: the engine makes no tokens now.
            UnknownCheckpoint: one names a checkpoint that is not there.
        """
        if self._is_draining or self._state != "ok":
            raise EngineGone(f"the engine makes no tokens now: it is {self.status.state}")
        for request in requests:
            assert request.request_id not in self._queue, request.request_id
            assert request.request_id not in self._sent, request.request_id
            if request.checkpoint and request.checkpoint not in self._names:
                raise UnknownCheckpoint(f"expected a checkpoint that the run keeps, found {request.checkpoint[:80]!r}")
        self._check_room(requests)
        texts = [Text(request, self) for request in requests]
        self._queue |= {text.request.request_id: text for text in texts}
        self._queued_tokens += sum(len(request.prompt) for request in requests)
        self._feed()
        return texts

    def cancel(self, text: Text) -> None:
        """Free a text's slot, or its place in the queue; its last piece says `cancelled`."""
        request_id = text.request.request_id
        if self._queue.get(request_id) is text:
            self._leave_queue(request_id)
            text.add(Piece(finish="cancelled"))
            self._note_idle()
        elif self._sent.get(request_id) is text and self._link is not None:
            self._link.send(Ask(cancel=[request_id]))

    def subscribe(self, watch: Callable[[StepReport], None]) -> None:
        """Call `watch` after each step."""
        self._watchers.append(watch)

    def checkpoints(self) -> list[str]:
        """Return the names of the run's checkpoints that can be asked for, newest first."""
        return list(self._names)

    async def start(self) -> None:
        """Start the engine's process; return when it has loaded the model.

        Where a run is followed that has no checkpoint yet, this waits for its first one.

        Raises:
            ValueError: the checkpoint cannot be served; the message is the process's own.
        """
        assert self._supervisor is None, "started twice"
        self._started = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(), name="engine")
        await asyncio.shield(self._started)

    async def drain(self, seconds: float) -> bool:
        """Take no more requests and wait until those running and waiting have ended; return whether all did in time."""
        self._is_draining = True
        try:
            await asyncio.wait_for(self._is_idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End the process; texts that have not ended raise EngineGone."""
        self._is_closed = True
        if self._supervisor is not None:
            self._supervisor.cancel()
            with suppress(asyncio.CancelledError):
                await self._supervisor
        self._state = "dead"
        self._fail([*self._sent.values(), *self._queue.values()], "the server stops")
        if self._started is not None and not self._started.done():
            self._cannot_start(EngineGone("the server stops"))

    # --- the queue -------------------------------------------------------------------------------------------------

    def _check_room(self, requests: Sequence[TextRequest]) -> None:
        limits = self._config.limits
        free = max(0, self._config.engine.slots - len(self._sent) - len(self._queue))
        waiting = len(self._queue) + max(0, len(requests) - free)
        if waiting > limits.waiting:
            raise QueueFull(f"expected at most {limits.waiting} waiting texts, found {waiting}", self._retry(waiting))
        tokens = self._queued_tokens + sum(len(request.prompt) for request in requests[free:])
        if tokens > limits.waiting_tokens:
            message = f"expected at most {limits.waiting_tokens} waiting prompt tokens, found {tokens}"
            raise QueueFull(message, self._retry(waiting))

    def _retry(self, waiting: int) -> int:
        """Return after how many seconds a slot may be free for one more: those before it, at the pace of late."""
        rounds = waiting / self._config.engine.slots
        return max(1, min(_LONGEST_RETRY, math.ceil(rounds * self._mean_seconds)))

    def _leave_queue(self, request_id: str) -> Text:
        text = self._queue.pop(request_id)
        self._queued_tokens -= len(text.request.prompt)
        return text

    def _feed(self) -> None:
        """Send waiting texts to the engine, the oldest first, while it has free slots."""
        self._note_idle()
        if self._link is None or self._state != "ok":
            return
        batch: list[TextRequest] = []
        while self._queue and len(self._sent) < self._config.engine.slots:
            text = self._leave_queue(next(iter(self._queue)))
            text.sent_at = time.monotonic()
            text.queue_seconds = text.sent_at - text.asked_at
            self._sent[text.request.request_id] = text
            batch.append(text.request)
        if batch:
            self._link.send(Ask(submit=batch))

    def _note_idle(self) -> None:
        if self._sent or self._queue:
            self._is_idle.clear()
        else:
            self._is_idle.set()

    def _fail(self, texts: Sequence[Text], reason: str) -> None:
        for text in texts:
            if self._sent.pop(text.request.request_id, None) is None:
                self._leave_queue(text.request.request_id)
            text.fail(EngineGone(reason))
        self._note_idle()

    # --- what the process tells ------------------------------------------------------------------------------------

    def _receive(self, told: Told) -> None:
        if told.checkpoints is not None:
            self._names = told.checkpoints
        if told.serving is not None:
            self._take_over(told.serving)
        if told.report is not None:
            self._take_report(told.report)
        for request_id, piece in told.pieces:
            self._take_piece(request_id, piece)
        for refused in told.refused:
            self._take_refusal(refused)
        for skipped in told.skipped:
            _log.warning("%s is not taken over: %s", skipped.checkpoint, skipped.reason)
            self._tell("checkpoint_skipped", checkpoint=skipped.checkpoint, reason=skipped.reason)
        if told.note is not None:
            _log.warning("%s", told.note)
        if told.pong is not None and (told.is_loading or not self._sent):
            self._note_alive()
        self._failed = told.failed or self._failed
        self._feed()

    def _take_over(self, facts: ModelFacts) -> None:
        is_other = self._facts is not None and self._facts.fingerprint != facts.fingerprint
        self._facts, self._state = facts, "ok"
        self._note_alive()
        if self._started is not None and not self._started.done():
            self._started.set_result(None)
        if is_other:
            self._reloads += 1
            self._tell(
                "reloaded",
                checkpoint=facts.checkpoint,
                step=facts.step,
                val_loss=facts.val_loss,
                fingerprint=facts.fingerprint,
            )

    def _take_report(self, report: StepReport) -> None:
        if report.generated_tokens or report.prompt_tokens or report.read_again_tokens:
            self._note_alive()
        if report.generated_tokens:
            self._last_token = time.monotonic()
        for watch in self._watchers:
            watch(report)

    def _take_piece(self, request_id: str, piece: Piece) -> None:
        text = self._sent.get(request_id)
        if text is None:
            return
        text.add(piece)
        if piece.finish:
            del self._sent[request_id]
            self._mean_seconds += (time.monotonic() - text.sent_at - self._mean_seconds) / 16

    def _take_refusal(self, refused: Refused) -> None:
        text = self._sent.pop(refused.request_id, None)
        if text is None:
            return
        if refused.is_for_now:
            text.fail(EngineGone(refused.reason))
        elif refused.is_checkpoint:
            text.fail(UnknownCheckpoint(refused.reason))
        else:
            _log.warning("a request was refused: %s", refused.reason)
            text.fail(RequestRefused(refused.reason))

    def _note_alive(self) -> None:
        self._quiet = 0.0
        if self._state == "stalled":
            self._state = "ok"

    def _tell(self, event: str, **values: Any) -> None:
        self.on_event({"event": event, **values})

    # --- the process's life ----------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        """Run one engine process after the other until `close`, or until the first one cannot start."""
        deaths = 0
        while True:
            began = time.monotonic()
            reason = await self._run_process()
            was_ready, self._state = self._state != "loading", "dead"
            assert self._started is not None
            if not self._started.done():
                self._cannot_start(ValueError(reason))
                return
            self._fail(list(self._sent.values()), reason)
            if not was_ready:  # the second death in a row: what waited has waited for both
                self._fail(list(self._queue.values()), reason)
            is_steady = was_ready and time.monotonic() - began > _STEADY_SECONDS
            deaths = 1 if is_steady else deaths + 1
            pause = 0.0 if deaths == 1 else min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (deaths - 2))
            _log.warning("%s; it is started again%s", reason, f" in {pause:g} s" if pause else "")
            await asyncio.sleep(pause)
            self._restarts += 1
            self._tell("engine_restarted", reason=reason, restarts=self._restarts)

    def _cannot_start(self, error: Exception) -> None:
        assert self._started is not None
        self._started.set_exception(error)
        self._started.exception()  # else asyncio complains where nobody waits for the start any more

    async def _run_process(self) -> str:
        """Run one process to its end; return why it ended."""
        self._state, self._failed, self._quiet = "loading", None, 0.0
        try:
            link = await EngineLink.start(self._settings(), self._command)
        except OSError as error:
            return f"the engine's process cannot be started: {error}"
        self._link = link
        watchdog = asyncio.create_task(self._watch(link), name="engine-watch")
        try:
            async for told in link:
                self._receive(told)
                if told.report is not None:
                    link.send(Ask(taken=1))
            return self._failed or await link.reason()
        except Exception as error:  # a line that is not of the protocol, or an error of ours, which must not hang all
            if not isinstance(error, ValueError):
                _log.exception("while taking what the engine told")
            return f"what the engine told cannot be used: {type(error).__name__}: {error}"
        finally:
            self._link = None
            watchdog.cancel()
            await link.close()

    async def _watch(self, link: EngineLink) -> None:
        """Say `stalled` of a process that shows no sign of work for `timeouts.stalled`, and kill it a little later."""
        tick = min(1.0, self._stalled_seconds / 4)
        number, last = 0, time.monotonic()
        while True:
            await asyncio.sleep(tick)
            now = time.monotonic()
            # At most two ticks: this process may itself have been stopped, or busy.
            self._quiet += min(now - last, 2 * tick)
            last, number = now, number + 1
            if self._state == "loading":  # which may take as long as a run has no checkpoint
                self._quiet = 0.0
                continue
            if self._quiet > self._stalled_seconds + 2 * tick:
                self._failed = f"the engine made no token for {self._stalled_seconds:g} s and was ended"
                link.kill()
                return
            if self._quiet > self._stalled_seconds:
                self._state = "stalled"
            link.send(Ask(ping=number))

    def _settings(self) -> Settings:
        """Return what the process is started with: after a death, the checkpoint that was served, if it is there."""
        config, checkpoint = self._config, self._checkpoint
        if config.follow.checkpoint == "none" and self._facts is not None and Path(self._facts.path).is_dir():
            checkpoint = Path(self._facts.path)
        return Settings(
            checkpoint=str(checkpoint),
            device=config.device,
            precision=config.precision,
            threads=config.threads,
            slots=config.engine.slots,
            prefill_chunk=config.engine.prefill_chunk,
            prefix_cache_mb=config.engine.prefix_cache_mb,
            reproducible=config.engine.reproducible,
            follow=config.follow.checkpoint,
            interval=duration_seconds(config.follow.interval),
            earlier=self._facts,
        )


class Text:
    """The stream of one text: its pieces, in order, as an asynchronous iterator.

    Iterating raises EngineGone if the engine dies before the last piece, UnknownCheckpoint if the checkpoint that the
    request names cannot be used, and RequestRefused if the engine cannot do what it asks.
    """

    def __init__(self, request: TextRequest, client: EngineClient) -> None:
        self.request, self.asked_at, self.sent_at = request, time.monotonic(), 0.0
        self.queue_seconds = 0.0
        self._client = client
        self._pieces: deque[Piece] = deque()
        self._error: Exception | None = None
        self._has_ended = False
        self._news = asyncio.Event()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        while not self._pieces:
            if self._error is not None:
                raise self._error
            if self._has_ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._pieces.popleft()

    def take_ready(self) -> list[Piece]:
        """Return the pieces that have come already, without waiting; iterating does not give them again."""
        ready = list(self._pieces)
        self._pieces.clear()
        return ready

    def cancel(self) -> None:
        """Free the slot, or the place in the queue; nothing happens where the text has ended."""
        self._client.cancel(self)

    def add(self, piece: Piece) -> None:
        """Take one more piece."""
        self._pieces.append(piece)
        self._has_ended = bool(piece.finish)
        self._news.set()

    def fail(self, error: Exception) -> None:
        """End the text with an error, once its pieces have been read."""
        self._error = error
        self._news.set()
