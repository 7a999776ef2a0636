"""uvicorn's HTTP/1.1 protocol with a time limit for headers, for bodies, and for clients that do not read.

uvicorn waits without end for each of these, so that a few hundred half-sent requests keep a server from all others
(encode/uvicorn#157). It also has no bound on the number of connections that only wait.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from transformerlm.serving.errors import ApiError

_LOOKS = 4  # a deadline is noticed this often within its time
_MOST_AHEAD = 1 << 16  # bytes of later requests that are read while one is answered
_LEAST_READ = 1 << 14  # bytes that a client reads within `write`, or all there are; a few now and then are no progress


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """Seconds until a request's headers and its body are complete, and until a client reads; most connections.

    Within `write` a client takes 16 KiB of what waits for it, or all of it.
    """

    headers: float
    body: float
    write: float
    connections: int


def protocol_of(deadlines: Deadlines, rejected: Callable[[str], None]) -> type[asyncio.Protocol]:
    """Return the protocol class that uvicorn is given as `http`; `rejected` is told the reason of each refusal."""

    class BoundDeadlineProtocol(DeadlineProtocol):
        """The protocol with these deadlines."""

        limits = deadlines
        tell_rejected = staticmethod(rejected)

    return BoundDeadlineProtocol


class _CountingTransport:
    """A transport that counts the bytes it is given; in all else it is the other one."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self._written = transport, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send bytes."""
        self._written += len(data)
        self._transport.write(data)

    def waiting(self) -> int:
        """Return how many bytes the client has not taken; those in the system's buffers count as taken."""
        return self._transport.get_write_buffer_size()

    def taken(self) -> int:
        """Return how many bytes it has taken."""
        return self._written - self.waiting()


class DeadlineProtocol(H11Protocol):
    """One connection."""

    limits: Deadlines
    tell_rejected: Callable[[str], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._state: object = h11.IDLE  # what the client has yet to send, in h11's words
        self._since: float | None = None  # when we began to wait for that; None: nothing of it has come, and need not
        self._has_bytes = False
        self._read_before, self._unread_since = 0, 0.0
        self._look: asyncio.TimerHandle | None = None

    # --- what asyncio calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, or refuse the connection where there are too many that are all busy."""
        self._counting = _CountingTransport(transport)  # type: ignore[arg-type]
        super().connection_made(self._counting)  # type: ignore[arg-type]
        self._since = self._unread_since = self._idle_since = self.loop.time()
        self._look_again()
        if len(self.connections) > self.limits.connections and not self._close_an_idle_one():
            self._refuse(ApiError(503, "too many connections (limits.connections)", code="too_many_connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes, and see whether something is complete now; a byte now and then is no progress."""
        was_idle = self._state is h11.IDLE
        super().data_received(data)
        # uvicorn reads no more while the next request waits, and would not see that the client leaves.
        if self.conn.their_state is h11.DONE and 0 < len(self.conn.trailing_data[0]) <= _MOST_AHEAD:
            self.flow.resume_reading()
        self._note_progress()
        # The rest of a body that was refused before is no beginning of a request.
        if self._state is h11.IDLE and (was_idle or self.conn.trailing_data[0]):
            self._has_bytes = True
            self._since = self.loop.time() if self._since is None else self._since

    # --- what uvicorn calls ---

    def on_response_complete(self) -> None:
        """Note the end of an answer; the time of the next request's headers begins with their first byte."""
        super().on_response_complete()
        self._note_progress()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP in the form of all other errors."""
        self._refuse(ApiError(400, msg, code="invalid_http"))

    # --- deadlines ---

    def _note_progress(self) -> None:
        state = self.conn.their_state
        if state is not self._state:
            self._state, self._has_bytes, self._idle_since = state, False, self.loop.time()
            self._since = self.loop.time() if state is h11.SEND_BODY else None

    def _look_again(self) -> None:
        limits = self.limits
        self._look = self.loop.call_later(min(limits.headers, limits.body, limits.write) / _LOOKS, self._check)

    def _check(self) -> None:
        now = self.loop.time()
        taken = self._counting.taken()
        if self._counting.waiting() == 0 or taken >= self._read_before + _LEAST_READ:
            self._read_before, self._unread_since = taken, now
        limit = self.limits.body if self._state is h11.SEND_BODY else self.limits.headers
        if now - self._unread_since > self.limits.write:
            self.transport.abort()
        elif self._since is not None and now - self._since > limit and not self.transport.is_closing():
            if self._state is h11.IDLE and not self._has_bytes:
                self.transport.close()  # nothing was asked, so nothing is answered
            else:
                what = "headers" if self._state is h11.IDLE else "body"
                self._refuse(ApiError(408, f"the request's {what} took longer than {limit:g} s", code="timeout"))
        self._look_again()

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error if nothing is answered yet, and close; a route that waits sees the client leave."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.tell_rejected(error.code or "invalid")
            data = json.dumps(error.body()).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(data))),
                ("connection", "close"),
            ]
            reason = STATUS_PHRASES[error.status]
            events = (h11.Response(status_code=error.status, headers=headers, reason=reason), h11.Data(data=data))
            for event in (*events, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _close_an_idle_one(self) -> bool:
        """Make room: close the connection that has waited longest for a request; return whether there was one."""
        mine = [one for one in self.connections if isinstance(one, DeadlineProtocol) and one is not self]
        idle = [one for one in mine if one.conn.their_state is h11.IDLE and not one.transport.is_closing()]
        if not idle:
            return False
        min(idle, key=lambda one: one._idle_since).transport.close()
        return True
