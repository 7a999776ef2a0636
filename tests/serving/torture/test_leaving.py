"""Clients that leave, that are slow, or that only sit there: none of them takes anything from the others."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest

from tests.serving.command import WAIT, Server, descriptors_of, serving, until, wait_until

LONG_TEXT = {"prompt": "Ada sees", "max_tokens": 110, "ignore_eos": True}


def raw_request(body: dict, *, stream: bool) -> bytes:
    """Return the bytes of a request for completions."""
    data = json.dumps({**body, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def connect(server: Server) -> socket.socket:
    """Return a connection."""
    return socket.create_connection(("127.0.0.1", server.port), timeout=WAIT)


@contextmanager
def stopped_engine(server: Server) -> Iterator[None]:
    """Keep the engine from going on meanwhile, so that texts on their way stay so."""
    pid = server.engine_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("kind", ["streaming", "whole", "queued"])
def test_sixteen_that_leave_free_sixteen_places(kind, server):
    """Of 16 texts, streamed, whole or still waiting, whose clients close, none runs or waits a moment later.

    The engine stands still until all are cancelled, so that none can have ended by itself; then it makes no text whole.
    """
    is_told = len(server.events("request"))
    with stopped_engine(server):
        others = [connect(server) for _ in range(16)] if kind == "queued" else []
        mine = [connect(server) for _ in range(16)]
        for one in [*others, *mine]:
            one.sendall(raw_request(LONG_TEXT, stream=kind == "streaming"))
        wait_until(lambda: sum_of(server) == len(others) + 16)
        drawn = server.metric("generated_tokens_total")
        for clients in (mine, others):
            for one in clients:
                one.close()
            if kind == "queued" and clients is mine:
                wait_until(lambda: sum_of(server) == 16)
                assert server.health()["waiting"] == 0
        wait_until(lambda: len(server.events("request")) == is_told + len(others) + 16)
        assert {event["finish"] for event in server.events("request")[is_told:]} == {"cancelled"}
    server.wait_until_idle()
    assert server.metric("generated_tokens_total") - drawn < 16 * LONG_TEXT["max_tokens"]
    assert server.texts(prompt="a", max_tokens=2)


def sum_of(server: Server) -> int:
    """Return how many texts run or wait."""
    now = server.health()
    return now["running"] + now["waiting"]


@pytest.mark.slow
def test_slow_sockets_are_closed_and_a_good_client_goes_on(untrained, tmp_path):
    """200 with a header byte now and then, a body that never comes, or an answer that nobody reads: all are closed."""
    heads = {
        "headers": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
        "body": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
        "unread": tokenize_request("Ada sees the sea. " * 200_000),
    }
    times = ["--timeouts.headers=3s", "--timeouts.body=3s", "--timeouts.write=3s", "--limits.connections=300"]
    with serving(untrained, tmp_path, *times) as server, ExitStack() as stack:
        expected = server.texts(prompt="Ada", max_tokens=8, seed=1)
        before = descriptors_of(server.process.pid)
        slow = [*["headers"] * 95, *["body"] * 95, *["unread"] * 10]
        for kind in slow:
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.settimeout(WAIT)
            one.connect(("127.0.0.1", server.port))
            one.sendall(heads[kind])
            if kind == "headers":
                one.setblocking(False)
                stack.enter_context(dripping(one))
        end = time.monotonic() + WAIT
        while descriptors_of(server.process.pid) > before:
            assert time.monotonic() < end
            assert server.texts(prompt="Ada", max_tokens=8, seed=1) == expected
            time.sleep(0.1)
        assert server.health()["restarts"] == 0
        assert "Traceback" not in server.stderr


def tokenize_request(text: str) -> bytes:
    """Return the bytes of a request whose answer is many times as long."""
    data = json.dumps({"prompt": text}).encode()
    return f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


@contextmanager
def dripping(connection: socket.socket) -> Iterator[None]:
    """Send a byte every half second, until the other side has enough."""
    is_over = threading.Event()

    def drip() -> None:
        with suppress(OSError):
            while not is_over.wait(0.5):
                connection.send(b"x")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@pytest.mark.slow
def test_idle_connections_are_bounded_and_leave_no_descriptors(untrained, tmp_path):
    """1,000 connections that were kept alive: at most limits.connections stay, a new client is served, none leaks."""

    async def many(server: Server) -> None:
        before = descriptors_of(server.process.pid)
        pairs = []
        for _ in range(1000):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT)
            assert head.startswith(b"HTTP/1.1 200")
            pairs.append(writer)
        assert descriptors_of(server.process.pid) <= before + 60
        async with httpx.AsyncClient(base_url=server.url, timeout=WAIT) as client:
            answer = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 4})
            assert answer.status_code == 200
        for writer in pairs:
            writer.close()
        await until(lambda: descriptors_of(server.process.pid) <= before)

    with serving(untrained, tmp_path, "--limits.connections=50") as server:
        asyncio.run(many(server))
        assert server.terminate() == 143
        assert "Traceback" not in server.stderr
