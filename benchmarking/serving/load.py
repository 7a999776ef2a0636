"""Clients of a server of completions, in a process of their own: they share no interpreter with what they measure.

    python -m benchmarking.serving.load

It reads a JSON object a line: `url`, `streams`, `requests`, the bodies to send, and `apart`, the seconds between the
beginnings of two connections. That many connections send them, each its next one as soon as it has its answer. It
writes a JSON object a line: what `Answers` holds.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

_TRIES = 2  # llama.cpp's server sometimes closes a connection that it has promised to keep


@dataclass
class Answers:
    """What the clients saw: seconds, and tokens as the server counted them."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    """From a request to the first event with text, for each text."""
    between: list[float] = field(default_factory=list)
    """Between two events of a text; a server sends one for each token, but for one that ends within a character none,
    unless ids are asked for: so one gap in a hundred may be two."""
    retries: int = 0


def main() -> None:
    """Serve one order after the other, until stdin ends."""
    for line in sys.stdin:
        answers = asyncio.run(send_all(**json.loads(line)))
        print(json.dumps(vars(answers)), flush=True)


async def send_all(url: str, requests: list[dict[str, Any]], *, streams: int, apart: float = 0.0) -> Answers:
    """Send all requests over `streams` connections, and return what came.

    Raises:
        ConnectionError: a connection was closed twice before its answer was complete.
        ValueError: an answer is an error.
    """
    answers, waiting = Answers(), deque(requests)
    clients = [_Client(url, answers) for _ in range(streams)]
    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client.send_while(waiting, number * apart) for number, client in enumerate(clients)))
    answers.seconds, answers.cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    return answers


class _Client(asyncio.Protocol):
    """One connection, which is kept between requests.

    It takes what comes in a callback: to wake a coroutine for each token takes more time from the server beside it.
    """

    def __init__(self, url: str, answers: Answers) -> None:
        parts = urlsplit(url)
        assert parts.hostname, url
        self._host, self._port, self._answers = parts.hostname, parts.port or 80, answers
        self._transport: asyncio.Transport | None = None
        self._answer = _Answer()

    async def send_while(self, waiting: deque[dict[str, Any]], after: float = 0.0) -> None:
        """Send requests while there are some, the first one after some seconds."""
        await asyncio.sleep(after)
        while waiting:
            await self._send(waiting.popleft())
        self._close()

    async def _send(self, body: dict[str, Any]) -> None:
        for attempt in range(_TRIES):
            try:
                await self._exchange(json.dumps(body).encode())
                return
            except ConnectionError:
                self._close()
                if attempt == _TRIES - 1:
                    raise ConnectionError(f"port {self._port}: closed before the answer was complete") from None
                self._answers.retries += 1

    async def _exchange(self, body: bytes) -> None:
        """Send one request and wait for the whole of its answer."""
        self._answer = answer = _Answer()
        loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = loop.create_future()
        if self._transport is None:
            self._transport, _ = await loop.create_connection(lambda: self, self._host, self._port)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        began = time.perf_counter()
        self._transport.write(head.encode() + body)
        await self._done
        self._answers.tokens += answer.tokens
        self._answers.first += [answer.times[0] - began]
        self._answers.between += [after - before for before, after in pairwise(answer.times)]
        if not answer.keeps_open:
            self._close()

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        if self._done.done():
            return
        try:
            if self._answer.take(data):
                self._done.set_result(None)
        except ValueError as error:
            self._done.set_exception(ValueError(f"port {self._port}: expected a text, found {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        """End what is awaited; the next request opens another connection."""
        self._transport = None
        if not self._done.done():
            self._done.set_exception(ConnectionError())

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None


class _Answer:
    """One answer on its way: server-sent events in chunks of HTTP/1.1."""

    def __init__(self) -> None:
        self.times: list[float] = []
        """When each event with text came."""
        self.tokens = 0
        self.keeps_open = True
        self._has_head = False
        self._raw, self._events = b"", b""

    def take(self, data: bytes) -> bool:
        """Take bytes; return whether the answer is complete.

        Raises:
            ValueError: it is an error.
        """
        self._raw += data
        if not self._has_head and not self._take_head():
            return False
        while True:
            line, end, rest = self._raw.partition(b"\r\n")
            size = int(line.split(b";")[0], 16) if end else 0
            if not end or len(rest) < size + 2:
                return False
            self._raw = rest[size + 2 :]
            if size == 0:
                return True
            self._take_events(rest[:size])

    def _take_head(self) -> bool:
        """Read the head, once it is whole; of an answer that is an error, wait for its body, too."""
        head, end, rest = self._raw.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").lower().split("\r\n")
        if not end:
            return False
        if lines[0].split()[1] != "200":
            size = next((int(line.partition(":")[2]) for line in lines if line.startswith("content-length:")), 0)
            if len(rest) < size:
                return False
            raise ValueError(f"{lines[0]} {rest[:1000].decode(errors='replace')}".rstrip())
        self.keeps_open = "connection: close" not in lines
        self._has_head, self._raw = True, rest
        return True

    def _take_events(self, data: bytes) -> None:
        *events, self._events = (self._events + data).split(b"\n\n")
        for text in events:
            if not text.startswith(b"data: {"):
                continue
            event = json.loads(text[6:])
            if "error" in event:
                raise ValueError(str(event)[:300])
            if event.get("choices"):
                self.times.append(time.perf_counter())
            if event.get("usage"):
                self.tokens = event["usage"]["completion_tokens"]


if __name__ == "__main__":
    main()
