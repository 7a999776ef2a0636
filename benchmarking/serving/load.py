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
from collections.abc import AsyncIterator
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
    """Between two events of a text; a server sends one for each token, unless it ends within a character."""
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


class _Client:
    """One connection, which is kept between requests."""

    def __init__(self, url: str, answers: Answers) -> None:
        parts = urlsplit(url)
        assert parts.hostname, url
        self._host, self._port, self._answers = parts.hostname, parts.port or 80, answers
        self._pipe: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

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
            except (ConnectionError, asyncio.IncompleteReadError):
                self._close()
                if attempt == _TRIES - 1:
                    raise ConnectionError(f"port {self._port}: closed before the answer was complete") from None
                self._answers.retries += 1

    async def _exchange(self, body: bytes) -> None:
        """Send one request and read the events of its answer."""
        if self._pipe is None:
            self._pipe = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._pipe
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        began = time.perf_counter()
        writer.write(head.encode() + body)
        keep = await self._read_head(reader)
        times: list[float] = []
        tokens = 0
        async for event in _events(reader):
            if "error" in event:
                raise ValueError(f"port {self._port}: expected a text, found {str(event)[:300]}")
            if event.get("choices"):
                times.append(time.perf_counter())
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
        self._answers.tokens += tokens
        self._answers.first += [times[0] - began]
        self._answers.between += [after - before for before, after in pairwise(times)]
        if not keep:
            self._close()

    async def _read_head(self, reader: asyncio.StreamReader) -> bool:
        """Return whether the connection stays open."""
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        if lines[0].split()[1] != "200":
            sizes = [int(line.partition(":")[2]) for line in lines if line.startswith("content-length:")]
            said = (await reader.readexactly(min([*sizes, 1000]) if sizes else 0)).decode(errors="replace")
            raise ValueError(f"port {self._port}: expected a text, found {lines[0]} {said}".rstrip())
        return "connection: close" not in lines

    def _close(self) -> None:
        if self._pipe is not None:
            self._pipe[1].close()
            self._pipe = None


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON objects of server-sent events in chunks of HTTP/1.1, until the answer ends."""
    rest = b""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        rest += await reader.readexactly(size)
        await reader.readexactly(2)
        *events, rest = rest.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: {"):
                yield json.loads(event[6:])
    await reader.readexactly(2)


if __name__ == "__main__":
    main()
