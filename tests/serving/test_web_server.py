"""The end of the web server: answers that slow clients have yet to read go out, as long as there is time."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.serving.web import Web, run, until
from transformerlm.serving import web_server
from transformerlm.serving.web_server import WebServer

SLIDES = {"limits": {"overflow": "slide", "max_tokens": 10**4}}


async def ask_without_reading(web: Web) -> socket.socket:
    """Ask for a long stream of which a client reads nothing yet."""
    loop, client = asyncio.get_running_loop(), socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await loop.sock_connect(client, ("127.0.0.1", web.port))
    body = json.dumps({"prompt": "ab", "max_tokens": 2000, "logprobs": 5, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    await loop.sock_sendall(client, head + body)
    await until(lambda: len(web.engine.active) == 1)
    return client


def ended(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    then: Callable[[Web, socket.socket], Awaitable[None]],
) -> WebServer:
    """Return a server that was told to end in so many seconds while a client had read nothing; then comes `then`."""
    monkeypatch.setattr(web_server, "_CLOSE_SECONDS", 0)
    servers: list[WebServer] = []

    async def ask(web: Web) -> None:
        assert web.server is not None
        servers.append(web.server)
        client = await ask_without_reading(web)
        web.server.end(seconds)
        await then(web, client)
        client.close()

    run(tmp_path, ask, over_network=True, sections=SLIDES)
    return servers[0]


def test_what_a_client_reads_late_is_whole(tmp_path, monkeypatch):
    """With time left, an answer goes out to its last event after the end has begun, and the server says so."""

    async def read_late(web: Web, client: socket.socket) -> None:
        await asyncio.sleep(1)  # it has ended but for this answer
        end = b""
        while got := await asyncio.get_running_loop().sock_recv(client, 1 << 16):
            end = (end + got)[-2000:]
        assert b"data: [DONE]" in end

    assert ended(tmp_path, monkeypatch, 60, read_late).has_sent_all


def test_what_nobody_reads_in_time_is_cut_and_said_to_be(tmp_path, monkeypatch):
    """Without time left the answer is cut, and the server knows that not all have gone out."""

    async def wait_for_the_cut(web: Web, client: socket.socket) -> None:
        await until(lambda: web.engine.active == [])

    assert not ended(tmp_path, monkeypatch, 0, wait_for_the_cut).has_sent_all
